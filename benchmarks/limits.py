"""What the machine can do at best, measured in the same run as everything that is held to it."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch

from moca_fast import _C

REPEATS = 7
PEAK_STEPS = 4_000_000  # of 24 or 12 multiply-adds: some hundredths of a second
# Elements of the copied array and sides of the multiplied matrices, by size of the run. The array
# of a full run is far larger than any cache.
COPY_ELEMENTS = {"tiny": 1 << 22, "full": 1 << 26}
GEMM_SIDE = {"tiny": 256, "full": 2048}
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Limits:
    """Rates of one device at one number of threads, in 1e9 a second.

    Args:
        multiply_add: float32 operations that never leave registers; None on a GPU.
        dot_product: the same of the bfloat16 dot product; None where there is no such instruction.
        gemm: operations of torch's matrix product, by dtype.
        copy: bytes read plus bytes written by torch's copy of a large array.
    """

    multiply_add: float | None
    dot_product: float | None
    gemm: dict[str, float]
    copy: float

    def peak(self, dtype: str) -> float:
        """Most operations on numbers of `dtype`: that of the instruction, else of the GEMM."""
        if dtype == "bfloat16" and self.dot_product:
            return self.dot_product
        return self.multiply_add or self.gemm[dtype]

    def attainable(self, dtype: str, flops: float, traffic: float) -> float:
        """The roofline: most operations a second for work of `flops` on `traffic` bytes."""
        peak = self.peak(dtype)
        return min(peak, flops / traffic * self.copy) if traffic else peak


@cache
def measure_limits(device: str, threads: int, size: str) -> Limits:
    """The limits with `torch.get_num_threads() == threads`; measured once a process."""
    side, elements = GEMM_SIDE[size], COPY_ELEMENTS[size]
    gemm = {}
    for dtype in DTYPES:
        matrix = torch.randn(side, side, device=device).to(getattr(torch, dtype))
        gemm[dtype] = 2 * side**3 / seconds(partial(torch.mm, matrix, matrix), device) / 1e9
    source, target = (torch.ones(elements, device=device) for _ in "ab")
    copy = 2 * source.nbytes / seconds(lambda: target.copy_(source), device) / 1e9
    if device != "cpu":
        return Limits(None, None, gemm, copy)
    return Limits(_instruction_rate(False, threads), _instruction_rate(True, threads), gemm, copy)


def _instruction_rate(bfloat16: bool, threads: int) -> float | None:
    def work() -> float:
        return _C.peak(steps=PEAK_STEPS, bfloat16=bfloat16, threads=threads)

    flops = work()
    return flops / seconds(work, "cpu") / 1e9 if flops else None


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
