"""Without a GPU, Triton kernels run in its interpreter. It is chosen when a kernel is defined, so
the choice stands before anything is imported. Without hypothesis, the tests that it feeds are
skipped, and the others of their modules run."""

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from unittest.mock import MagicMock

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


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
