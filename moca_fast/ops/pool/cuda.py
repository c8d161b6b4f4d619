"""pool on the CUDA kernels (csrc/pool/forward.cu, backward.cu).

Boundaries are not read back, which would wait for the GPU: a document whose boundaries are out of
order or past T pools to NaN.
"""

import torch
from torch import Tensor

from moca_fast import _C
from moca_fast._cuda import queue, unsupported_tensors
from moca_fast.ops.pool.cpu import kernel_params


def unsupported(hidden: Tensor, cu_seqlens: Tensor) -> str | None:
    return unsupported_tensors(hidden, cu_seqlens)


def forward(
    hidden: Tensor, cu_seqlens: Tensor, mean: bool, normalize: bool
) -> tuple[Tensor, Tensor]:
    hidden, cu_seqlens = hidden.contiguous(), cu_seqlens.contiguous()
    documents, dim = cu_seqlens.shape[0] - 1, hidden.shape[1]
    pooled = hidden.new_empty((documents, dim), dtype=torch.float32)
    norm = hidden.new_empty(documents, dtype=torch.float32)
    params = kernel_params(hidden, cu_seqlens, pooled, norm, mean, normalize)
    sums = hidden.new_empty((_C.pool_pieces(params) if mean else 0, dim), dtype=torch.float32)
    _C.pool_forward_cuda(params, sums.data_ptr(), queue(hidden))
    return pooled, norm


def backward(
    d_pooled: Tensor,
    hidden: Tensor,
    cu_seqlens: Tensor,
    pooled: Tensor,
    norm: Tensor,
    mean: bool,
    normalize: bool,
) -> Tensor:
    hidden, cu_seqlens = hidden.contiguous(), cu_seqlens.contiguous()
    d_pooled = d_pooled.contiguous()
    d_hidden = torch.empty_like(hidden)
    params = kernel_params(hidden, cu_seqlens, pooled, norm, mean, normalize)
    _C.pool_backward_cuda(params, d_pooled.data_ptr(), d_hidden.data_ptr(), queue(hidden))
    return d_hidden
