"""The processes of a run: those that train together, those that prepare batches for one, and what
stops them."""

from __future__ import annotations

import atexit
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch.utils.data import DataLoader, Dataset

from moca.config import RunConfig
from moca.model import resolve_precision

ECHO = 1.0  # seconds in which another signal to stop is the same one
PATIENCE = 600  # seconds that processes may take to prepare a batch


def make_accelerator(config: RunConfig) -> Accelerator:
    """The processes of this run, in the precision asked for."""
    # A batch without images leaves the vision tower without gradients on some ranks.
    ddp = DistributedDataParallelKwargs(find_unused_parameters=True)
    precision = resolve_precision(config.precision)
    mixed = {"fp32": "no", "bf16": "bf16"}[precision]
    # Said outright, because without it processes on a machine of CPUs would not find each other.
    cpu = not torch.accelerator.is_available()
    return Accelerator(mixed_precision=mixed, cpu=cpu, kwargs_handlers=[ddp])


@contextmanager
def stop_signal() -> Iterator[list[float]]:
    """When SIGINT or SIGTERM came: a list, empty before. One more stops at once, but not within
    `ECHO` seconds: who starts processes may send both."""
    received: list[float] = []

    def on_signal(number: int, frame: Any) -> None:
        if received and time.monotonic() - received[0] > ECHO:
            raise KeyboardInterrupt
        if not received:
            print("\nstopping after this step; once more to stop at once", file=sys.stderr)
        received.append(time.monotonic())

    numbers = (signal.SIGINT, signal.SIGTERM)
    try:
        previous = {number: signal.signal(number, on_signal) for number in numbers}
    except ValueError:  # not the main thread: signals go to the program around us
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def leave_process_group() -> None:
    """What a process of several does last: no run can follow in it."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def peak_memory(device: torch.device) -> float:
    """Largest memory so far, GiB: of the GPU in use, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def load_batches(batches: Dataset, numbers: range, workers: int) -> Iterator[Any]:
    """The batches of these numbers, prepared by so many processes (0: by this one).

    Raises:
        RuntimeError: none came in `PATIENCE` seconds. A process that finds no shared memory says so
            and loses its batch, for which torch would wait for ever.
    """
    loader = DataLoader(
        batches, None, sampler=numbers, num_workers=workers, worker_init_fn=_ignore_signals,
        timeout=PATIENCE if workers else 0,
    )  # fmt: skip
    others = set(active_children())
    iterator = iter(loader)
    end = partial(_kill, set(active_children()) - others)
    atexit.register(end)  # at exit, multiprocessing waits for them: they ignore that it says so
    try:
        yield from iterator
    except RuntimeError as error:
        if "timed out" not in str(error):
            raise
        raise RuntimeError(
            f"no batch came in {PATIENCE} seconds from the {workers} processes that prepare them: "
            "they need shared memory (/dev/shm), or more time; workers=0 needs neither"
        ) from error
    finally:
        atexit.unregister(end)


def _kill(processes: set[BaseProcess]) -> None:
    for process in processes:
        process.kill()


def _ignore_signals(worker: int) -> None:
    """Ctrl-C reaches every process; only the run answers it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
