"""Processes side by side, none of which may hold up or bring down the others."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from benchmarks.outcomes import RESTART

POLL_SECONDS = 0.1
RESTARTS = 20  # of one job


@dataclass
class Job:
    """A command.

    Args:
        environment: added to this process's own.
        resumes: goes on where it was when it is started again, and is, after a crash.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    resumes: bool = False


@dataclass
class Done:
    """How a job ended: its exit status, None if it ran out of time, and what it printed."""

    status: int | None
    output: str


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen
    output: IO[Any]
    restarts: int


def run(
    jobs: Sequence[Job], *, parallel: int, deadline: float, log: Path, folder: Path
) -> dict[str, Done]:
    """Run jobs, so many at a time, in `folder`.

    Args:
        deadline: seconds since 1970 when what still runs is killed, with its children.
        log: file to which the output of each is added.
    """
    waiting = deque((job, 0) for job in jobs)
    running: list[_Running] = []
    done: dict[str, Done] = {}
    try:
        while waiting or running:
            late = time.time() > deadline
            while waiting and len(running) < parallel and not late:
                running.append(_start(*waiting.popleft(), folder))
            for one in list(running):
                status = one.process.poll()
                if status is None and not late:
                    continue
                if status is None:
                    _kill(one.process)
                running.remove(one)
                done[one.job.name] = _finish(one, status, log)
                crashed = status is not None and (status < 0 or status == RESTART)
                if crashed and one.job.resumes and one.restarts < RESTARTS:
                    waiting.appendleft((one.job, one.restarts + 1))
            if late:
                done.update({job.name: Done(None, "") for job, _ in waiting})
                waiting.clear()
            time.sleep(POLL_SECONDS)
    finally:
        for one in running:
            _kill(one.process)
    return done


def _start(job: Job, restarts: int, folder: Path) -> _Running:
    output: IO[Any] = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
    process = subprocess.Popen(
        job.command, cwd=folder, env={**os.environ, **job.environment},
        stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    return _Running(job, process, output, restarts)


def _finish(one: _Running, status: int | None, log: Path) -> Done:
    one.output.seek(0)
    text = one.output.read()
    one.output.close()
    how = "ran out of time" if status is None else f"exit status {status}"
    with log.open("a", encoding="utf-8") as file:
        file.write(f"== {one.job.name}: {' '.join(one.job.command)}\n{text}\n== {how}\n\n")
    return Done(status, text)


def _kill(process: subprocess.Popen) -> None:
    """With all that it started: the process leads a session of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
