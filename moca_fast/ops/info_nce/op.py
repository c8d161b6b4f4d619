"""InfoNCE over gathered documents (arXiv 1807.03748), as MoCa's contrastive stage uses it
(arXiv 2506.23115): in-batch negatives of all ranks, and hard negatives that only their own query
sees. The B x M scores are never held: a tile, a few queries' at a time, or all if they are few.

B queries, M documents, K hard negatives a query, D dim.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moca_fast import _dispatch
from moca_fast._checks import FLOATS, check_real, check_tensor
from moca_fast._gradients import (
    empty_gradients,
    held_rows,
    keep_gradients,
    made_with_loss,
    scaled_gradients,
    total,
)
from moca_fast._operator import operator

OP = "info_nce"
REDUCTIONS = ("mean", "sum", "none")


class Inputs(NamedTuple):
    """The tensors of a checked call, as `info_nce` describes them, defaults filled in."""

    query: Tensor
    document: Tensor
    target: Tensor
    temperature: Tensor  # () in the dtype that scores are accumulated in
    hard_negatives: Tensor | None
    query_ids: Tensor | None
    document_ids: Tensor | None


def info_nce(
    query: Tensor,
    document: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.03,
    hard_negatives: Tensor | None = None,
    query_ids: Tensor | None = None,
    document_ids: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Cross entropy of each query's own document among all documents.

    loss[b] = log(sum over j of exp(s[b, j]) + sum over k of exp(h[b, k])) - s[b, target[b]],
    s = query . document / temperature, h[b, k] = query[b] . hard_negatives[b, k] / temperature.
    Nothing is normalised here: for the cosine similarity pass vectors of unit length, as
    `moca_fast.pool` gives them. On a GPU, in float32 on a CPU, and for at most 4 Mi scores B x M
    there, but never in float16, a gradient that will be needed of a "mean" or "sum" is made along
    with the loss, of the same scores, and kept for the backward.

    Args:
        query: (B, D) float32, bfloat16, float16 or float64; receives a gradient.
        document: (M, D) of the dtype of query; all ranks' positives, already gathered; receives a
            gradient.
        target: (B,) int64, the row of `document` that answers each query; default 0 .. B - 1.
        temperature: a finite float or 0-d tensor, of at least the smallest normal number of the
            dtype of the loss. A tensor receives a gradient, and its value is checked on the CPU
            only, since reading it from an accelerator waits for it.
        hard_negatives: (B, K, D) of the dtype of query, seen by their own query only; receives a
            gradient.
        query_ids: (B,) int64, the id of each query's positive; default document_ids[target].
        document_ids: (M,) int64. A document whose id is that of the query's positive is no
            negative of this query (it leaves the sum), unless it is the target row itself.
        reduction: "mean" over queries, "sum" or "none".
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        () or, with "none", (B,) float32 (float64 for float64 queries). The mean over no query is
        0 with zero gradient.

    Raises:
        ValueError: shapes or devices that do not fit, a temperature out of range, query
            ids without document ids, an unknown reduction, or a backend that cannot run the call.
        TypeError: a wrong dtype, or not a tensor.
        IndexError: an entry of `target` outside 0 to M - 1. The kernels for GPUs, which never wait
            for the host, make that query's loss NaN instead.
    """
    tensors = inputs(
        query,
        document,
        target,
        temperature=temperature,
        hard_negatives=hard_negatives,
        query_ids=query_ids,
        document_ids=document_ids,
        reduction=reduction,
    )
    backend = _dispatch.requested(backend)
    call = (*tensors, backend)
    needs = [t is not None and t.requires_grad for t in _with_gradient(*tensors)]
    if reduction == "none":
        return torch.ops.moca_fast.info_nce(*call)[0]
    held = held_rows(query.shape[0], document.shape[0], query.dtype)
    if torch.is_grad_enabled() and any(needs) and made_with_loss(query, backend, held):
        mean = reduction == "mean"
        return torch.ops.moca_fast.info_nce_with_gradients(*call, needs, mean)[0]
    return total(torch.ops.moca_fast.info_nce(*call)[0], query.shape[0], reduction == "mean")


def inputs(
    query: Tensor,
    document: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.03,
    hard_negatives: Tensor | None = None,
    query_ids: Tensor | None = None,
    document_ids: Tensor | None = None,
    reduction: str = "mean",
) -> Inputs:
    """Checks the arguments of `info_nce` and makes the tensors that backends are asked about."""
    check_tensor(OP, "query", query, shape=("B", "D"), dtypes=FLOATS)
    batch, dim = query.shape
    check_tensor(OP, "document", document, shape=("M", dim), dtypes=(query.dtype,), like=query)
    if hard_negatives is not None:
        check_tensor(
            OP,
            "hard_negatives",
            hard_negatives,
            shape=(batch, "K", dim),
            dtypes=(query.dtype,),
            like=query,
        )
    rows = document.shape[0]
    if target is None:
        if rows < batch:
            raise ValueError(
                f"moca_fast.{OP}: document: expected at least B = {batch} rows when target is not "
                f"given, got {rows}"
            )
        target = torch.arange(batch, device=query.device)
    ids = (torch.int64,)
    check_tensor(OP, "target", target, shape=(batch,), dtypes=ids, like=query)
    if document_ids is not None:
        check_tensor(OP, "document_ids", document_ids, shape=(rows,), dtypes=ids, like=query)
        if query_ids is None:
            query_ids = _ids_of(document_ids, target)
    elif query_ids is not None:
        raise ValueError(f"moca_fast.{OP}: query_ids: expected document_ids beside them, got none")
    if query_ids is not None:
        check_tensor(OP, "query_ids", query_ids, shape=(batch,), dtypes=ids, like=query)
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"moca_fast.{OP}: reduction: expected one of {REDUCTIONS}, got {reduction!r}"
        )
    temperature = _temperature(temperature, query)
    return Inputs(query, document, target, temperature, hard_negatives, query_ids, document_ids)


def _ids_of(document_ids: Tensor, target: Tensor) -> Tensor:
    """The id of each query's positive. What a target outside of the documents means is left to the
    kernels: on a GPU, index_select would leave the process unable to use it."""
    if document_ids.shape[0] == 0:
        return torch.zeros_like(target)
    return document_ids.index_select(0, target.clamp(0, document_ids.shape[0] - 1))


def _temperature(temperature: float | Tensor, query: Tensor) -> Tensor:
    """() in the dtype that scores are accumulated in."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    if isinstance(temperature, Tensor):
        check_tensor(OP, "temperature", temperature, shape=(), dtypes=FLOATS, like=query)
        return temperature.to(dtype)
    check_real(OP, "temperature", temperature)
    _check_range(temperature, dtype)
    return torch.full((), temperature, dtype=dtype, device=query.device)


def _check_temperature(temperature: Tensor) -> None:
    """Of the kernels, which are given its value even where torch.compile traces the call."""
    if temperature.device.type == "cpu":
        check_real(OP, "temperature", temperature)
        _check_range(temperature.item(), temperature.dtype)


def _check_range(temperature: float, dtype: torch.dtype) -> None:
    """Below the smallest normal number, scores that are divided by it overflow."""
    least, most = torch.finfo(dtype).tiny, torch.finfo(dtype).max
    if not least <= temperature <= most:
        expected = f"{least:.2g} to {most:.2g}" if temperature > 0 else "a number above 0"
        raise ValueError(f"moca_fast.{OP}: temperature: expected {expected}, got {temperature!r}")


def _with_gradient(
    query: Tensor,
    document: Tensor,
    target: Tensor,
    temperature: Tensor,
    hard_negatives: Tensor | None,
    *ids: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """The inputs that receive gradients, in the order in which backends give those."""
    return query, document, hard_negatives, temperature


@operator("info_nce")
def _forward(
    query: Tensor,
    document: Tensor,
    target: Tensor,
    temperature: Tensor,
    hard_negatives: Tensor | None,
    query_ids: Tensor | None,
    document_ids: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Loss (B,), and logsumexp of the scores (B,) float64: in float32 its rounding would show in
    every probability that the backward makes of it."""
    tensors = (query, document, target, temperature, hard_negatives, query_ids, document_ids)
    _check_temperature(temperature)
    return _dispatch.select(OP, backend, *tensors).forward(*tensors)


@operator("info_nce_backward")
def _backward(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, document, hard_negatives and temperature; (0,) where not needed."""
    tensors = (query, document, target, temperature, hard_negatives, query_ids, document_ids)
    kernel = _dispatch.select(OP, backend, *tensors)
    return kernel.backward(d_loss, lse, needs, *tensors)


@operator("info_nce_with_gradients")
def _forward_with_gradients(
    query: Tensor,
    document: Tensor,
    target: Tensor,
    temperature: Tensor,
    hard_negatives: Tensor | None,
    query_ids: Tensor | None,
    document_ids: Tensor | None,
    backend: str,
    needs: list[bool],
    mean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Mean or sum of the loss (), and its gradients by query, document, hard_negatives and
    temperature; (0,) where not needed. The backward scales them where they lie.

    A backward that starts from the lse makes all scores again: four products in place of three.
    """
    tensors = (query, document, target, temperature, hard_negatives, query_ids, document_ids)
    _check_temperature(temperature)
    kernel = _dispatch.select(OP, backend, *tensors)
    return kernel.forward_with_gradients(needs, mean, *tensors)


@_forward.register_fake
def _(query, document, target, temperature, hard_negatives, query_ids, document_ids, backend):
    batch = query.shape[0]
    return temperature.new_empty((batch,)), query.new_empty((batch,), dtype=torch.float64)


@_backward.register_fake
def _(d_loss, lse, *rest):
    *tensors, needs, _backend = rest
    return empty_gradients(_with_gradient(*tensors), needs)


@_forward_with_gradients.register_fake
def _(*inputs):
    *tensors, _backend, needs, _mean = inputs
    wanted = _with_gradient(*tensors)
    return wanted[-1].new_empty(()), *empty_gradients(wanted, needs)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(output[1], *tensors)


def _autograd(ctx, d_loss, d_lse):
    needs = list(_with_gradient(*ctx.needs_input_grad))
    grads = torch.ops.moca_fast.info_nce_backward(d_loss, *ctx.saved_tensors, needs, ctx.backend)
    query, document, hard, temperature = (
        grad if need else None for grad, need in zip(grads, needs, strict=True)
    )
    return query, document, None, temperature, hard, None, None, None


def _keep_gradients(ctx, inputs, output):
    ctx.needs = inputs[-2]
    keep_gradients(ctx, inputs, output)


def _autograd_of_total(ctx, d_loss, *_):
    op = torch.ops.moca_fast.info_nce_with_gradients
    query, document, hard, temperature = scaled_gradients(ctx, op, d_loss, ctx.needs)
    return query, document, None, temperature, hard, *(None,) * 5


_forward.register_autograd(_autograd, setup_context=_setup_context)
_forward_with_gradients.register_autograd(_autograd_of_total, setup_context=_keep_gradients)
