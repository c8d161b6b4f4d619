"""pool on the native CPU kernels (csrc/pool/cpu.cpp)."""

import torch
from torch import Tensor

from moca_fast import _C
from moca_fast._memory import empty, empty_like
from moca_fast._native import DTYPES, unsupported_tensors


def unsupported(hidden: Tensor, cu_seqlens: Tensor) -> str | None:
    return unsupported_tensors(hidden, cu_seqlens)


def forward(
    hidden: Tensor, cu_seqlens: Tensor, mean: bool, normalize: bool
) -> tuple[Tensor, Tensor]:
    hidden, cu_seqlens = hidden.contiguous(), cu_seqlens.contiguous()
    documents = cu_seqlens.shape[0] - 1
    pooled = empty((documents, hidden.shape[1]), torch.float32)
    norm = torch.empty(documents, dtype=torch.float32)
    _C.pool_forward(kernel_params(hidden, cu_seqlens, pooled, norm, mean, normalize))
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
    d_hidden = empty_like(hidden)
    params = kernel_params(hidden, cu_seqlens, pooled, norm, mean, normalize)
    _C.pool_backward(params, d_pooled.data_ptr(), d_hidden.data_ptr())
    return d_hidden


def kernel_params(
    hidden: Tensor,
    cu_seqlens: Tensor,
    pooled: Tensor,
    norm: Tensor,
    mean: bool,
    normalize: bool,
) -> "_C.PoolParams":
    return _C.PoolParams(
        hidden=hidden.data_ptr(),
        cu_seqlens=cu_seqlens.data_ptr(),
        pooled=pooled.data_ptr(),
        norm=norm.data_ptr(),
        documents=cu_seqlens.shape[0] - 1,
        tokens=hidden.shape[0],
        dim=hidden.shape[1],
        dtype=DTYPES[hidden.dtype],
        mean=mean,
        normalize=normalize,
        threads=torch.get_num_threads(),
    )
