"""Cross entropy of a linear layer's output, without its logits (the idea of arXiv 2411.09009):
the loss of MoCa's masked-language-model head. Ignored rows are skipped, not multiplied.

T tokens, D dim, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from moca_fast import _dispatch
from moca_fast._checks import FLOATS, check_int, check_tensor
from moca_fast._gradients import (
    empty_gradients,
    held_rows,
    keep_gradients,
    made_with_loss,
    scaled_gradients,
)
from moca_fast._operator import operator

OP = "linear_cross_entropy"
REDUCTIONS = ("mean", "sum", "none")
# The host waits for the number of rows that count: torch.compile keeps it out of CUDA graphs.
TAGS = (torch.Tag.cudagraph_unsafe,)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Cross entropy of `hidden @ weight.T + bias` against labels; the T x V logits are never held,
    unless they are few.

    loss[t] = log(sum over v of exp(z[t, v])) - z[t, labels[t]], z[t, v] = hidden[t] . weight[v]
    + bias[v], accumulated in float32. A row whose label is `ignore_index` costs nothing, counts
    for nothing and gets zero gradient. On a GPU, in float32 on a CPU, and for at most 4 Mi logits
    there, but never in float16, a gradient that will be needed of a "mean" or "sum" is made along
    with the loss, of the same logits, and kept for the backward.

    Args:
        hidden: (T, D) float32, bfloat16, float16 or float64; receives a gradient. Under autocast,
            hidden, weight and bias are cast as torch.nn.functional.linear casts them.
        weight: (V, D) of the dtype of hidden; receives a gradient.
        labels: (T,) int64, 0 to V - 1 or `ignore_index`.
        bias: (V,) of the dtype of hidden, or None; receives a gradient.
        ignore_index: the label of rows that do not count.
        reduction: "mean" over the rows that count, "sum" or "none" (0 for ignored rows).
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        () or, with "none", (T,) float32 (float64 for float64 states). Where no row counts, the
        mean is 0 with zero gradient, not NaN.

    Raises:
        ValueError: shapes or devices that do not fit, an unknown reduction, or a backend that
            cannot run the call.
        TypeError: a wrong dtype, or not a tensor.
        IndexError: a label that is neither `ignore_index` nor in 0 to V - 1.
    """
    hidden, weight, labels, bias = inputs(
        hidden, weight, labels, bias=bias, ignore_index=ignore_index, reduction=reduction
    )
    backend = _dispatch.requested(backend)
    call = (hidden, weight, labels, bias, ignore_index, backend)
    needs = [t is not None and t.requires_grad for t in (hidden, weight, bias)]
    if reduction == "none":
        return torch.ops.moca_fast.linear_cross_entropy(*call)[0]
    held = held_rows(hidden.shape[0], weight.shape[0], hidden.dtype)
    if torch.is_grad_enabled() and any(needs) and made_with_loss(hidden, backend, held):
        mean = reduction == "mean"
        return torch.ops.moca_fast.linear_cross_entropy_with_gradients(*call, needs, mean)[0]
    loss = torch.ops.moca_fast.linear_cross_entropy(*call)[0].sum()
    return loss if reduction == "sum" else loss / (labels != ignore_index).sum().clamp(min=1)


def inputs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The checked tensors that backends are asked about, cast as autocast asks."""
    check_tensor(OP, "hidden", hidden, shape=("T", "D"), dtypes=FLOATS)
    hidden, weight, bias = _autocast(hidden), _autocast(weight), _autocast(bias)
    check_tensor(
        OP, "weight", weight, shape=("V", hidden.shape[1]), dtypes=(hidden.dtype,), like=hidden
    )
    check_tensor(OP, "labels", labels, shape=(hidden.shape[0],), dtypes=(torch.int64,), like=hidden)
    if bias is not None:
        check_tensor(
            OP, "bias", bias, shape=(weight.shape[0],), dtypes=(hidden.dtype,), like=hidden
        )
    check_int(OP, "ignore_index", ignore_index)
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"moca_fast.{OP}: reduction: expected one of {REDUCTIONS}, got {reduction!r}"
        )
    return hidden, weight, labels, bias


def _autocast(tensor: Any) -> Any:
    """The tensor in the dtype of an autocast region, if it stands in one; custom ops see none."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATS[:3]:
        return tensor
    device = tensor.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


@operator("linear_cross_entropy", tags=TAGS)
def _forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Loss (T,), and logsumexp of the logits (T,) float64, both 0 for ignored rows. In float32
    the rounding of the second would show in every probability that the backward makes of it."""
    kernel = _dispatch.select(OP, backend, hidden, weight, labels, bias)
    return kernel.forward(hidden, weight, labels, bias, ignore_index)


@operator("linear_cross_entropy_backward", tags=TAGS)
def _backward(
    d_loss: Tensor,
    lse: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; (0,) where not needed."""
    kernel = _dispatch.select(OP, backend, hidden, weight, labels, bias)
    return kernel.backward(d_loss, lse, hidden, weight, labels, bias, ignore_index, needs)


@operator("linear_cross_entropy_with_gradients", tags=TAGS)
def _forward_with_gradients(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    backend: str,
    needs: list[bool],
    mean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean over the counted rows or sum of the loss (), and its gradients by hidden, weight and
    bias; (0,) where not needed. The backward scales them where they lie.

    A backward that starts from the lse makes all logits again: four products in place of three.
    """
    kernel = _dispatch.select(OP, backend, hidden, weight, labels, bias)
    return kernel.forward_with_gradients(hidden, weight, labels, bias, ignore_index, needs, mean)


@_forward.register_fake
def _(hidden, weight, labels, bias, ignore_index, backend):
    tokens = hidden.shape[:1]
    return (
        hidden.new_empty(tokens, dtype=torch.promote_types(hidden.dtype, torch.float32)),
        hidden.new_empty(tokens, dtype=torch.float64),
    )


@_backward.register_fake
def _(d_loss, lse, hidden, weight, labels, bias, ignore_index, needs, backend):
    return empty_gradients((hidden, weight, bias), needs)


@_forward_with_gradients.register_fake
def _(hidden, weight, labels, bias, ignore_index, backend, needs, mean):
    loss = hidden.new_empty((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    return loss, *empty_gradients((hidden, weight, bias), needs)


def _setup_context(ctx, inputs, output):
    hidden, weight, labels, bias, ctx.ignore_index, ctx.backend = inputs
    ctx.save_for_backward(output[1], hidden, weight, labels, bias)


def _autograd(ctx, d_loss, d_lse):
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    grads = torch.ops.moca_fast.linear_cross_entropy_backward(
        d_loss, *ctx.saved_tensors, ctx.ignore_index, needs, ctx.backend
    )
    hidden, weight, bias = (g if need else None for g, need in zip(grads, needs, strict=True))
    return hidden, weight, None, bias, None, None


def _keep_gradients(ctx, inputs, output):
    ctx.needs = inputs[-2]
    keep_gradients(ctx, inputs, output)


def _autograd_of_total(ctx, d_loss, *_):
    op = torch.ops.moca_fast.linear_cross_entropy_with_gradients
    hidden, weight, bias = scaled_gradients(ctx, op, d_loss, ctx.needs)
    return hidden, weight, None, bias, *(None,) * 4


_forward.register_autograd(_autograd, setup_context=_setup_context)
_forward_with_gradients.register_autograd(_autograd_of_total, setup_context=_keep_gradients)
