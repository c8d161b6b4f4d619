"""What the tests of the build share: nvcc, if this machine has one, and setup.py's functions."""

import importlib.util
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def nvcc() -> str:
    fetched = ROOT / ".cache/nvcc/nvidia/cu13/bin/nvcc"  # make cuda does
    found = str(fetched) if fetched.exists() else shutil.which("nvcc")
    if not found:
        pytest.skip("no nvcc here; `make cuda` fetches one")
    return found


@pytest.fixture
def setup_py():
    spec = importlib.util.spec_from_file_location("moca_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
