"""linear_cross_entropy in Triton and cuBLAS: softmax_scores.py over the rows that count.

Those are gathered first, so what is ignored costs nothing. Their number sets the sizes of products,
so the host must know it: a forward waits for the device once, for it and for whether the labels are
right; the rest is queued.
"""

import torch
from torch import Tensor

from moca_triton import softmax_scores
from moca_triton.device import unsupported_tensors
from moca_triton.softmax_scores import Needs, Scores

# Several chunks need sums of d_weight in float32, 1.2 GiB read and written for each at 151,936
# words of 2048 dims. This holds 3,533 rows of such logits in one chunk, which needs none.
CHUNK_BYTES = 2 << 30


def unsupported(*inputs: Tensor | None) -> str | None:
    return unsupported_tensors(*inputs)


def forward(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    rows = _counted(labels, weight.shape[0], ignore_index)
    loss, lse = softmax_scores.forward(_scores(rows, hidden, weight, labels, bias))
    return _spread(loss, rows, labels), _spread(lse, rows, labels)


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
    rows = _counted(labels, weight.shape[0], ignore_index)
    scores = _scores(rows, hidden, weight, labels, bias)
    grads = softmax_scores.backward(scores, d_loss[rows], lse[rows], Needs(*needs))
    return _in_order(grads, rows, hidden)


def forward_with_gradients(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    needs: list[bool],
    mean: bool,
) -> tuple[Tensor, ...]:
    rows = _counted(labels, weight.shape[0], ignore_index)
    scores = _scores(rows, hidden, weight, labels, bias)
    loss, grads = softmax_scores.forward_with_gradients(scores, Needs(*needs), mean)
    return loss, *_in_order(grads, rows, hidden)


def _counted(labels: Tensor, vocabulary: int, ignore_index: int) -> Tensor:
    """Indices of the rows that are not ignored; their labels are checked."""
    counted = labels != ignore_index
    wrong = counted & ((labels < 0) | (labels >= vocabulary))
    count, wrong_count = torch.stack([counted.sum(), wrong.sum()]).tolist()
    if wrong_count:
        row = int(wrong.nonzero()[0])
        raise IndexError(
            f"moca_fast.linear_cross_entropy: labels[{row}]: expected 0 to {vocabulary - 1} or "
            f"{ignore_index} (ignored), got {int(labels[row])}"
        )
    return torch.nonzero_static(counted, size=count)[:, 0]


def _scores(
    rows: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None
) -> Scores:
    return Scores(
        x=hidden.index_select(0, rows),
        w=weight.contiguous(),
        target=labels.index_select(0, rows),
        bias=None if bias is None else bias.contiguous(),
        chunk_bytes=CHUNK_BYTES,
    )


def _spread(counted: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
    """What the rows that count have, and 0 for all other tokens."""
    every = counted.new_zeros((tokens.shape[0], *counted.shape[1:]))
    return every.index_copy_(0, rows, counted)


def _in_order(grads: softmax_scores.Gradients, rows: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
    """Gradients of hidden, weight and bias; (0,) where not needed."""
    d_hidden = None if grads.x is None else _spread(grads.x, rows, hidden)
    wanted = (d_hidden, grads.w, grads.bias)
    return tuple(hidden.new_empty(0) if grad is None else grad for grad in wanted)
