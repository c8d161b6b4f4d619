"""Without a GPU, Triton kernels run in its interpreter. It is chosen when a kernel is defined, so
the choice stands before anything is imported. Without hypothesis, the tests that it feeds are
skipped, and the others of their modules run."""

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# Tests poison memory by asking for deterministic algorithms; up to torch 2.9, cuBLAS then wants it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def _skipping_hypothesis() -> ModuleType:
    module = ModuleType("hypothesis")
    module.__spec__ = ModuleSpec("hypothesis", None)  # others look for one
    skipped = pytest.mark.skip(reason="hypothesis is not installed")
    module.given = lambda *strategies, **named: skipped
    module.settings = lambda **options: lambda test: test
    module.strategies = MagicMock()
    return module


if importlib.util.find_spec("hypothesis") is None:
    sys.modules["hypothesis"] = _skipping_hypothesis()


def pytest_configure() -> None:
    """Refuses to test another build than the one that PYTHONPATH names."""
    spec = importlib.util.find_spec("moca_fast")
    for folder in map(Path, os.environ.get("PYTHONPATH", "").split(os.pathsep)):
        wanted = folder / "moca_fast" / "__init__.py"
        if wanted.is_file() and (spec is None or not wanted.samefile(spec.origin)):
            raise pytest.UsageError(f"expected to test {wanted}, found {spec and spec.origin}")
