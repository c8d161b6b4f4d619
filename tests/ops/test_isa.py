"""The tests marked `kernel` once more on every instruction set this processor runs, with every
tensor between guard pages."""

import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from moca_fast import _C

FOLDER = Path(__file__).parent
ISAS = _C.build_info()["cpu_isas"].split(",")


def run_python(isa: str, *arguments: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "MOCA_CPU_ISA": isa, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
    )


def run_kernels(isa: str) -> subprocess.CompletedProcess | None:
    """The tests' own run; None if the processor does not have this instruction set."""
    probe = run_python(isa, "-c", "from moca_fast import _C; print(_C.cpu_isa())")
    if "does not run" in probe.stderr:
        return None
    assert probe.stdout.strip() == isa, probe.stderr
    picked = ["-m", "kernel", "-k", "not reference", "-p", "guard_pages", "-p", "no:cacheprovider"]
    return run_python(isa, "-m", "pytest", "-q", *picked, str(FOLDER))


@pytest.fixture(scope="module")
def runs():
    """A run for each instruction set: each has one thread, so a core each at a time."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {isa: pool.submit(run_kernels, isa) for isa in ISAS}


@pytest.mark.parametrize("isa", ISAS)
def test_kernels_on(isa, runs: dict[str, Future]):
    done = runs[isa].result()
    if done is None:
        pytest.skip(f"this processor does not run {isa}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_unknown_set_is_refused():
    done = run_python("sse9", "-c", "from moca_fast import _C; _C.cpu_isa()")
    assert done.returncode != 0 and "expected one of" in done.stderr and "sse9" in done.stderr
