"""What is measured, and the rule that a result is checked by before it gets a time.

A case is a *work* (what is computed) done by a *runner* (this package on one of its backends, or a
peer). Works of one group do the same, so that their times can be divided.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

# |got - exact| <= FACTOR * |plain torch in the same dtype - exact| + one rounding: the rule of the
# tests for us, more room for peers, whose accuracy is theirs to choose.
FACTOR, PEER_FACTOR = 2.0, 8.0
OURS = "moca_fast"
BEST = "best"  # as `Target.over`: the fastest of the peers


@dataclass(frozen=True)
class Cost:
    """What a work needs, whoever does it.

    Args:
        flops: operations that count; what a backward computes again does not, except in attention,
            where a backward is 2.5 forwards by convention (FlashAttention).
        traffic: bytes, if forward and backward each read their inputs and write their outputs once;
            0 where that says nothing.
        tokens: that a whole model takes in.
    """

    flops: float
    traffic: float
    tokens: int = 0


@dataclass(frozen=True)
class Target:
    """What a work is meant to reach.

    Args:
        speedup: times as fast as the peer named by `over`; None for no target.
        memory: most extra memory, as a fraction of `Work.avoided()`; None for no target.
        limit: least fraction of the machine's limit; None for no target.
        over: a peer, BEST, or "" for the op's yardstick.
        runner: whose target it is; "" for everyone of ours.
    """

    speedup: float | None = None
    memory: float | None = None
    limit: float | None = None
    over: str = ""
    runner: str = ""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is computed; subclasses add sizes.

    Args:
        dtype: of the inputs.
        forward, backward: which of them are in the time.
        targets: what it is meant to reach.
        threads: of the CPU; None for as many as torch uses.
        axis: the scaling plot it belongs to, as (what grows, its value).
    """

    dtype: str = "float32"
    forward: bool = True
    backward: bool = True
    targets: tuple[Target, ...] = ()
    threads: int | None = None
    axis: tuple[str, int] | None = None

    @property
    def title(self) -> str:
        """The sizes, as one reads them in a table."""
        raise NotImplementedError

    def cost(self) -> Cost:
        raise NotImplementedError

    def avoided(self) -> int:
        """Bytes of the array that is never held, and that a plain implementation makes; 0: none."""
        return 0

    def leaves(self, device: str) -> tuple[Tensor, ...]:
        """The inputs that receive gradients, seeded, in the layout and dtype of this package."""
        raise NotImplementedError

    def d_out(self, device: str) -> Tensor | tuple[Tensor, ...]:
        """The gradient that comes from above, of each result if there are several; of a loss, 1."""
        return torch.ones((), device=device)

    def plain(self, *leaves: Any, **_: Any) -> Tensor | tuple[Tensor, ...]:
        """The result in eager torch, in the dtype of the leaves; in float64 it is the oracle."""
        raise NotImplementedError

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def group(self) -> str:
        passes = "+".join(["fwd"] * self.forward + ["bwd"] * self.backward)
        threads = f" {self.threads} threads" if self.threads else ""
        return f"{self.title} {self.dtype} {passes}{threads}"

    def randn(self, *shape: int, device: str, seed: int = 0) -> Tensor:
        """Normal numbers, rounded to the dtype."""
        generator = torch.Generator(device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=device).to(self.torch_dtype)

    def checked(self, leaf: int | None, tensor: Tensor) -> Tensor:
        """The part that is checked of a leaf and its gradient, or of a result (`leaf` None): all,
        but where the oracle would take too long. What is left out of a leaf must have no part in
        what remains of the results.
        """
        return tensor

    def expected(self, device: str) -> list[Expected]:
        """What every runner must find: the result, then the gradient of each leaf."""
        leaves = [self.checked(place, leaf) for place, leaf in enumerate(self.leaves(device))]
        d_out = tuple(self.checked(None, d) for d in _several(self.d_out(device)))
        rough = Call(self.plain, leaves, d_out).prepared(self).run()
        double = [leaf.double() for leaf in leaves]
        exact = Call(self.plain, double, d_out).prepared(self).run()
        parts = [None] * len(d_out) + [*range(len(leaves))]
        return [
            Expected(e, largest_difference(r, e), partial(self.checked, part))
            for r, e, part in zip(rough, exact, parts[: len(exact)], strict=True)
        ]


@dataclass
class Expected:
    """A float64 result, how far plain torch in the dtype of the case is from it, and which part of
    a whole result it is."""

    exact: Tensor
    plain_error: float
    part: Callable[[Tensor], Tensor] = lambda tensor: tensor


@dataclass
class Call:
    """One way to do a work.

    Args:
        function: of the leaves, to one result or a tuple; what is timed, with its backward.
        leaves: the inputs that receive gradients, in the layout this way wants.
        d_out: gradient from above, in the layout of its result, for each if there are several.
        undo: brings the result, or the gradient of a leaf, into the layout of the work.
        info: what else is to be saved with the time.
    """

    function: Callable[..., Tensor | tuple[Tensor, ...]]
    leaves: Sequence[Tensor]
    d_out: Tensor | tuple[Tensor, ...]
    undo: Callable[[Tensor], Tensor] = lambda tensor: tensor
    info: dict[str, Any] = field(default_factory=dict)
    backward: bool = True
    kept: tuple[Tensor, ...] | None = None  # the results, where only their backward is wanted

    def prepared(self, work: Work) -> Call:
        """Ready to run the passes of the work."""
        self.backward = work.backward
        self.leaves = [leaf.detach().requires_grad_(work.backward) for leaf in self.leaves]
        self.kept = None if work.forward else _several(self.function(*self.leaves))
        return self

    def run(self) -> tuple[Tensor, ...]:
        """The results, and the gradients of all leaves if there is a backward."""
        kept = self.kept is not None
        out = self.kept if self.kept is not None else _several(self.function(*self.leaves))
        if not self.backward:
            return out
        d_out = [d.to(o.dtype) for d, o in zip(_several(self.d_out), out, strict=True)]
        gradients = torch.autograd.grad(out, self.leaves, d_out, retain_graph=kept)
        return (*(o.detach() for o in out), *gradients)

    def report(self) -> dict[str, Any]:
        """What else is to be saved with the time, found after it was taken."""
        return self.info


def _several(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


@dataclass(frozen=True)
class Runner:
    """Who does the work.

    Args:
        name: in tables: "moca_fast[cpu]", "torch", ...
        build: makes the call of a work out of (work, leaves, d_out).
        package: that an optional peer needs; it runs with --peers.
        devices: that it runs on.
        yardstick: the peer that targets speak of; one of each op.
        suits: whether it is for a work at all.
    """

    name: str
    build: Callable[[Any, tuple[Tensor, ...], Any], Call]
    package: str | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    yardstick: bool = False
    suits: Callable[[Any], bool] = lambda work: True

    @property
    def ours(self) -> bool:
        return self.name.startswith(OURS)


class WrongResult(AssertionError):
    """A case that computes something else; it gets no time."""


def largest_difference(got: Tensor, exact: Tensor) -> float:
    """max |got - exact| in float64, in slices: the arrays may be large."""
    if got.shape != exact.shape:
        raise WrongResult(f"shape {tuple(got.shape)} is not {tuple(exact.shape)}")
    rows = zip(got.reshape(-1).split(1 << 24), exact.reshape(-1).split(1 << 24), strict=True)
    differences = [float((a.double() - b).abs().max()) for a, b in rows if a.numel()]
    return math.nan if any(map(math.isnan, differences)) else max(differences, default=0.0)


def check(call: Call, expected: Sequence[Expected], dtype: torch.dtype, factor: float) -> float:
    """Raise WrongResult unless every result is as near to float64 as the rule asks.

    Returns:
        The largest error of all, as a fraction of the error that was allowed.
    """
    worst, results = 0.0, len(expected) - (len(call.leaves) if call.backward else 0)
    for place, (got, want) in enumerate(zip(call.run(), expected, strict=True)):
        name = f"gradient {place - results}" if place >= results else "result"
        error = largest_difference(want.part(call.undo(got)), want.exact)
        rounding = torch.finfo(dtype).eps * float(want.exact.abs().max())
        allowed = factor * want.plain_error + rounding
        if not error <= allowed:  # NaN is no answer either
            raise WrongResult(f"{name}: off by {error:.3e} from float64, allowed {allowed:.3e}")
        worst = max(worst, error / allowed if allowed else 0.0)
    return worst
