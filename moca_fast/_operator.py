"""Operators of torch, as torch.library.custom_op makes them, for less time a call: most of a small
call is what torch does around the kernel.

What custom_op does besides, at every call, is left to the tests: it looks for outputs that are
inputs (torch.library.opcheck does), reads the schema again for arguments left out (no caller leaves
one out) and flattens lists of tensors (none here receives a gradient).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_LIBRARY = torch.library.Library("moca_fast", "FRAGMENT")


class Operator:
    """The operator moca_fast::<name>, whose kernel is a function of tensors, lists and numbers."""

    def __init__(self, name: str, kernel: Callable[..., Any], tags: Sequence[torch.Tag]) -> None:
        self._name = name
        schema = torch.library.infer_schema(kernel, mutates_args=())
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
        # What a kernel does is nothing that torch.compile could trace.
        _LIBRARY.impl(name, torch._disable_dynamo(kernel), "CompositeExplicitAutograd")
        _LIBRARY.impl(name, self._autograd, "Autograd", with_keyset=True)
        self._overload = getattr(torch.ops.moca_fast, name).default
        self.register_autograd(self._no_backward, setup_context=lambda ctx, inputs, output: None)

    def register_fake(self, fake: Callable[..., Any]) -> None:
        """`fake` makes outputs of the right shape, dtype and strides, unwritten."""
        torch.library.register_fake(f"moca_fast::{self._name}", fake, lib=_LIBRARY)

    def register_autograd(
        self, backward: Callable[..., tuple], *, setup_context: Callable[..., None]
    ) -> None:
        """As torch.library.register_autograd has it; the gradient of a list is None."""
        run = self._run

        class Differentiable(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *args):
                *inputs, keys = args
                output = run(keys, inputs)
                setup_context(ctx, inputs, output)
                return output

            @staticmethod
            def backward(ctx, *grads):
                return *backward(ctx, *grads), None

        self._differentiable = Differentiable

    def _autograd(self, keys, *inputs):
        if forward_ad._current_level >= 0 and any(map(_has_tangent, inputs)):
            raise RuntimeError(f"moca_fast.{self._name} has no forward-mode derivative")
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return self._differentiable.apply(*inputs, keys)
        return self._run(keys, inputs)

    def _run(self, keys, inputs):
        with torch._C._AutoDispatchBelowAutograd():
            return self._overload.redispatch(keys & torch._C._after_autograd_keyset, *inputs)

    def _no_backward(self, ctx, *grads):
        raise RuntimeError(f"moca_fast.{self._name} has no gradient")


def _has_tangent(value: object) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None


def operator(
    name: str, *, tags: Sequence[torch.Tag] = ()
) -> Callable[[Callable[..., Any]], Operator]:
    """Makes the decorated function the kernel of moca_fast::<name>."""
    return lambda kernel: Operator(name, kernel, tags)
