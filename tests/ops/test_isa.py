"""The float64 tests of the ops once more on every instruction set this processor runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moca_fast import _C

OPS = ("info_nce", "linear_cross_entropy", "masked_patch_mse", "patchify", "pool")
ISAS = [name for name in _C.build_info()["cpu_isas"].split(",") if name != _C.cpu_isa()]


def run_python(isa: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "MOCA_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("isa", ISAS)
def test_exact_on(isa):
    probe = run_python(isa, "-c", "from moca_fast import _C; print(_C.cpu_isa())")
    if "does not run" in probe.stderr:
        pytest.skip(f"this processor does not run {isa}")
    assert probe.stdout.strip() == isa, probe.stderr
    files = [str(Path(__file__).with_name(f"test_{op}.py")) for op in OPS]
    picked = "exact and not reference or bits"
    done = run_python(isa, "-m", "pytest", "-q", "-k", picked, "-p", "no:cacheprovider", *files)
    assert done.returncode == 0, done.stdout[-3000:]


def test_unknown_set_is_refused():
    done = run_python("sse9", "-c", "from moca_fast import _C; _C.cpu_isa()")
    assert done.returncode != 0 and "expected one of" in done.stderr and "sse9" in done.stderr
