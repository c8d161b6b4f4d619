"""A pytest plugin whose results outlive the process: `-p benchmarks.outcomes --outcomes FILE`.

Each test leaves a line of JSON when it is collected, when it starts and when it ends. Called again
with the same file, pytest goes on behind the tests that have started: a kernel that took the
process or the GPU's context down, or never ended, costs its own result only.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

RESTART = 75  # exit status: the GPU takes no more work from this process
WAITING, STARTED, PASSED, FAILED, SKIPPED = "waiting", "started", "passed", "failed", "skipped"
OUT_OF_TIME = "out of time"
MOST_DETAIL = 6000  # characters of a traceback's end


@dataclass
class Outcome:
    """What became of a test.

    Args:
        id: its pytest id; of a file that cannot be imported, the file's.
        outcome: WAITING for one that was never come to, STARTED for one whose process did not
            survive it.
        message: why it failed or was skipped.
        detail: the end of the traceback.
        backend: of the kernels it tests, where the test says.
        case: of a benchmark: group, stats and extra_info, as pytest-benchmark saves them.
    """

    id: str
    outcome: str
    message: str = ""
    detail: str = ""
    seconds: float = 0.0
    backend: str = ""
    case: dict[str, Any] = field(default_factory=dict)


def read(path: Path) -> dict[str, Outcome]:
    """The last word on each test, in the order in which they started."""
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    return {outcome.id: outcome for outcome in (Outcome(**json.loads(line)) for line in lines)}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("outcomes")
    group.addoption("--outcomes", type=Path, help="file of results; tests in it are not run again")
    group.addoption("--shard", default="0/1", help="I/N: only every N-th test, from the I-th on")
    group.addoption("--deadline", type=float, help="seconds since 1970 when no more tests start")
    group.addoption(
        "--limit", type=float, default=0.0, help="seconds after which a test ends the process"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("outcomes"):
        config.pluginmanager.register(Recorder(config))


class Recorder:
    def __init__(self, config: pytest.Config) -> None:
        self.path: Path = config.getoption("outcomes")
        self.deadline: float | None = config.getoption("deadline")
        self.shard, self.shards = map(int, config.getoption("shard").split("/"))
        self.limit: float = config.getoption("limit")
        self.done = {name for name, one in read(self.path).items() if one.outcome != WAITING}
        self.failed = False

    def write(self, outcome: Outcome) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        shard = items[self.shard :: self.shards]
        items[:] = [item for item in shard if item.nodeid not in self.done]
        for item in items:
            self.write(Outcome(item.nodeid, WAITING, backend=backend_of(item)))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            text = str(report.longrepr).strip()
            cause = text.splitlines()[-1].removeprefix("E").strip() if text else "not collected"
            self.write(Outcome(report.nodeid, FAILED, cause, text[-MOST_DETAIL:]))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.write(Outcome(item.nodeid, STARTED, backend=backend_of(item)))
        # The alarm is not handled: Python could not, where it waits for a kernel.
        signal.setitimer(signal.ITIMER_REAL, self.limit)
        try:
            return (yield)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def pytest_runtest_setup(self) -> None:
        if self.deadline and time.time() > self.deadline:
            pytest.skip(OUT_OF_TIME)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Iterator[None]:
        report: Any = yield
        if report.when == "call" or not report.passed:
            message, detail = explained(report)
            self.write(
                Outcome(
                    item.nodeid,
                    report.outcome,
                    message,
                    detail,
                    report.duration,
                    backend_of(item),
                    measured(item) if report.passed else {},
                )
            )
            self.failed = report.failed
        return report

    def pytest_runtest_logfinish(self) -> None:
        if self.failed and context_is_lost():
            pytest.exit("the GPU takes no more work from this process", returncode=RESTART)
        self.failed = False


def explained(report: Any) -> tuple[str, str]:
    """Why a test failed or was skipped, in a line, and the end of its traceback."""
    if report.passed:
        return "", ""
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        return str(reason).removeprefix("Skipped: "), ""
    text = report.longreprtext.strip()
    crash = getattr(report.longrepr, "reprcrash", None)
    message = crash.message if crash else text
    message = (message.strip().splitlines() or ["failed"])[0]
    return message.removeprefix("Failed: "), text[-MOST_DETAIL:]


def backend_of(item: pytest.Item) -> str:
    """The `backend` that a test is parametrised with."""
    call = getattr(item, "callspec", None)
    backend = call.params.get("backend", "") if call else ""
    return backend if isinstance(backend, str) else ""


def measured(item: pytest.Item) -> dict[str, Any]:
    """A benchmark's numbers; empty for other tests."""
    benchmark = getattr(item, "funcargs", {}).get("benchmark")
    if benchmark is None or benchmark.stats is None:
        return {}
    stats = benchmark.stats.stats
    return {
        "group": benchmark.group,
        "fullname": item.nodeid,
        "stats": {"median": stats.median, "min": stats.min, "rounds": stats.rounds},
        "extra_info": dict(benchmark.extra_info),
    }


def context_is_lost() -> bool:
    """After an illegal access, everything on the GPU fails until the process ends."""
    import torch

    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
