"""What ops share that make gradients in the forward: of a sum, so the backward only scales them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moca_fast import _memory


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


def made_with_loss(tensor: Tensor, backend: str, few: bool = False) -> bool:
    """Whether gradients are made along with the loss of `tensor`: by all but the CPU's kernels.

    Those hold so little at a time that they form scores twice, and to scale what was kept would
    only add a copy; where `few` scores are, and so held, they do as the others.
    """
    return few or tensor.device.type != "cpu" or backend not in ("auto", "cpu")


def keep_gradients(ctx: Any, output: Sequence[Tensor]) -> None:
    """Saves output[1:], the gradients that a forward has made of its loss, output[0]."""
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros as large as the gradients, for their own gradients
    ctx.save_for_backward(*output[1:])


def scaled_gradients(ctx: Any, d_loss: Tensor, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The saved gradients times d_loss (), None where not needed.

    As a number d_loss would be rounded to their dtype first on a GPU; as a tensor of one it is not.
    On a CPU neither is, and the tensor would cost a copy of the gradient in float32.
    """
    if d_loss is None:
        return (None,) * len(needs)
    return tuple(
        torch.mul(
            grad,
            d_loss if grad.device.type == "cpu" else d_loss.expand([1] * grad.dim()),
            out=_memory.empty_like(grad),
        )
        if need
        else None
        for grad, need in zip(ctx.saved_tensors, needs, strict=True)
    )
