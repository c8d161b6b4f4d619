"""linear_cross_entropy on the native CPU kernels (csrc/linear_cross_entropy/cpu.cpp)."""

from typing import Any

import torch
from torch import Tensor

from moca_fast import _C
from moca_fast._native import DTYPES, unsupported_tensors


def unsupported(*inputs: Tensor | None) -> str | None:
    return unsupported_tensors(*inputs)


def forward(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    tensors = _contiguous(hidden, weight, labels, bias)
    index = _counted(labels, ignore_index)
    loss = torch.zeros(labels.shape, dtype=torch.float32)
    lse = torch.zeros(labels.shape, dtype=torch.float64)
    _C.linear_cross_entropy_forward(_params(lse, index, *tensors), loss.data_ptr())
    return loss, lse


def backward(
    d_loss: Tensor,
    lse: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    tensors = _contiguous(hidden, weight, labels, bias)
    index = _counted(labels, ignore_index)
    d_loss = d_loss.contiguous()
    contiguous = torch.contiguous_format
    grads = (
        # Rows that do not count are left out by the kernel.
        torch.zeros_like(hidden, memory_format=contiguous) if needs[0] else hidden.new_empty(0),
        torch.empty_like(weight, memory_format=contiguous) if needs[1] else hidden.new_empty(0),
        hidden.new_empty(weight.shape[0] if needs[2] else 0),
    )
    addresses = [g.data_ptr() if need else 0 for g, need in zip(grads, needs, strict=True)]
    params = _params(lse, index, *tensors)
    _C.linear_cross_entropy_backward(params, d_loss.data_ptr(), *addresses)
    return grads


def _counted(labels: Tensor, ignore_index: int) -> Tensor:
    return (labels != ignore_index).nonzero()[:, 0].contiguous()


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.contiguous() for t in tensors]


def _params(
    lse: Tensor,
    index: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
) -> "_C.LinearCrossEntropyParams":
    return _C.LinearCrossEntropyParams(
        hidden=hidden.data_ptr(),
        weight=weight.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        labels=labels.data_ptr(),
        index=index.data_ptr(),
        lse=lse.data_ptr(),
        rows=index.shape[0],
        tokens=hidden.shape[0],
        vocabulary=weight.shape[0],
        dim=hidden.shape[1],
        dtype=DTYPES[hidden.dtype],
        threads=torch.get_num_threads(),
    )
