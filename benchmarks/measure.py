"""A case measured: checked first, then weighed, then timed."""

from __future__ import annotations

import ctypes
import math
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import moca_fast
from benchmarks.clock import ahead_of_gpu, release
from benchmarks.harness import FACTOR, PEER_FACTOR, Cost, Expected, Runner, Work, check
from benchmarks.limits import Limits, measure_limits, wait
from moca_fast import _C

ROUNDS = 7  # least; the median of an odd number is one of them
MAX_ROUNDS = 50
# Of timing that more than the least rounds are done for. GPU time is scarce, and steadier.
SECONDS = {"cpu": {"tiny": 0.0, "full": 1.5}, "cuda": {"tiny": 0.0, "full": 0.25}}
ROUND_SECONDS = {"tiny": 0.0, "full": 2e-3}  # a round that is shorter does several calls


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
