"""What the native kernels of attention do differently from one another: instruction sets, the
exponential, documents longer than a block of keys, and what is hidden inside a block."""

import math
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from numerics import DTYPES, assert_close_to_exact
from test_attention import NAMES, check, cu, grads, make, plain

import moca_fast
from moca_fast import SpanMask, attention
from moca_fast.ops.attention.op import plan


def check_exp(dtype: torch.dtype, rounding: float) -> None:
    """Two keys of scores x and 0: the first has weight exp(x) / (1 + exp(x)), for all x."""
    x = torch.linspace(-87, 87, 40001).to(dtype).unique()
    q, k = torch.zeros(len(x), 1, 16, dtype=dtype), torch.zeros(2, 1, 16, dtype=dtype)
    q[:, 0, 0], k[0, 0, 0] = x, 1
    mask = SpanMask(torch.zeros(len(x)).int(), torch.full((len(x),), 2).int(), 2)
    out, lse = attention(q, k, k, mask, softmax_scale=1.0, return_lse=True, backend="cpu")
    want = x.double().sigmoid()
    assert ((out[:, 0, 0].double() - want).abs() <= rounding * want).all()
    exact = torch.nn.functional.softplus(x.double(), threshold=100)
    assert ((lse[:, 0] - exact).abs() <= 2.0**-17 + 2.0**-23 * exact).all()
    q[:, 0, 0] = torch.linspace(-2000, -88, len(x)).to(dtype)
    assert not attention(q, k, k, mask, softmax_scale=1.0, backend="cpu").any()


@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 2.0**-21), (torch.bfloat16, 2.0**-7)])
def test_exp_over_the_whole_range(dtype, rounding):
    """Four roundings for the exponential, the sum, its reciprocal and the result."""
    check_exp(dtype, rounding)


def check_log(dtype: torch.dtype) -> None:
    """Row n of a causal document whose scores are all 0 has lse log(n), in two floats."""
    size = 3000
    zeros = torch.zeros(size, 1, 8, dtype=dtype)
    spans = plan(SpanMask.causal(cu(size)))
    _, lse, rest = torch.ops.moca_fast.attention(zeros, zeros, zeros, spans, 1.0, "cpu")
    exact = torch.arange(1, size + 1).double().log()
    assert lse[0] == 0
    assert ((lse.double() + rest.double()).flatten() - exact).abs().max() <= 2.0**-35
    assert (lse.flatten() - exact).abs().max() <= 2.0**-24 * exact.max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_over_many_octaves(dtype):
    check_log(dtype)


def test_long_documents_in_parts():
    """Documents of several blocks of keys, alone so that threads share them, for any mask."""
    lengths = cu(700, 1, 300)
    for mask in (SpanMask.full(lengths), SpanMask.causal(lengths), SpanMask.window(lengths, 90, 9)):
        inputs = make(mask, 2, 1, 32, torch.float32)
        run = partial(grads, lambda *x, m=mask: plain(*x, m, 32**-0.5))
        usual, exact = run(inputs), run([x.double() for x in inputs])
        before = torch.get_num_threads()
        try:
            for threads in (1, 4):
                torch.set_num_threads(threads)
                got = grads(lambda *x, m=mask: attention(*x, m, return_lse=True), inputs)
                again = grads(lambda *x, m=mask: attention(*x, m, return_lse=True), inputs)
                assert all(map(torch.equal, got, again))
                for name, *values in zip(NAMES, got, usual, exact, strict=True):
                    assert_close_to_exact(*values, torch.float32, name)
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("rise", [-40.0, 3.0, 40.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_that_rise_from_block_to_block(dtype, rise):
    """A peak follows the largest score of a block of keys only if that is well above it."""
    mask = SpanMask.full(cu(1200))
    inputs = make(mask, 1, 1, 16, dtype)
    with torch.no_grad():
        inputs[0][..., 0], inputs[1][..., 0] = 1.0, rise * (torch.arange(1200) // 128)[:, None]
    run = partial(grads, lambda *x: plain(*x, mask, 1.0))
    usual, exact = run(inputs), run([x.double() for x in inputs])
    got = grads(lambda *x: attention(*x, mask, softmax_scale=1.0, return_lse=True), inputs)
    for name, *values in zip(NAMES, got, usual, exact, strict=True):
        assert_close_to_exact(*values, dtype, name)


def test_hidden_nan_does_not_reach_gradients():
    """Keys that hold NaN or infinity leave the gradients of rows that cannot see them alone."""
    mask = SpanMask.window(cu(50), 7, 0)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make(mask, 2, 1, 16, dtype)
        clean = grads(lambda *x: attention(*x, mask, return_lse=True, backend="cpu"), inputs)
        for spoiled in range(4):
            bad = [x.clone() for x in inputs]
            bad[spoiled][30, 0, 5] = (math.nan, math.inf)[spoiled % 2]
            got = grads(lambda *x: attention(*x, mask, return_lse=True, backend="cpu"), bad)
            for name, x, y in zip(NAMES, got, clean, strict=True):
                keep = torch.cat([torch.arange(23), torch.arange(38, 50)])  # see no such key
                tolerance = 16 * torch.finfo(dtype).eps
                torch.testing.assert_close(
                    x[keep], y[keep], rtol=tolerance, atol=tolerance, msg=f"{name} {spoiled}"
                )


def check_instruction_set() -> None:
    for dtype in DTYPES:
        check(SpanMask.causal(cu(5, 1, 40), total=48), 4, 2, 40, dtype)
        check(SpanMask.full(cu(140)), 1, 1, 16, dtype)
    check(SpanMask.window(cu(600), 300, 3), 1, 1, 24)
    check_exp(torch.float32, 2.0**-21)
    check_exp(torch.bfloat16, 2.0**-7)
    check_log(torch.float32)
    check_log(torch.bfloat16)


OTHER_ISAS = sorted({*moca_fast._C.supported_isas()} - {moca_fast._C.cpu_isa()})


@pytest.mark.parametrize("isa", OTHER_ISAS)
def test_instruction_sets(isa):
    """Every other compiled set that this processor runs, each in a process of its own."""
    code = (
        "import test_attention_kernels as tests\n"
        f"assert tests.moca_fast._C.cpu_isa() == {isa!r}\n"
        "tests.check_instruction_set()"
    )
    environment = {**os.environ, "MOCA_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    folder = os.path.dirname(__file__)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
