"""No kernel touches a byte outside its tensors; `test_isa.py` runs this on every set there is."""

import signal
import subprocess
import sys
from pathlib import Path

import every_op
import pytest
import torch
from guard_pages import guarded, kernels_between_guard_pages  # noqa: F401
from numerics import DTYPES

from moca_fast import _dispatch


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", every_op.CALLS)
def test_odd_sizes(name, dtype):
    for result in every_op.run(name, dtype):
        assert result.isfinite().all()


def test_every_op_is_called():
    assert set(_dispatch.op_names()) <= set(every_op.CALLS)


@pytest.mark.parametrize(
    ("end", "first", "size", "died"),
    [
        (True, 0, 20, False),
        (True, 0, 21, True),
        (False, 0, 20, False),
        (False, -1, 1, True),
    ],
)
def test_one_byte_too_far_is_noticed(end, first, size, died):
    code = (
        "import ctypes, torch, guard_pages\n"
        f"x = guard_pages.guarded(torch.ones(5), {end})\n"
        f"ctypes.string_at(x.data_ptr() + {first}, {size})\n"
    )
    folder = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True)
    assert done.returncode == (-signal.SIGSEGV if died else 0), done.stderr


def test_strides_and_values_are_kept():
    for x in (torch.arange(24).reshape(2, 3, 4)[:, 1:, ::2], torch.ones(3, 1).expand(3, 5)):
        for end in (True, False):
            assert torch.equal(guarded(x, end), x) and guarded(x, end).stride() == x.stride()
