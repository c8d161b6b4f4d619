"""What every kernel file shares: where Triton runs, and which tensors it takes."""

import os

import torch
from torch import Tensor

# Triton reads this when a kernel is defined. Interpreted kernels run on tensors of the CPU, slowly:
# the way to check them where there is no GPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
if INTERPRETED:
    from moca_triton.interpreter import repair

    repair()

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsupported_tensors(*tensors: Tensor | None) -> str | None:
    """Why the kernels cannot take these tensors: their device, or a float dtype."""
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != DEVICE:
            return f"tensors are on {tensor.device}, this backend runs on {DEVICE}"
        if tensor.is_floating_point() and tensor.dtype not in DTYPES:
            return f"dtype {str(tensor.dtype).removeprefix('torch.')} has no Triton kernel"
    return None
