"""What every `cuda.py` shares: where a call runs, and common refusals."""

import re
from functools import cache

import torch
from torch import Tensor

from moca_fast import _C
from moca_fast._native import DTYPES

NO_CODE = "this build holds no CUDA code: no nvcc, or MOCA_CUDA=0 (docs/wheels.md)"


@cache
def compiled() -> tuple[str, ...]:
    """The architectures that this build holds CUDA code for: ("80", "90a")."""
    return tuple(name for name in _C.build_info()["cuda_archs"].split(",") if name)


def runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code for `arch` runs on a GPU of this compute capability.

    Plain code runs on its own generation from its own minor number on, code with `f` on its family
    (the same, as far as they are known), code with `a` on its own architecture alone.
    """
    parts = re.fullmatch(r"(\d+)(\d)([af]?)", arch)
    if parts is None:
        raise ValueError(f"expected an architecture such as '90a', got {arch!r}")
    major, minor = int(parts[1]), int(parts[2])
    if parts[3] == "a":
        return (major, minor) == capability
    return major == capability[0] and minor <= capability[1]


@cache
def old_driver() -> str | None:
    """Why the driver cannot run this build: its major version of CUDA must be no older."""
    driver, runtime = _C.cuda_versions()
    if driver // 1000 >= runtime // 1000:
        return None
    named = [f"{version // 1000}.{version % 1000 // 10}" for version in (runtime, driver)]
    return "this build is of CUDA {}, the driver runs CUDA {} and older".format(*named)


@cache
def missing_code(device: int) -> str | None:
    """Why this build does not run on a GPU: what it holds, and what was found."""
    if not compiled():
        return NO_CODE
    if reason := old_driver():
        return reason
    gpu = torch.cuda.get_device_properties(device)
    if any(runs_on(arch, (gpu.major, gpu.minor)) for arch in compiled()):
        return None
    held = ", ".join(f"sm_{arch}" for arch in compiled())
    return (
        f"this build holds CUDA code for {held}, none of which runs on {gpu.name} "
        f"(sm_{gpu.major}{gpu.minor}); MOCA_CUDA_ARCHS chooses when building (docs/wheels.md)"
    )


def unsupported_tensors(*tensors: Tensor | None) -> str | None:
    """Why the CUDA kernels cannot take these tensors: device, architecture, or a float dtype."""
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cuda":
            return f"tensors are on {tensor.device}, this backend runs on cuda"
        if tensor.is_floating_point() and tensor.dtype not in DTYPES:
            return f"dtype {str(tensor.dtype).removeprefix('torch.')} has no CUDA kernel"
        if reason := missing_code(tensor.get_device()):
            return reason
    return None


def queue(tensor: Tensor) -> "_C.Queue":
    """Where kernels on this tensor run: its GPU, and torch's current stream there."""
    device = tensor.get_device()
    return _C.Queue(device, torch.cuda.current_stream(device).cuda_stream)
