"""`python -m benchmarks.tune_attention`: the best tiles of attention's Triton kernels for this GPU.

Each kernel (forward, and the two of the backward: queries and keys) is timed with every variant of
a small grid of rows, columns, warps and stages, the other kernels left as the table in
kernels/moca_triton/attention.py has them. Variants are compiled by many processes first.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from moca_triton import attention as kernels
from moca_triton.attention import Blocks, Launch
from torch import Tensor

from benchmarks.bench_attention import DENSE, IMAGES, Attention, mix, moca
from benchmarks.clock import DeviceTime, ahead_of_gpu

KERNELS = ("forward", "queries", "keys")
ROUNDS = 9
MOST_COMPILERS = 12
GRID = {
    "cuda": list(itertools.product((64, 128), (32, 64, 128), (4, 8), (1, 2, 3))),
    "cpu": [(16, 16, 1, 1), (32, 16, 1, 1)],
}


def works(device: str) -> list[Attention]:
    """One for each head dim that matters; small enough to be timed often."""
    if device == "cpu":
        return [Attention(what="tiny", lengths=(20, 33), heads=2, dim=16, dtype="bfloat16")]
    text = replace(DENSE, what="CPT mix", lengths=mix(16, 200, 4000), kv_heads=2)
    small = replace(DENSE, what="32 documents of 1024", lengths=(1024,) * 32, dim=64)
    return [text, replace(IMAGES, what="32 images of 1024", lengths=(1024,) * 32), small]


def variants(device: str) -> Iterator[Blocks]:
    for rows, columns, warps, stages in GRID[device]:
        if rows * columns >= 32 * 32 * warps or device == "cpu":  # enough for all warps
            yield Blocks(rows, columns, warps, stages)


def with_blocks(kernel: str, blocks: Blocks, given: Callable[..., Launch]) -> Callable[..., Launch]:
    """The table `given`, with other blocks for one kernel."""
    return lambda *arguments: replace(given(*arguments), **{kernel: blocks})


def prepared(work: Attention, device: str, kernel: str) -> Callable[[], Sequence[Tensor]]:
    """A call that runs the kernel: the forward, or the backward."""
    forward = kernel == "forward"
    only = replace(work, forward=forward, backward=not forward)
    return moca(only, only.leaves(device), only.d_out(device), "triton").prepared(only).run


def compiled(work: Attention, device: str, kernel: str, blocks: Blocks) -> str:
    """Compile a variant into Triton's cache; returns why it cannot run, or nothing."""
    try:
        with patch.object(kernels, "launch", with_blocks(kernel, blocks, kernels.launch)):
            prepared(work, device, kernel)()
            if device == "cuda":
                torch.cuda.synchronize()
    except Exception as error:  # too much shared memory, registers, or a shape Triton refuses
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return ""


def seconds(run: Callable[[], object], device: str) -> float:
    """The median of several calls."""
    began = time.perf_counter()
    run()
    clock: Any = DeviceTime if device == "cuda" else time.perf_counter
    fill = ahead_of_gpu(time.perf_counter() - began) if device == "cuda" else (lambda: None)
    times = []
    for _ in range(ROUNDS):
        fill()
        start = clock()
        run()
        times.append(clock() - start)
    return sorted(times)[ROUNDS // 2]


def best(
    work: Attention, device: str, kernel: str, deadline: float, compilers: Any
) -> dict[str, Any]:
    """Every variant of a kernel that runs, the fastest first."""
    grid = list(variants(device))
    compile_one = partial(compiled, work, device, kernel)
    refused = list(compilers.map(compile_one, grid))
    usual, current = kernels.launch, in_table(work, device, kernel)
    run = prepared(work, device, kernel)
    right = [result.clone() for result in run()]
    refusals = {str(b): why for b, why in zip(grid, refused, strict=True) if why}
    tried: list[dict[str, Any]] = []
    for blocks, why in zip(grid, refused, strict=True):
        if why or time.time() > deadline:
            continue
        with patch.object(kernels, "launch", with_blocks(kernel, blocks, usual)):
            if not all(map(alike, run(), right)):
                refusals[str(blocks)] = "gives other results"
                continue
            taken = seconds(run, device)
        used = "in the table" if blocks == current else ""
        tiles = ", ".join(str(value) for value in asdict(blocks).values())
        tried.append({"tiles": tiles, "seconds": taken, "used": used})
    tried.sort(key=lambda trial: trial["seconds"])
    return {"kernel": kernel, "work": work.title, "tried": tried, "refused": refusals}


def alike(a: Tensor, b: Tensor) -> bool:
    """But for the order in which 16-bit numbers were added; NaN is like nothing."""
    return bool((a - b).abs().max() <= 0.02 * b.abs().max())


def in_table(work: Attention, device: str, kernel: str) -> Blocks | None:
    """What the table says for a work; None in the interpreter, which does not ask it."""
    found: list[Blocks] = []

    def asked(*arguments: Any) -> Launch:
        found.append(getattr(usual(*arguments), kernel))
        return usual(*arguments)

    usual = kernels.launch
    with patch.object(kernels, "launch", asked):
        prepared(work, device, kernel)()
    return found[-1] if found else None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune_attention")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="since 1970")
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    processes = min(MOST_COMPILERS, len(os.sched_getaffinity(0)))
    spawned = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, spawned) as compilers:
        for work, kernel in itertools.product(works(options.device), KERNELS):
            if time.time() > options.deadline:
                break
            results.append(best(work, options.device, kernel, options.deadline, compilers))
            options.output.write_text(json.dumps(results), encoding="utf-8")
            for trial in results[-1]["tried"][:3]:
                print(f"{work.title} {kernel}: {trial['tiles']}: {1e3 * trial['seconds']:.3f} ms")


if __name__ == "__main__":
    main()
