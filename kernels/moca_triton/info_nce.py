"""info_nce in Triton and cuBLAS: softmax_scores.py with queries as rows, documents as columns and
hard negatives as columns of their own row.

The host waits for nothing, so a target that is no document makes its loss NaN and raises nothing.
"""

from typing import Any

from torch import Tensor

from moca_triton import softmax_scores
from moca_triton.device import unsupported_tensors
from moca_triton.softmax_scores import Needs, Scores

# Of 65,536 documents this holds 4096 rows, and the sums of d_document are added to 16 times; a
# larger buffer would save little of that.
CHUNK_BYTES = 1 << 30


def unsupported(*inputs: Tensor | None) -> str | None:
    return unsupported_tensors(*inputs)


def forward(*tensors: Any) -> tuple[Tensor, Tensor]:
    return softmax_scores.forward(_scores(*tensors))


def backward(d_loss: Tensor, lse: Tensor, needs: list[bool], *tensors: Any) -> tuple[Tensor, ...]:
    scores = _scores(*tensors)
    grads = softmax_scores.backward(scores, d_loss.contiguous(), lse, _needs(needs))
    return _in_order(grads, scores.x)


def forward_with_gradients(needs: list[bool], mean: bool, *tensors: Any) -> tuple[Tensor, ...]:
    scores = _scores(*tensors)
    loss, grads = softmax_scores.forward_with_gradients(scores, _needs(needs), mean)
    return loss, *_in_order(grads, scores.x)


def _scores(
    query: Tensor,
    document: Tensor,
    target: Tensor,
    temperature: Tensor,
    hard_negatives: Tensor | None,
    query_ids: Tensor | None,
    document_ids: Tensor | None,
) -> Scores:
    return Scores(
        x=query.contiguous(),
        w=document.contiguous(),
        target=target.contiguous(),
        own=None if hard_negatives is None else hard_negatives.contiguous(),
        temperature=temperature,
        row_ids=None if query_ids is None else query_ids.contiguous(),
        col_ids=None if document_ids is None else document_ids.contiguous(),
        chunk_bytes=CHUNK_BYTES,
    )


def _needs(needs: list[bool]) -> Needs:
    query, document, hard_negatives, temperature = needs
    return Needs(x=query, w=document, own=hard_negatives, temperature=temperature)


def _in_order(grads: softmax_scores.Gradients, like: Tensor) -> tuple[Tensor, ...]:
    """Gradients of query, document, hard negatives and temperature; (0,) where not needed."""
    wanted = (grads.x, grads.w, grads.own, grads.temperature)
    return tuple(like.new_empty(0) if grad is None else grad for grad in wanted)
