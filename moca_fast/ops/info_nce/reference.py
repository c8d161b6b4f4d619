"""info_nce in eager torch: the specification. Holds the scores of CHUNK queries at a time."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moca_fast._checks import check_entries
from moca_fast._gradients import shares, total
from moca_fast.ops.info_nce.op import Inputs

CHUNK = 1024  # queries


def unsupported(*inputs: Tensor | None) -> str | None:
    return None


def forward(*tensors: Any) -> tuple[Tensor, Tensor]:
    inputs = Inputs(*tensors)
    query, document, target, temperature, *_ = inputs
    check_entries("info_nce", "target", target, document.shape[0])
    loss = temperature.new_empty(query.shape[0])
    lse = torch.empty_like(loss, dtype=torch.float64)
    for rows in _chunks(query):
        scores = _scores(rows, inputs)
        own = scores.gather(1, target[rows, None])[:, 0]
        peak = scores.amax(dim=1)
        log_sum = (scores - peak[:, None]).exp().sum(dim=1).log()
        loss[rows] = log_sum + (peak - own)
        lse[rows] = log_sum.double() + peak
    return loss, lse


def backward(d_loss: Tensor, lse: Tensor, needs: list[bool], *tensors: Any) -> tuple[Tensor, ...]:
    inputs = Inputs(*tensors)
    query, document, target, temperature, hard_negatives, *_ = inputs
    dtype, count = temperature.dtype, document.shape[0]
    documents = document.to(dtype)
    hard = query[:, None, :0, None] if hard_negatives is None else hard_negatives.to(dtype)
    d_query, d_document = torch.zeros_like(query, dtype=dtype), torch.zeros_like(documents)
    d_hard, d_temperature = torch.zeros_like(hard), torch.zeros_like(temperature)
    for rows in _chunks(query):
        scores = _scores(rows, inputs)
        d_scores = (scores - lse[rows, None]).exp().to(dtype)
        d_scores.scatter_add_(1, target[rows, None], -torch.ones_like(d_scores[:, :1]))
        d_scores *= d_loss[rows, None]
        d_temperature -= (d_scores * scores.where(d_scores != 0, 0)).sum() / temperature
        d_scores /= temperature
        states = query[rows].to(dtype)
        d_query[rows] = d_scores[:, :count] @ documents
        d_document += d_scores[:, :count].mT @ states
        if hard_negatives is not None:
            d_query[rows] += torch.einsum("bk,bkd->bd", d_scores[:, count:], hard[rows])
            d_hard[rows] = d_scores[:, count:, None] * states[:, None]
    grads = (grad.to(query.dtype).contiguous() for grad in (d_query, d_document, d_hard))
    return tuple(
        grad if need else query.new_empty(0)
        for grad, need in zip((*grads, d_temperature), needs, strict=True)
    )


def forward_with_gradients(needs: list[bool], mean: bool, *tensors: Any) -> tuple[Tensor, ...]:
    loss, lse = forward(*tensors)
    rows = loss.shape[0]
    return total(loss, rows, mean), *backward(shares(loss, rows, mean), lse, needs, *tensors)


def _chunks(query: Tensor) -> Iterator[Tensor]:
    """Numbers of the queries, CHUNK at a time; nothing where there are none."""
    for begin in range(0, query.shape[0], CHUNK):
        yield torch.arange(begin, min(begin + CHUNK, query.shape[0]), device=query.device)


def _scores(rows: Tensor, inputs: Inputs) -> Tensor:
    """(rows, M + K) scores of some queries; -inf where a document is no negative."""
    query, document, target, temperature, hard_negatives, query_ids, document_ids = inputs
    states = query[rows].to(temperature.dtype)
    scores = states @ document.to(temperature.dtype).mT
    if document_ids is not None and query_ids is not None:
        same = query_ids[rows, None] == document_ids
        own = torch.arange(document.shape[0], device=query.device) == target[rows, None]
        scores = scores.masked_fill(same & ~own, -torch.inf)
    if hard_negatives is not None:
        hard = hard_negatives[rows].to(temperature.dtype)
        scores = torch.cat([scores, torch.einsum("bd,bkd->bk", states, hard)], dim=1)
    return scores / temperature
