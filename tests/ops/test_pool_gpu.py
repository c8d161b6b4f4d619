"""pool on the kernels for GPUs."""

import pytest
import torch
from ahead import compile_launches
from numerics import DEVICE, DTYPES, GPU_BACKENDS, HAS_GPU, check, run
from test_pool import boundaries, plain

import moca_fast

# Where tokens are few a chunk has 16: documents lie inside one, are cut by it, or fill several.
LENGTHS = [[1], [3, 0, 5], [0, 0], [17, 1, 0, 64, 2], [16, 16, 0, 32], [5, 40, 3, 1, 1, 1, 9]]
LARGE = [[20_000, 7, 0, 13_000], [1] * 3000, [17] * 4000]
pytestmark = pytest.mark.parametrize("backend", GPU_BACKENDS)


def ours(lengths, **options):
    """Only the documents that are not empty come out."""
    filled = (torch.tensor(lengths) > 0).to(DEVICE)
    bounds = boundaries(lengths).to(DEVICE)
    return lambda hidden: moca_fast.pool(hidden, bounds, **options)[filled]


@pytest.mark.parametrize("mode", ["mean", "last"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [x for x in LENGTHS + LARGE * HAS_GPU if any(x)], ids=len)
def test_exact(lengths, dtype, normalize, mode, backend):
    hidden = torch.randn(sum(lengths) + 3, 37, device=DEVICE)
    options = {"mode": mode, "normalize": normalize}
    check(ours(lengths, backend=backend, **options), plain(lengths, **options), [hidden], dtype)


@pytest.mark.parametrize("dim", [1, 16, 896, 3584, 8192])
def test_dims(dim, backend):
    hidden = torch.randn(40, dim, device=DEVICE)
    check(ours([3, 30, 7], backend=backend), plain([3, 30, 7]), [hidden], torch.bfloat16)


@pytest.mark.parametrize("mode", ["mean", "last"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=len)
def test_empty_documents_and_rows_past_the_last(lengths, mode, backend):
    hidden = torch.randn(sum(lengths) + 35, 8, device=DEVICE)
    hidden[sum(lengths) :] = torch.nan
    bounds = boundaries(lengths).to(DEVICE)
    op = lambda x: moca_fast.pool(x, bounds, mode=mode, backend=backend)  # noqa: E731
    pooled, d_hidden = run(op, [hidden])
    assert pooled.dtype == torch.float32 and pooled.shape == (len(lengths), 8)
    empty = (torch.tensor(lengths) == 0).to(DEVICE)
    assert (pooled[empty] == 0).all()
    assert pooled.isfinite().all() and d_hidden.isfinite().all()
    assert (d_hidden[sum(lengths) :] == 0).all()


@pytest.mark.parametrize("shape", [(4, 8), (0, 8), (4, 0)])
@pytest.mark.parametrize("documents", [0, 2])
def test_nothing_to_pool(documents, shape, backend):
    bounds = torch.zeros(documents + 1, device=DEVICE).int()
    op = lambda x: moca_fast.pool(x, bounds, backend=backend)  # noqa: E731
    pooled, d_hidden = run(op, [torch.randn(shape, device=DEVICE)])
    assert pooled.shape == (documents, shape[1]) and (pooled == 0).all()
    assert d_hidden.shape == shape and (d_hidden == 0).all()


def test_zero_vectors_have_finite_gradients(backend):
    pooled, d_hidden = run(ours([20, 3], backend=backend), [torch.zeros(23, 8, device=DEVICE)])
    assert (pooled == 0).all() and d_hidden.isfinite().all()


def test_nan_stays_in_its_document(backend):
    hidden = torch.randn(60, 8, device=DEVICE)
    hidden[24] = torch.nan
    pooled, d_hidden = run(ours([20, 20, 20], backend=backend), [hidden])
    assert pooled.isnan().all(dim=1).tolist() == [False, True, False]
    assert pooled[[0, 2]].isfinite().all()
    rows = d_hidden.isnan().all(dim=1)
    assert rows[20:40].all() and d_hidden[~rows].isfinite().all() and rows.sum() == 20


def test_non_contiguous(backend):
    bounds = torch.stack([boundaries([3, 5])] * 2, dim=1)[:, 0].to(DEVICE)

    def strided(hidden):
        pooled = moca_fast.pool(hidden.T.contiguous().T, bounds, backend=backend)
        return pooled.T.contiguous().T

    check(strided, plain([3, 5]), [torch.randn(9, 6, device=DEVICE)], torch.float32)


def test_bits_do_not_depend_on_runs(backend):
    op, hidden = ours([40, 3, 0, 100], backend=backend), torch.randn(150, 33, device=DEVICE)
    first = run(op, [hidden])
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(op, [hidden]), strict=True))


@pytest.mark.parametrize("mode", ["mean", "last"])
@pytest.mark.parametrize(
    ("bounds", "wrong"),
    [
        ([1, 4], [True]),
        ([0, 5, 3], [False, True]),
        ([0, 3, 10], [False, True]),
        ([-1, 4, 6], [True, False]),
        ([0, 2, -3, 9], [False, True, True]),
        ([0, 100, 9], [True, True]),
    ],
)
def test_documents_with_wrong_boundaries_are_nan(bounds, wrong, mode, backend):
    hidden = torch.randn(9, 4, device=DEVICE)
    bounds = torch.tensor(bounds, device=DEVICE).int()
    pooled = moca_fast.pool(hidden, bounds, mode=mode, backend=backend)
    assert pooled[torch.tensor(wrong, device=DEVICE)].isnan().all()


def test_rows_before_the_first_document_have_gradients(backend):
    hidden = torch.randn(9, 4, device=DEVICE).requires_grad_()
    bounds = torch.tensor([1, 4], device=DEVICE).int()
    moca_fast.pool(hidden, bounds, mode="last", backend=backend).sum().backward()
    assert hidden.grad[3].isnan().all()
    assert not hidden.grad[:3].any() and not hidden.grad[4:].any()


def test_rows_that_are_too_wide_are_refused(backend):
    hidden, bounds = torch.zeros(1, 8193, device=DEVICE), boundaries([1]).to(DEVICE)
    if backend == "triton":
        with pytest.raises(ValueError, match="8193 dims; the kernel holds at most 8192"):
            moca_fast.pool(hidden, bounds, backend=backend)
    else:
        assert (moca_fast.pool(hidden, bounds, backend=backend) == 0).all()


def test_compiles_ahead(backend):
    if backend != "triton":
        pytest.skip("nvcc compiles it when the wheel is built")
    kernels = compile_launches("""
import torch
from moca_triton import pool as op
bounds = torch.tensor([0, 1, 40, 90], dtype=torch.int32)
for dtype, dim, tokens in (
    (torch.bfloat16, 3584, 100), (torch.float32, 37, 1), (torch.float16, op.MAX_DIM, 100)
):
    for mean, normalize in ((True, True), (True, False), (False, True)):
        hidden = torch.zeros(tokens, dim, dtype=dtype)
        pooled, norm = op.forward(hidden, bounds, mean, normalize)
        op.backward(pooled, hidden, bounds, pooled, norm, mean, normalize)
""")
    names = {kernel.name for kernel in kernels}
    assert names == {"_mean_kernel", "_finish_kernel", "_backward_kernel"}
    assert all(kernel.stack == 0 for kernel in kernels)
    assert sum(k.access == 16 for k in kernels) == 2 * 2 * (2 + 3 + 3)  # architectures, wide dims
