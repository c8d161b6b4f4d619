"""What ops share that make gradients in the forward, of the mean or sum that they return: where the
backward starts from that, they are done, and else it only scales them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

HELD_SCORES = 4 << 20  # so many float32 may be held on a CPU, in 16 MiB
PART_ROWS = 96  # of the largest part of the rows; smaller ones pack for more of the time
WHOLE_TILES = 12  # rows that every instruction set multiplies at once


def empty_gradients(tensors: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """What a backward gives, unwritten: contiguous tensors, (0,) where no gradient is needed."""
    like = tensors[0]
    assert like is not None
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        if need and tensor is not None
        else like.new_empty(0)
        for tensor, need in zip(tensors, needs, strict=True)
    )


def made_with_loss(tensor: Tensor, backend: str, held: int) -> bool:
    """Whether gradients are made along with the loss of `tensor`: by all but the CPU's kernels,
    and by those where the scores of `held` rows may be held at a time, and not of none.

    Never in float16: before the backward scales it, a gradient may be out of its range."""
    if tensor.dtype == torch.float16:
        return False
    return held > 0 or tensor.device.type != "cpu" or backend not in ("auto", "cpu")


def held_rows(rows: int, columns: int, dtype: torch.dtype) -> int:
    """Rows whose scores the CPU's kernels hold at a time to make gradients with the loss; 0 where
    they hold none, and make all scores again in the backward.

    Over parts of the rows, a tenth of them where that is enough for the products, float32 gradients
    of the columns are summed where they belong; other dtypes would need as much memory again.
    """
    if rows * columns <= HELD_SCORES:
        return max(rows, 1)
    if dtype != torch.float32:
        return 0
    tenth = rows // 10 // WHOLE_TILES * WHOLE_TILES
    return min(max(tenth, PART_ROWS // 2), PART_ROWS)


def total(loss: Tensor, rows: int, mean: bool) -> Tensor:
    """The sum of the losses (), or their mean over `rows` of them."""
    return loss.sum() / max(rows, 1) if mean else loss.sum()


def shares(loss: Tensor, rows: int, mean: bool) -> Tensor:
    """The gradient of `total` by each of the losses, in their shape."""
    return torch.full_like(loss, 1 / max(rows, 1) if mean else 1.0)


def keep_gradients(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    """Keeps output[1:], the gradients that an op has made of its loss, output[0]."""
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros as large as the gradients, for their own gradients
    ctx.gradients = output[1:]
    ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))
    ctx.settings = [None if isinstance(x, Tensor) else x for x in inputs]


def scaled_gradients(
    ctx: Any, op: Any, d_loss: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients that `op` made, times d_loss (), in their own memory; None where not needed.
    On a CPU, times 1 is no work.

    The first backward gives what was kept away, so another one (retain_graph) makes it again.

    As a number d_loss would be rounded to their dtype first on a GPU; as a tensor of one it is not.
    On a CPU neither is, and the tensor would cost a copy of the gradient in float32.
    """
    if d_loss is None:
        return (None,) * len(needs)
    if torch.is_grad_enabled():  # create_graph: what is below leaves no trace in a graph
        raise RuntimeError(f"moca_fast.{op.__name__} has no second gradient")
    gradients, ctx.gradients = ctx.gradients, None
    if gradients is None:
        saved = zip(ctx.saved_tensors, ctx.settings, strict=True)
        gradients = op(*(other if tensor is None else tensor for tensor, other in saved))[1:]
    # Of other tensors, as torch.compile traces with, no value is to be read.
    if d_loss.device.type == "cpu" and type(d_loss) is Tensor and d_loss.item() == 1:
        return tuple(grad if need else None for grad, need in zip(gradients, needs, strict=True))
    return tuple(
        torch.mul(
            grad,
            d_loss if grad.device.type == "cpu" else d_loss.expand([1] * grad.dim()),
            # While torch.compile traces, the op's outputs are not to be written.
            out=grad if type(grad) is Tensor else torch.empty_like(grad),
        )
        if need
        else None
        for grad, need in zip(gradients, needs, strict=True)
    )
