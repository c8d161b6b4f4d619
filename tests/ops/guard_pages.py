"""A pytest plugin (`-p guard_pages`): every tensor that a kernel reads or writes lies between two
pages that may not be touched.

A kernel runs twice, once with each tensor up against the page after it and once against the page
before it, so that one byte too far on either side ends the process. Both runs must agree.
"""

import ctypes
import mmap

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moca_fast import _dispatch

PAGE = mmap.PAGESIZE
NO_ACCESS = 0
LIBC = ctypes.CDLL(None, use_errno=True)
FRESH = {"empty", "empty_like", "new_empty", "zeros", "zeros_like", "new_zeros"}


def guarded(x: Tensor, end: bool) -> Tensor:
    """A copy with the same strides, up against the page after it (`end`) or before it."""
    if x.numel() == 0 or x.device.type != "cpu":
        return x
    span = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    size = span * x.element_size()
    pages = -(-size // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (address, address + (pages + 1) * PAGE):
        if LIBC.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), NO_ACCESS):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = PAGE + (pages * PAGE - size if end else 0)
    flat = torch.frombuffer(memory, dtype=x.dtype, count=span, offset=offset)
    flat.copy_(x.detach().as_strided((span,), (1,)))
    return flat.as_strided(x.shape, x.stride())


class GuardFreshTensors(TorchDispatchMode):
    """Inside, tensors that are made for a kernel to write to lie between guard pages."""

    def __init__(self, end: bool) -> None:
        super().__init__()
        self.end = end

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return guarded(out, self.end) if func.overloadpacket.__name__ in FRESH else out


def run_guarded(function, inputs: tuple):
    """function(*inputs), each tensor of them and each that it makes between guard pages."""

    def place(value, end):
        if isinstance(value, Tensor):
            return guarded(value, end)
        return [place(v, end) for v in value] if isinstance(value, list) else value

    results = []
    for end in (True, False):
        placed = [place(value, end) for value in inputs]
        with GuardFreshTensors(end):
            results.append(function(*placed))
    first, second = (r if isinstance(r, tuple) else (r,) for r in results)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num()), "the result depends on addresses"
    return results[0]


@pytest.fixture(autouse=True)
def kernels_between_guard_pages(monkeypatch):
    run = _dispatch.Kernel._run

    def run_between(function, inputs):
        return run_guarded(lambda *placed: run(function, placed), inputs)

    monkeypatch.setattr(_dispatch.Kernel, "_run", staticmethod(run_between))
