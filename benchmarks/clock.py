"""Time and memory on a GPU: its own clock, a cold cache, launches that do not count."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

FILL_BYTES = 1 << 29  # several times the largest L2 cache
FASTEST = 8e12  # bytes a second, more than any GPU writes: how short a fill may be
MOST_FILLS = 64


class DeviceTime:
    """A moment on a GPU's own clock: the difference of two waits for the later one."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: DeviceTime) -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def ahead_of_gpu(host_seconds: float) -> Callable[[], None]:
    """What is done before each round: the GPU fills an array that has nothing to do with the work.

    That empties its cache of the work's data, and lasts until the host has launched the call: its
    kernels stand in the queue when the clock starts, so the gaps between launches do not count.

    Args:
        host_seconds: that launching a call takes.
    """
    fills = min(MOST_FILLS, 1 + math.ceil(1.5 * host_seconds * FASTEST / FILL_BYTES))

    def fill() -> None:
        for _ in range(fills):
            _scratch().zero_()

    return fill


def release() -> None:
    """Give back memory that nobody uses: models hold themselves in cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@cache
def _scratch() -> Tensor:
    return torch.empty(FILL_BYTES, dtype=torch.uint8, device="cuda")
