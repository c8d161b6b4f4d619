"""What the machine can do at best, measured in the same run as everything that is held to it."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch

from moca_fast import _C

REPEATS = 7
PEAK_STEPS = 4_000_000  # of 24 or 12 multiply-adds: some hundredths of a second
# Elements of the copied array and sides of the multiplied matrices, by device and size of the run.
# The array of a full run is far larger than any cache; on a GPU both take milliseconds, so that
# launching them does not count.
COPY_ELEMENTS = {
    "cpu": {"tiny": 1 << 22, "full": 1 << 26},
    "cuda": {"tiny": 1 << 22, "full": 1 << 30},
}
GEMM_SIDE = {"cpu": {"tiny": 256, "full": 2048}, "cuda": {"tiny": 256, "full": 8192}}


@dataclass(frozen=True)
class Limits:
    """Rates of one device at one number of threads, for numbers of one dtype, in 1e9 a second.

    Args:
        multiply_add: float32 operations that never leave registers; None on a GPU.
        dot_product: the same of the bfloat16 dot product; None where there is no such instruction.
        gemm: operations of torch's matrix product in the dtype.
        copy: bytes read plus bytes written by torch's copy of a large array.
        dtype: for which `peak` holds.
    """

    multiply_add: float | None
    dot_product: float | None
    gemm: float
    copy: float
    dtype: str

    @property
    def peak(self) -> float:
        """Most operations on numbers of the dtype: of the instruction, else of the GEMM."""
        if self.dtype == "bfloat16" and self.dot_product:
            return self.dot_product
        return self.multiply_add or self.gemm

    def attainable(self, flops: float, traffic: float) -> float:
        """The roofline: most operations a second for work of `flops` on `traffic` bytes."""
        return min(self.peak, flops / traffic * self.copy) if traffic else self.peak


def measure_limits(device: str, threads: int, size: str, dtype: str) -> Limits:
    """The limits with `torch.get_num_threads() == threads`; each is measured once a process."""
    return Limits(
        _instruction_rate(False, threads) if device == "cpu" else None,
        _instruction_rate(True, threads) if device == "cpu" else None,
        _gemm_rate(device, threads, GEMM_SIDE[device][size], dtype),
        _copy_rate(device, threads, COPY_ELEMENTS[device][size]),
        dtype,
    )


@cache
def _instruction_rate(bfloat16: bool, threads: int) -> float | None:
    work = partial(_C.peak, steps=PEAK_STEPS, bfloat16=bfloat16, threads=threads)
    flops = work()
    return flops / seconds(work, "cpu") / 1e9 if flops else None


@cache
def _gemm_rate(device: str, threads: int, side: int, dtype: str) -> float:
    matrix = torch.randn(side, side, device=device).to(getattr(torch, dtype))
    return 2 * side**3 / seconds(partial(torch.mm, matrix, matrix), device) / 1e9


@cache
def _copy_rate(device: str, threads: int, elements: int) -> float:
    source, target = torch.ones(2, elements, device=device)
    return 2 * source.nbytes / seconds(partial(target.copy_, source), device) / 1e9


def seconds(work: Callable[[], object], device: str) -> float:
    """The least time of several calls: a limit is what was possible once."""
    work()
    times = []
    for _ in range(REPEATS):
        wait(device)
        began = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - began)
    return min(times)


def wait(device: str) -> None:
    """Until the device has done all that it was given."""
    if device != "cpu":
        torch.cuda.synchronize()
