"""masked_patch_mse in eager torch: the specification."""

import torch
from torch import Tensor

from moca_fast._checks import check_entries

EPSILON = 1e-6  # on the variance, as in the MAE paper's released code


def unsupported(pred: Tensor, patches: Tensor, index: Tensor) -> str | None:
    return None


def forward(pred: Tensor, patches: Tensor, index: Tensor, normalize: bool) -> Tensor:
    if index.numel() == 0:
        return pred.new_zeros((), dtype=_accumulator(pred))
    return _error(pred, patches, index, normalize).square().mean(dim=1).mean()


def backward(
    d_loss: Tensor, pred: Tensor, patches: Tensor, index: Tensor, normalize: bool
) -> Tensor:
    scale = 2.0 / max(pred.numel(), 1)
    return (d_loss * scale * _error(pred, patches, index, normalize)).to(pred.dtype).contiguous()


def _accumulator(pred: Tensor) -> torch.dtype:
    return torch.promote_types(pred.dtype, torch.float32)


def _error(pred: Tensor, patches: Tensor, index: Tensor, normalize: bool) -> Tensor:
    dtype = _accumulator(pred)
    check_entries("masked_patch_mse", "index", index, patches.shape[0])
    target = patches.index_select(0, index).to(dtype)
    if normalize:
        variance = target.var(dim=1, keepdim=True, correction=min(1, target.shape[1] - 1))
        target = (target - target.mean(dim=1, keepdim=True)) / (variance + EPSILON).sqrt()
    return pred.to(dtype) - target
