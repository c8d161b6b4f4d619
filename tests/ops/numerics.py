"""The numerics rule of every op, and what its tests share.

An op is held to plain torch code that shares nothing with it, run twice: in the dtype of the
inputs ("plain") and in float64 ("exact"). |got - exact| <= 2 |plain - exact| + one rounding, in
the largest norm, for the output and for every gradient.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("cpu", "reference")

# Where the kernels for GPUs are tested: without one, Triton's run in its interpreter on the CPU.
HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
GPU_BACKENDS = (
    pytest.param("triton", marks=pytest.mark.gpu),
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="no GPU here")]
    ),
)


def assert_close_to_exact(
    got: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype, name: str = "output"
) -> None:
    """The rule for one tensor: what the op gave, plain torch, float64; one rounding of `dtype`."""
    assert exact.dtype == torch.float64
    assert got.shape == exact.shape, f"{name}: {tuple(got.shape)} is not {tuple(exact.shape)}"
    if got.numel() == 0:
        return
    error = (got.double() - exact).abs().max()
    allowed = 2 * (plain.double() - exact).abs().max()
    allowed += torch.finfo(dtype).eps * exact.abs().max()
    assert error <= allowed, f"{name}: off by {error:.3e}, allowed {allowed:.3e}"  # NaN fails


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, fresh tensors hold NaN (the largest value for integers) until they are written."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def run(function: Callable, tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """The output of function(*tensors), and its gradients by those that are not None.

    The gradient that comes from above is 1 for a single number, else a ramp.
    """
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    above = torch.ones(()) if out.dim() == 0 else torch.linspace(-0.9, 1.1, out.numel())
    out.backward(above.reshape(out.shape).to(out.device, out.dtype))
    return [out.detach()] + [t.grad for t in leaves if t is not None]


def check(
    op: Callable, plain: Callable, tensors: Sequence[Tensor | None], dtype: torch.dtype
) -> None:
    """Hold op(*tensors) and its gradients to plain(*tensors) by the rule, inputs in `dtype`."""
    cast = [None if t is None else t.to(dtype) for t in tensors]
    double = [None if t is None else t.double() for t in cast]
    results = zip(run(op, cast), run(plain, cast), run(plain, double), strict=True)
    for place, (got, rough, exact) in enumerate(results):
        name = f"gradient {place - 1}" if place else "output"
        assert_close_to_exact(got, rough, exact, got.dtype, name)


def assert_same_bits_on_threads(function: Callable, tensors: Sequence[Tensor]) -> None:
    """Output and gradients are the same bits on every run and number of threads."""
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 1, 2, 5):
            torch.set_num_threads(count)
            results.append(run(function, tensors))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def added_peak_memory(prepare: str, work: str) -> float:
    """MiB by which `work` raises the peak of a fresh process that has run `prepare`."""
    script = f"""
import torch, moca_fast
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(x for x in lines if x.startswith("VmHWM")).split()[1]) / 1024
{prepare}
before = peak()
{work}
print(peak() - before)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout)
