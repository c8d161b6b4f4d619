"""mrope on the kernels for GPUs."""

import pytest
import torch
from ahead import compile_launches
from numerics import DEVICE, DTYPES, GPU_BACKENDS, HAS_GPU, check, run
from test_mrope import SHAPES, layouts, merged, ours, plain, problem

from moca_fast import mrope

LARGE = [(3000, 28, 4, 128), (513, 40, 8, 80), (100, 160, 16, 64)]
pytestmark = pytest.mark.parametrize("backend", GPU_BACKENDS)


def on_device(*shape: int):
    return [x.to(DEVICE) for x in problem(*shape)]


@pytest.mark.parametrize("tables", [None, torch.float32], ids=["same", "float32"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 70, 3, 72), *LARGE * HAS_GPU])
def test_exact(shape, dtype, tables, backend):
    q, k, cos, sin = on_device(*shape)
    cos, sin = cos.to(tables or dtype), sin.to(tables or dtype)
    check(ours(cos, sin, backend=backend), plain(cos, sin), [q, k], dtype)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "section", [[16, 24, 24], [24, 20, 20], [0, 0, 64], [64, 0, 0], [1, 2, 0], [0, 13, 0]], ids=str
)
def test_exact_in_sections(section, interleaved, backend):
    q, k, _, _ = on_device(4, 3, 2, 2 * sum(section))
    cos, sin = torch.randn(2, 3, 4, 2 * sum(section), device=DEVICE)
    want = plain(*(merged(table, section, interleaved) for table in (cos, sin)))
    op = ours(cos, sin, mrope_section=section, interleaved=interleaved, backend=backend)
    check(op, want, [q, k], torch.bfloat16)


@pytest.mark.parametrize("needed", [0, 1])
def test_partial_gradients(needed, backend):
    q, k, cos, sin = on_device(6, 3, 2, 16)
    both = run(ours(cos, sin, backend=backend), [q, k])
    leaves = [q, k]
    leaves[needed] = leaves[needed].requires_grad_()
    out = ours(cos, sin, backend=backend)(*leaves)
    out.backward(torch.linspace(-0.9, 1.1, out.numel()).reshape(out.shape).to(DEVICE))
    assert torch.equal(leaves[needed].grad, both[1 + needed])
    assert leaves[1 - needed].grad is None


@pytest.mark.parametrize("shape", [(0, 3, 2, 16), (4, 0, 2, 16), (4, 3, 0, 16), (4, 3, 2, 0)])
def test_empty(shape, backend):
    q, k, cos, sin = on_device(*shape)
    out, d_q, d_k = run(ours(cos, sin, backend=backend), [q, k])
    assert d_q.shape == q.shape and d_k.shape == k.shape and out.isfinite().all()


def test_any_layout(backend):
    q, k, cos, sin = on_device(5, 3, 2, 16)
    k[:, 1] = k[:, 0]
    want = mrope(q, k, cos, sin, backend=backend)
    for strided in layouts(q, k):
        got = mrope(*strided, cos.T.contiguous().T, sin.T.contiguous().T, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_nan_stays_in_its_pair(backend):
    q, k, cos, sin = on_device(5, 3, 2, 16)
    q[2, 1, 3] = torch.nan
    q_out, k_out = mrope(q, k, cos, sin, backend=backend)
    assert q_out.isnan().nonzero().tolist() == [[2, 1, 3], [2, 1, 11]] and k_out.isfinite().all()


def test_bits_do_not_depend_on_runs(backend):
    q, k, cos, sin = on_device(30, 3, 2, 38)
    op = ours(cos, sin, backend=backend)
    first = run(op, [q, k])
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(op, [q, k]), strict=True))


def test_heads_that_are_too_wide_are_refused(backend):
    q, k, cos, sin = on_device(1, 1, 1, 4098)
    if backend == "triton":
        with pytest.raises(ValueError, match="4098 dims a head; the kernel holds at most 4096"):
            mrope(q, k, cos, sin, backend=backend)
    else:
        assert mrope(q, k, cos, sin, backend=backend)[0].isfinite().all()


def test_compiles_ahead(backend):
    if backend != "triton":
        pytest.skip("nvcc compiles it when the wheel is built")
    kernels = compile_launches("""
import torch
from moca_triton import mrope as op
for dtype, tables, heads, kv_heads, dim, section in (
    (torch.bfloat16, torch.bfloat16, 28, 4, 128, [16, 24, 24]),
    (torch.bfloat16, torch.float32, 16, 16, 80, []),
    (torch.float32, torch.float32, 40, 8, 128, [24, 20, 20]),
    (torch.float16, torch.float16, 1, 1, 6, [1, 1, 1]),
    (torch.float32, torch.float32, 1, 0, op.MAX_DIM, []),
):
    q = torch.zeros(5, heads, dim, dtype=dtype)
    k = torch.zeros(5, kv_heads, dim, dtype=dtype)
    table = torch.zeros(3, 5, dim, dtype=tables) if section else torch.zeros(5, dim, dtype=tables)
    op.forward(q, k, table, table, section, False)
    op.backward(q, k, table, table, section, bool(section))
""")
    assert {kernel.name for kernel in kernels} == {"_rotate_kernel"}
    assert all(kernel.stack == 0 for kernel in kernels)
    assert sum(kernel.access == 16 for kernel in kernels) == 2 * 2 * 4  # all but dim 6
