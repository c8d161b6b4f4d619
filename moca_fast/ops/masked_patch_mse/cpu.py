"""masked_patch_mse on the native CPU kernels (csrc/masked_patch_mse/cpu.cpp)."""

import torch
from torch import Tensor

from moca_fast import _C
from moca_fast._memory import empty_like
from moca_fast._native import DTYPES, unsupported_tensors


def unsupported(pred: Tensor, patches: Tensor, index: Tensor) -> str | None:
    return unsupported_tensors(pred, patches, index)


def forward(pred: Tensor, patches: Tensor, index: Tensor, normalize: bool) -> Tensor:
    if index.numel() == 0:
        return pred.new_zeros((), dtype=torch.float32)
    pred, patches, index = pred.contiguous(), patches.contiguous(), index.contiguous()
    row_loss = torch.empty(index.shape, dtype=torch.float32)
    params = kernel_params(pred, patches, index, normalize)
    _C.masked_patch_mse_forward(params, row_loss.data_ptr())
    return row_loss.mean(dtype=torch.float64).float()


def backward(
    d_loss: Tensor, pred: Tensor, patches: Tensor, index: Tensor, normalize: bool
) -> Tensor:
    pred, patches, index = pred.contiguous(), patches.contiguous(), index.contiguous()
    d_pred = empty_like(pred)
    d_loss = d_loss.to(torch.float32)
    params = kernel_params(pred, patches, index, normalize)
    _C.masked_patch_mse_backward(params, d_loss.data_ptr(), d_pred.data_ptr())
    return d_pred


def kernel_params(
    pred: Tensor, patches: Tensor, index: Tensor, normalize: bool
) -> "_C.MaskedPatchMseParams":
    return _C.MaskedPatchMseParams(
        pred=pred.data_ptr(),
        patches=patches.data_ptr(),
        index=index.data_ptr(),
        rows=pred.shape[0],
        row_size=pred.shape[1],
        num_patches=patches.shape[0],
        pred_dtype=DTYPES[pred.dtype],
        patches_dtype=DTYPES[patches.dtype],
        normalize=normalize,
        threads=torch.get_num_threads(),
    )
