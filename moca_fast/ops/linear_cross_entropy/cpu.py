"""linear_cross_entropy on the native CPU kernels (csrc/linear_cross_entropy/cpu.cpp)."""

import torch
from torch import Tensor

from moca_fast import _C
from moca_fast._gradients import held_rows, shares, total
from moca_fast._memory import empty_like
from moca_fast._native import DTYPES, address, contiguous, unsupported_tensors


def unsupported(*inputs: Tensor | None) -> str | None:
    return unsupported_tensors(*inputs)


def forward(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    tensors = [contiguous(t) for t in (hidden, weight, labels, bias)]
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
    tensors = [contiguous(t) for t in (hidden, weight, labels, bias)]
    index = _counted(labels, ignore_index)
    d_loss = d_loss.contiguous()
    grads, addresses = _gradients(hidden, weight, needs)
    params = _params(lse, index, *tensors)
    _C.linear_cross_entropy_backward(params, d_loss.data_ptr(), *addresses)
    return grads


def forward_with_gradients(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    needs: list[bool],
    mean: bool,
) -> tuple[Tensor, ...]:
    tensors = [contiguous(t) for t in (hidden, weight, labels, bias)]
    index = _counted(labels, ignore_index)
    loss = torch.zeros(labels.shape, dtype=torch.float32)
    lse = torch.empty(labels.shape, dtype=torch.float64)
    d_loss = shares(loss, index.shape[0], mean)
    grads, addresses = _gradients(hidden, weight, needs)
    held = held_rows(index.shape[0], weight.shape[0], hidden.dtype)
    params = _params(lse, index, *tensors)
    _C.linear_cross_entropy_with_gradients(
        params, held, loss.data_ptr(), d_loss.data_ptr(), *addresses
    )
    return total(loss, index.shape[0], mean), *grads


def _gradients(
    hidden: Tensor, weight: Tensor, needs: list[bool]
) -> tuple[tuple[Tensor, ...], list[int]]:
    """Gradients of hidden, weight and bias, and where they are: (0,) and 0 where none is needed.
    Zeros of hidden, since the kernels leave out rows that do not count; the others unwritten.
    """
    grads = (
        hidden.new_zeros(hidden.shape if needs[0] else 0),
        empty_like(weight) if needs[1] else hidden.new_empty(0),
        hidden.new_empty(weight.shape[0] if needs[2] else 0),
    )
    return grads, [g.data_ptr() if need else 0 for g, need in zip(grads, needs, strict=True)]


def _counted(labels: Tensor, ignore_index: int) -> Tensor:
    return (labels != ignore_index).nonzero()[:, 0].contiguous()


def _params(
    lse: Tensor,
    index: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
) -> "_C.LinearCrossEntropyParams":
    return _C.LinearCrossEntropyParams(
        hidden=address(hidden),
        weight=address(weight),
        bias=address(bias),
        labels=address(labels),
        index=address(index),
        lse=address(lse),
        rows=index.shape[0],
        tokens=hidden.shape[0],
        vocabulary=weight.shape[0],
        dim=hidden.shape[1],
        dtype=DTYPES[hidden.dtype],
        threads=torch.get_num_threads(),
    )
