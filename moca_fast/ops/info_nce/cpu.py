"""info_nce on the native CPU kernels (csrc/info_nce/cpu.cpp)."""

from typing import Any

import torch
from torch import Tensor

from moca_fast import _C
from moca_fast._native import DTYPES, unsupported_tensors


def unsupported(*inputs: Tensor | None) -> str | None:
    return unsupported_tensors(*inputs)


def forward(query: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
    tensors = _contiguous(query, *rest)
    loss = torch.empty(query.shape[0], dtype=torch.float32)
    lse = torch.empty(query.shape[0], dtype=torch.float64)
    _C.info_nce_forward(_params(lse, *tensors), loss.data_ptr())
    return loss, lse


def backward(
    d_loss: Tensor,
    lse: Tensor,
    query: Tensor,
    document: Tensor,
    target: Tensor,
    temperature: Tensor,
    hard_negatives: Tensor | None,
    query_ids: Tensor | None,
    document_ids: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    tensors = _contiguous(
        query, document, target, temperature, hard_negatives, query_ids, document_ids
    )
    d_loss = d_loss.contiguous()
    wanted: tuple[Any, ...] = (query, document, hard_negatives, temperature)
    grads = tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if need else query.new_empty(0)
        for t, need in zip(wanted, needs, strict=True)
    )
    addresses = [g.data_ptr() if need else 0 for g, need in zip(grads, needs, strict=True)]
    _C.info_nce_backward(_params(lse, *tensors), d_loss.data_ptr(), *addresses)
    return grads


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.contiguous() for t in tensors]


def _params(
    lse: Tensor,
    query: Tensor,
    document: Tensor,
    target: Tensor,
    temperature: Tensor,
    hard_negatives: Tensor | None,
    query_ids: Tensor | None,
    document_ids: Tensor | None,
) -> "_C.InfoNceParams":
    return _C.InfoNceParams(
        query=query.data_ptr(),
        document=document.data_ptr(),
        target=target.data_ptr(),
        temperature=temperature.data_ptr(),
        hard_negatives=0 if hard_negatives is None else hard_negatives.data_ptr(),
        query_ids=0 if query_ids is None else query_ids.data_ptr(),
        document_ids=0 if document_ids is None else document_ids.data_ptr(),
        lse=lse.data_ptr(),
        queries=query.shape[0],
        documents=document.shape[0],
        hard=0 if hard_negatives is None else hard_negatives.shape[1],
        dim=query.shape[1],
        dtype=DTYPES[query.dtype],
        threads=torch.get_num_threads(),
    )
