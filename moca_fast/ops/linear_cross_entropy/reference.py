"""linear_cross_entropy in eager torch: the specification. Holds the logits of CHUNK rows at a
time, and those of counted rows only."""

from collections.abc import Iterator

import torch
from torch import Tensor

from moca_fast._gradients import shares, total

CHUNK = 1024  # rows


def unsupported(*inputs: Tensor | None) -> str | None:
    return None


def forward(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    loss = hidden.new_zeros(labels.shape, dtype=_accumulator(hidden))
    lse = torch.zeros_like(loss, dtype=torch.float64)
    for rows in _chunks(counted_rows(labels, weight.shape[0], ignore_index)):
        logits = _logits(hidden[rows], weight, bias)
        own = logits.gather(1, labels[rows, None])[:, 0]
        peak = logits.amax(dim=1)
        log_sum = (logits - peak[:, None]).exp().sum(dim=1).log()
        loss[rows] = log_sum + (peak - own)
        lse[rows] = log_sum.double() + peak
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
    dtype = _accumulator(hidden)
    d_hidden = hidden.new_zeros(hidden.shape)
    d_weight = weight.new_zeros(weight.shape, dtype=dtype)
    d_bias = weight.new_zeros(weight.shape[0], dtype=dtype)
    for rows in _chunks(counted_rows(labels, weight.shape[0], ignore_index)):
        d_logits = (_logits(hidden[rows], weight, bias) - lse[rows, None]).exp().to(dtype)
        d_logits.scatter_add_(1, labels[rows, None], -torch.ones_like(d_logits[:, :1]))
        d_logits *= d_loss[rows, None]
        d_hidden[rows] = (d_logits @ weight.to(dtype)).to(hidden.dtype)
        d_weight += d_logits.mT @ hidden[rows].to(dtype)
        d_bias += d_logits.sum(dim=0)
    grads = (d_hidden, d_weight.to(weight.dtype), d_bias.to(weight.dtype))
    return tuple(
        grad if need else hidden.new_empty(0) for grad, need in zip(grads, needs, strict=True)
    )


def forward_with_gradients(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    needs: list[bool],
    mean: bool,
) -> tuple[Tensor, ...]:
    inputs = (hidden, weight, labels, bias, ignore_index)
    loss, lse = forward(*inputs)
    rows = int((labels != ignore_index).sum())
    return total(loss, rows, mean), *backward(shares(loss, rows, mean), lse, *inputs, needs)


def _chunks(rows: Tensor) -> Iterator[Tensor]:
    """CHUNK at a time; nothing where there are none, unlike Tensor.split."""
    return (rows[begin : begin + CHUNK] for begin in range(0, rows.shape[0], CHUNK))


def counted_rows(labels: Tensor, vocabulary: int, ignore_index: int) -> Tensor:
    """Indices of the rows that are not ignored; their labels are checked."""
    rows = (labels != ignore_index).nonzero()[:, 0]
    counted = labels[rows]
    wrong = rows[(counted < 0) | (counted >= vocabulary)].tolist()
    if wrong:
        raise IndexError(
            f"moca_fast.linear_cross_entropy: labels[{wrong[0]}]: expected 0 to {vocabulary - 1} "
            f"or {ignore_index} (ignored), got {int(labels[wrong[0]])}"
        )
    return rows


def _accumulator(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


def _logits(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = states.to(_accumulator(states)) @ weight.to(_accumulator(states)).mT
    return logits if bias is None else logits + bias
