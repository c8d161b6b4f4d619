"""patchify in eager torch: the specification."""

import torch
from torch import Tensor


def unsupported(image: Tensor, dtype: torch.dtype) -> str | None:
    return None


def forward(
    image: Tensor,
    patch_size: int,
    merge_size: int,
    temporal_patch_size: int,
    mean: list[float],
    std: list[float],
    dtype: torch.dtype,
) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)
    values = image.to(wide) / 255
    values = (values - values.new_tensor(mean)) / values.new_tensor(std)
    grid = [side // (patch_size * merge_size) for side in image.shape[:2]]
    blocks = values.reshape(grid[0], merge_size, patch_size, grid[1], merge_size, patch_size, 3)
    blocks = blocks.permute(0, 3, 1, 4, 6, 2, 5)  # token, patch of the token, channel, pixel
    frames = blocks[:, :, :, :, :, None].expand(*[-1] * 5, temporal_patch_size, -1, -1)
    size = 3 * temporal_patch_size * patch_size**2
    return frames.reshape(-1, size).to(dtype)
