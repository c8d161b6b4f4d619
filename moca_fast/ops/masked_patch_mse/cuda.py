"""masked_patch_mse on the CUDA kernels (csrc/masked_patch_mse/forward.cu, backward.cu).

The index is not read back, which would wait for the GPU: an entry outside of patches makes the loss
and its row of the gradient NaN.
"""

import torch
from torch import Tensor

from moca_fast import _C
from moca_fast._cuda import queue, unsupported_tensors
from moca_fast.ops.masked_patch_mse.cpu import kernel_params


def unsupported(pred: Tensor, patches: Tensor, index: Tensor) -> str | None:
    return unsupported_tensors(pred, patches, index)


def forward(pred: Tensor, patches: Tensor, index: Tensor, normalize: bool) -> Tensor:
    if index.numel() == 0:
        return pred.new_zeros((), dtype=torch.float32)
    pred, patches, index = pred.contiguous(), patches.contiguous(), index.contiguous()
    row_loss = pred.new_empty(index.shape, dtype=torch.float32)
    params = kernel_params(pred, patches, index, normalize)
    _C.masked_patch_mse_forward_cuda(params, row_loss.data_ptr(), queue(pred))
    return row_loss.mean(dtype=torch.float64).float()


def backward(
    d_loss: Tensor, pred: Tensor, patches: Tensor, index: Tensor, normalize: bool
) -> Tensor:
    pred, patches, index = pred.contiguous(), patches.contiguous(), index.contiguous()
    d_pred = torch.empty_like(pred)
    d_loss = d_loss.to(torch.float32)
    params = kernel_params(pred, patches, index, normalize)
    _C.masked_patch_mse_backward_cuda(params, d_loss.data_ptr(), d_pred.data_ptr(), queue(pred))
    return d_pred
