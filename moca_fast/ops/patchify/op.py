"""Patches of an image as the Qwen2-VL family takes them (arXiv 2409.12191): rescaled, normalised,
and ordered so that the patches of one vision token are consecutive.

H x W pixels, N patches, P values a patch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moca_fast import _dispatch
from moca_fast._checks import FLOATS, check_int, check_real, check_tensor
from moca_fast._operator import operator

OP = "patchify"
# Mean and standard deviation of the images CLIP was trained on, RGB in [0, 1]
# (github.com/openai/CLIP).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SMALLEST = torch.finfo(torch.float32).tiny  # standard deviation; what is less may count as 0


def patchify(
    image: Tensor,
    *,
    patch_size: int = 14,
    merge_size: int = 2,
    temporal_patch_size: int = 2,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """The normalised patches of one resized image: all that an image processor does after resizing.

    value = (byte / 255 - mean[c]) / std[c], each step rounded to float32 as in transformers, then
    to `dtype`. A row holds one patch as (channel, frame, y, x); every frame is the same. Rows go
    through the vision tokens from left to right and top to bottom, and in the same order through
    the merge_size x merge_size patches of each. There is no gradient: the input is bytes.

    Args:
        image: (H, W, 3) uint8, RGB, any strides; both sides multiples of patch_size * merge_size.
        patch_size: side of a patch in pixels.
        merge_size: patches along each side of one vision token.
        temporal_patch_size: frames a patch spans.
        mean: of each channel, RGB in [0, 1]; by default CLIP's.
        std: standard deviation of each channel, positive; by default CLIP's.
        dtype: of the patches: float32, bfloat16, float16 or float64 (computed in float64).
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        (N, P) `dtype`, N = H * W / patch_size^2, P = 3 * temporal_patch_size * patch_size^2. The
        grid is (1, H / patch_size, W / patch_size).

    Raises:
        ValueError: a shape or size that does not fit, or a backend that cannot run the call.
        TypeError: a wrong dtype, or not a tensor.
    """
    sizes = {
        "patch_size": patch_size,
        "merge_size": merge_size,
        "temporal_patch_size": temporal_patch_size,
    }
    image, dtype = inputs(image, **sizes, mean=mean, std=std, dtype=dtype)
    backend = _dispatch.requested(backend)
    return torch.ops.moca_fast.patchify(
        image, *sizes.values(), list(mean), list(std), dtype, backend
    )


def inputs(
    image: Tensor,
    *,
    patch_size: int = 14,
    merge_size: int = 2,
    temporal_patch_size: int = 2,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, torch.dtype]:
    """The checked image and dtype that backends are asked about."""
    check_tensor(OP, "image", image, shape=("H", "W", 3), dtypes=(torch.uint8,))
    for name, size in (
        ("patch_size", patch_size),
        ("merge_size", merge_size),
        ("temporal_patch_size", temporal_patch_size),
    ):
        check_int(OP, name, size, 1)
    factor = patch_size * merge_size
    if image.shape[0] % factor or image.shape[1] % factor:
        raise ValueError(
            f"moca_fast.{OP}: image: expected sides that are multiples of "
            f"patch_size * merge_size = {factor}, got {image.shape[0]} x {image.shape[1]}"
        )
    for name, values in (("mean", mean), ("std", std)):
        if not hasattr(values, "__len__") or len(values) != 3:
            raise ValueError(f"moca_fast.{OP}: {name}: expected 3 values, got {values!r}")
        for value in values:
            check_real(OP, name, value)
    if min(std) < SMALLEST:
        raise ValueError(
            f"moca_fast.{OP}: std: expected positive values, of at least {SMALLEST:.2g}, got "
            f"{tuple(std)}"
        )
    if dtype not in FLOATS:
        raise TypeError(f"moca_fast.{OP}: dtype: expected a floating-point dtype, got {dtype}")
    return image, dtype


@operator("patchify")
def _forward(
    image: Tensor,
    patch_size: int,
    merge_size: int,
    temporal_patch_size: int,
    mean: list[float],
    std: list[float],
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    kernel = _dispatch.select(OP, backend, image, dtype)
    return kernel.forward(image, patch_size, merge_size, temporal_patch_size, mean, std, dtype)


@_forward.register_fake
def _(image, patch_size, merge_size, temporal_patch_size, mean, std, dtype, backend):
    patches = (image.shape[0] // patch_size) * (image.shape[1] // patch_size)
    size = 3 * temporal_patch_size * patch_size**2
    return image.new_empty((patches, size), dtype=dtype)
