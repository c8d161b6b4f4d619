"""info_nce on the native CPU kernels (csrc/info_nce/cpu.cpp)."""

from typing import Any

import torch
from torch import Tensor

from moca_fast import _C
from moca_fast._gradients import held_rows, shares, total
from moca_fast._memory import empty_like
from moca_fast._native import DTYPES, address, contiguous, unsupported_tensors
from moca_fast.ops.info_nce.op import Inputs


def unsupported(*inputs: Tensor | None) -> str | None:
    return unsupported_tensors(*inputs)


def forward(*tensors: Any) -> tuple[Tensor, Tensor]:
    inputs = _contiguous(tensors)
    queries = inputs.query.shape[0]
    loss = torch.empty(queries, dtype=torch.float32)
    lse = torch.empty(queries, dtype=torch.float64)
    _C.info_nce_forward(_params(lse, inputs), loss.data_ptr())
    return loss, lse


def backward(d_loss: Tensor, lse: Tensor, needs: list[bool], *tensors: Any) -> tuple[Tensor, ...]:
    inputs = _contiguous(tensors)
    d_loss = d_loss.contiguous()
    grads, addresses = _gradients(inputs, needs)
    _C.info_nce_backward(_params(lse, inputs), d_loss.data_ptr(), *addresses)
    return grads


def forward_with_gradients(needs: list[bool], mean: bool, *tensors: Any) -> tuple[Tensor, ...]:
    inputs = _contiguous(tensors)
    queries, documents = inputs.query.shape[0], inputs.document.shape[0]
    loss = torch.empty(queries, dtype=torch.float32)
    lse = torch.empty(queries, dtype=torch.float64)
    d_loss = shares(loss, queries, mean)
    grads, addresses = _gradients(inputs, needs)
    held = held_rows(queries, documents, inputs.query.dtype)
    params = _params(lse, inputs)
    _C.info_nce_with_gradients(params, held, loss.data_ptr(), d_loss.data_ptr(), *addresses)
    return total(loss, queries, mean), *grads


def _gradients(inputs: Inputs, needs: list[bool]) -> tuple[tuple[Tensor, ...], list[int]]:
    """Unwritten gradients of query, document, hard_negatives and temperature, and where they are:
    (0,) and 0 where none is needed.
    """
    wanted = (inputs.query, inputs.document, inputs.hard_negatives, inputs.temperature)
    grads = tuple(
        empty_like(tensor) if need and tensor is not None else inputs.query.new_empty(0)
        for tensor, need in zip(wanted, needs, strict=True)
    )
    return grads, [grad.data_ptr() if need else 0 for grad, need in zip(grads, needs, strict=True)]


def _contiguous(tensors: tuple[Tensor | None, ...]) -> Inputs:
    return Inputs(*(contiguous(tensor) for tensor in tensors))


def _params(lse: Tensor, inputs: Inputs) -> "_C.InfoNceParams":
    hard = inputs.hard_negatives
    addresses = {name: address(tensor) for name, tensor in inputs._asdict().items()}
    return _C.InfoNceParams(
        **addresses,
        lse=address(lse),
        queries=inputs.query.shape[0],
        documents=inputs.document.shape[0],
        hard=0 if hard is None else hard.shape[1],
        dim=inputs.query.shape[1],
        dtype=DTYPES[inputs.query.dtype],
        threads=torch.get_num_threads(),
    )
