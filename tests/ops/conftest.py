"""Every test of the ops runs seeded, in memory that is poisoned: what a kernel leaves unwritten
reads as NaN."""

import re

import numerics
import pytest
import torch

REFUSAL = re.compile(r"backend 'cuda' cannot run this call: (.*?)(?:; backend 'auto' would|$)")
DTYPE_REFUSAL = re.compile(r"(?:dtype )?(\w+) has no CUDA kernel")


@pytest.fixture(autouse=True)
def poisoned_and_seeded():
    torch.manual_seed(0)
    with numerics.poisoned_memory():
        assert torch.empty(3).isnan().all()
        yield


@pytest.fixture(params=["scores held", "parts held", "scores made again"])
def scores(request, monkeypatch):
    """The ways to a gradient on a CPU: which of them is taken depends on the shape."""
    if request.param == "parts held":
        monkeypatch.setattr("moca_fast._gradients.HELD_SCORES", 0)
        monkeypatch.setattr("moca_fast._gradients.PART_ROWS", 7)
    elif request.param == "scores made again":
        for op in ("info_nce", "linear_cross_entropy"):
            monkeypatch.setattr(f"moca_fast.ops.{op}.op.held_rows", lambda *_: 0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """On a GPU, a test of the CUDA kernels is skipped, with the reason, where they do not take the
    call: Triton's have to cover every op and dtype, these need not. But a dtype that is no
    parameter of the test is the test's own choice, and the wrong one."""
    try:
        return (yield)
    except ValueError as error:
        refusal = REFUSAL.search(str(error))
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if not refusal or parameters.get("backend") != "cuda":
            raise
        dtype = DTYPE_REFUSAL.match(refusal[1])
        if dtype and getattr(torch, dtype[1]) not in parameters.values():
            raise
        pytest.skip(refusal[1])
