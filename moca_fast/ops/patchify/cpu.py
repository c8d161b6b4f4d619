"""patchify on the native CPU kernel (csrc/patchify/cpu.cpp)."""

import torch
from torch import Tensor

from moca_fast import _C
from moca_fast._memory import empty
from moca_fast._native import DTYPES, unsupported_tensors


def unsupported(image: Tensor, dtype: torch.dtype) -> str | None:
    if dtype not in DTYPES:
        return f"dtype {str(dtype).removeprefix('torch.')} has no native kernel"
    return unsupported_tensors(image)


def forward(
    image: Tensor,
    patch_size: int,
    merge_size: int,
    temporal_patch_size: int,
    mean: list[float],
    std: list[float],
    dtype: torch.dtype,
) -> Tensor:
    height, width = image.shape[:2]
    size = 3 * temporal_patch_size * patch_size**2
    patches = empty(((height // patch_size) * (width // patch_size), size), dtype)
    params = _C.PatchifyParams(
        image=image.data_ptr(),
        patches=patches.data_ptr(),
        height=height,
        width=width,
        strides=image.stride(),
        patch=patch_size,
        merge=merge_size,
        frames=temporal_patch_size,
        mean=mean,
        std=std,
        dtype=DTYPES[dtype],
        threads=torch.get_num_threads(),
    )
    _C.patchify_forward(params)
    return patches
