"""The tests marked `kernel` once more on every instruction set this processor runs, with every
tensor between guard pages."""

import os
import subprocess
import sys
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


@pytest.mark.parametrize("isa", ISAS)
def test_kernels_on(isa):
    probe = run_python(isa, "-c", "from moca_fast import _C; print(_C.cpu_isa())")
    if "does not run" in probe.stderr:
        pytest.skip(f"this processor does not run {isa}")
    assert probe.stdout.strip() == isa, probe.stderr
    picked = ["-m", "kernel", "-k", "not reference", "-p", "guard_pages", "-p", "no:cacheprovider"]
    done = run_python(isa, "-m", "pytest", "-q", *picked, str(FOLDER))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_unknown_set_is_refused():
    done = run_python("sse9", "-c", "from moca_fast import _C; _C.cpu_isa()")
    assert done.returncode != 0 and "expected one of" in done.stderr and "sse9" in done.stderr
