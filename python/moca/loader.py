"""Batches that other processes prepare while this one trains."""

from __future__ import annotations

import atexit
import signal
from collections.abc import Iterator
from functools import partial
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from typing import Any

from torch.utils.data import DataLoader, Dataset

PATIENCE = 600  # seconds that processes may take to prepare a batch


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
