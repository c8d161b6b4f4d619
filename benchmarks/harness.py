"""How a case is measured: first checked against float64, then weighed, then timed.

A case is a *work* (what is computed) done by a *runner* (this package on one of its backends, or a
peer). Works of one group do the same, so that their times can be divided.
"""

from __future__ import annotations

import ctypes
import math
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import moca_fast
from benchmarks.clock import ahead_of_gpu, release
from benchmarks.limits import Limits, measure_limits, wait
from moca_fast import _C

ROUNDS = 7  # least; the median of an odd number is one of them
MAX_ROUNDS = 50
# Of timing that more than the least rounds are done for. GPU time is scarce, and steadier.
SECONDS = {"cpu": {"tiny": 0.0, "full": 1.5}, "cuda": {"tiny": 0.0, "full": 0.25}}
ROUND_SECONDS = {"tiny": 0.0, "full": 2e-3}  # a round that is shorter does several calls
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


def extra_memory(run: Callable[[], Sequence[Tensor]], device: str) -> tuple[int, int]:
    """Bytes at the peak of one call beyond what was there before: (all, without its results).

    On a CPU it is the kernel's own high-water mark of resident memory, set back just before, after
    everything the allocator holds without need has been given back to the system. What a library
    keeps for ever after its first call is not seen.
    """
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = run()
        added = torch.cuda.max_memory_allocated() - before
    else:
        moca_fast.empty_cache()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS
        before = _resident("VmRSS")
        results = run()
        added = max(0, _resident("VmHWM") - before)
    return added, max(0, added - sum(result.nbytes for result in results))


def _resident(entry: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(entry)).split()[1]) * 1024


@contextmanager
def threads_of(work: Work) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(work.threads or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


@lru_cache(maxsize=1)  # of the group at hand: these arrays are large
def _problem(work: Work, device: str) -> tuple[tuple[Tensor, ...], Any, list[Expected]]:
    return work.leaves(device), work.d_out(device), work.expected(device)


_at_hand: list[tuple[Work, str]] = []


def problem(work: Work, device: str) -> tuple[tuple[Tensor, ...], Any, list[Expected]]:
    """(leaves, d_out, expected); those of the work before are given up first."""
    if _at_hand != [(work, device)]:
        _problem.cache_clear()
        _at_hand[:] = [(work, device)]
    release()
    return _problem(work, device)


def measure(benchmark: Any, work: Work, runner: Runner, device: str, size: str) -> None:
    """Check, weigh and time one case; everything found goes into `benchmark.extra_info`."""
    leaves, d_out, expected = problem(work, device)
    call = runner.build(work, leaves, d_out).prepared(work)
    factor = FACTOR if runner.ours else PEER_FACTOR
    with threads_of(work) as threads:
        error = check(call, expected, work.torch_dtype, factor)
        memory = extra_memory(call.run, device)
        median = time_call(benchmark, work.group, call.run, device, size)
        limits = measure_limits(device, threads, size, work.dtype)
    benchmark.extra_info.update(
        error_of_allowed=error,
        extra_bytes=memory[1],
        peak_bytes=memory[0],
        **call.report(),
        **describe(work, runner, device, threads),
    )
    if median:
        benchmark.extra_info.update(rates(work.cost(), median, limits))


def time_call(
    benchmark: Any, group: str, run: Callable[[], object], device: str, size: str
) -> float | None:
    """The median time of a call in seconds; None with --benchmark-disable.

    `extra_info` learns what share of the processors' time the operating system took, most of which
    goes into clearing the pages of fresh memory.
    """
    benchmark.group = group
    began = time.perf_counter()
    run()
    launched = time.perf_counter() - began
    wait(device)
    once = time.perf_counter() - began
    # A GPU's clock sees a single call; a CPU's would not.
    iterations = max(1, math.ceil(ROUND_SECONDS[size] / once)) if device == "cpu" else 1
    rounds = math.ceil(SECONDS[device][size] / (once * iterations))
    before = resource.getrusage(resource.RUSAGE_SELF)
    benchmark.pedantic(
        run,
        setup=None if device == "cpu" else ahead_of_gpu(launched),
        rounds=min(max(rounds, ROUNDS), MAX_ROUNDS),
        iterations=iterations,
        warmup_rounds=1,
    )
    after = resource.getrusage(resource.RUSAGE_SELF)
    system = after.ru_stime - before.ru_stime
    total = system + after.ru_utime - before.ru_utime
    benchmark.extra_info["system_share"] = system / total if total else 0.0
    return benchmark.stats.stats.median if benchmark.stats else None


def describe(work: Work, runner: Runner, device: str, threads: int) -> dict[str, Any]:
    return {
        "runner": runner.name,
        "ours": runner.ours,
        "yardstick": runner.yardstick,
        "title": work.title,
        "dtype": work.dtype,
        "forward": work.forward,
        "backward": work.backward,
        "targets": [asdict(t) for t in work.targets if t.runner in ("", runner.name)],
        "avoided_bytes": work.avoided(),
        "axis": work.axis,
        "device": device,
        "threads": threads,
        "isa": _C.cpu_isa(),
    }


def rates(cost: Cost, median: float, limits: Limits) -> dict[str, float | None]:
    """Rates in 1e9 a second, and the machine's own beside them."""
    gflops = cost.flops / median / 1e9
    attainable = limits.attainable(cost.flops, cost.traffic)
    return {
        "flops": cost.flops,
        "traffic": cost.traffic,
        "gflops": gflops,
        "gbytes": cost.traffic / median / 1e9,
        "tokens_per_second": cost.tokens / median or None,
        "limit_multiply_add": limits.multiply_add,
        "limit_dot_product": limits.dot_product,
        "limit_peak": limits.peak,
        "limit_gemm": limits.gemm,
        "limit_copy": limits.copy,
        "limit_roofline": attainable,
        "fraction_of_limit": gflops / attainable,
    }
