"""patchify in Triton: a program holds one channel of a few patches at a time, as bytes, and writes
their values in every frame.

H x W pixels, N patches, P values a patch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moca_triton.device import DTYPES, unsupported_tensors

TILE = 1024  # pixels of a program, of each channel: 8 a thread


def unsupported(image: Tensor, dtype: torch.dtype) -> str | None:
    if dtype not in DTYPES:
        return f"dtype {str(dtype).removeprefix('torch.')} has no Triton kernel"
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
    area = patch_size**2
    count = (height // patch_size) * (width // patch_size)
    patches = image.new_empty((count, 3 * temporal_patch_size * area), dtype=dtype)
    if count == 0:
        return patches
    block_a = min(max(triton.next_power_of_2(area), 16), TILE)
    block_n = TILE // block_a
    _forward_kernel[(triton.cdiv(count, block_n), triton.cdiv(area, block_a))](
        image,
        patches,
        *map(float, mean),
        *map(float, std),
        count,
        width // (patch_size * merge_size),
        *image.stride(),
        patch_size,
        merge_size,
        temporal_patch_size,
        block_n,
        block_a,
    )
    return patches


@triton.jit
def _forward_kernel(
    image_ptr,
    patches_ptr,
    mean_r,
    mean_g,
    mean_b,
    std_r,
    std_g,
    std_b,
    count,
    tokens_a_row,
    row_stride,
    column_stride,
    channel_stride,
    PATCH: tl.constexpr,
    MERGE: tl.constexpr,
    FRAMES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    AREA: tl.constexpr = PATCH * PATCH
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_a = tl.program_id(1) * BLOCK_A + tl.arange(0, BLOCK_A)
    mask = (offs_n < count)[:, None] & (offs_a < AREA)[None, :]
    # The MERGE x MERGE patches of a token are consecutive.
    token, inside = offs_n // (MERGE * MERGE), offs_n % (MERGE * MERGE)
    y = (token // tokens_a_row * MERGE + inside // MERGE) * PATCH
    x = (token % tokens_a_row * MERGE + inside % MERGE) * PATCH
    rows = (y[:, None] + (offs_a // PATCH)[None, :]) * row_stride
    pixels = image_ptr + rows + (x[:, None] + (offs_a % PATCH)[None, :]) * column_stride
    values = patches_ptr + offs_n[:, None] * (3 * FRAMES * AREA) + offs_a[None, :]
    for channel in tl.static_range(3):
        mean = mean_r if channel == 0 else (mean_g if channel == 1 else mean_b)
        std = std_r if channel == 0 else (std_g if channel == 1 else std_b)
        byte = tl.load(pixels + channel * channel_stride, mask, other=0).to(tl.float32)
        # Rounded at each step, as the image processors of transformers round.
        value = tl.div_rn(tl.div_rn(byte, 255.0) - mean, std)
        for frame in tl.static_range(FRAMES):
            tl.store(values + (channel * FRAMES + frame) * AREA, value, mask)
