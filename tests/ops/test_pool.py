import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import BACKENDS, DTYPES, assert_same_bits_on_threads, check, run
from torch import Tensor

import moca_fast

LENGTHS = [[1], [3, 0, 5], [0, 0], [17, 1, 0, 64, 2]]


def boundaries(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def plain(lengths: list[int], mode: str = "mean", normalize: bool = True):
    """Of documents that are not empty: torch's normalize has no use for a zero vector."""

    def function(hidden):
        documents = [x for x in hidden[: sum(lengths)].split(lengths) if len(x)]
        pooled = torch.stack([x.mean(dim=0) if mode == "mean" else x[-1] for x in documents])
        return torch.nn.functional.normalize(pooled, dim=1) if normalize else pooled

    return function


def ours(lengths: list[int], **options):
    """Only the documents that are not empty come out."""
    filled = torch.tensor(lengths) > 0
    return lambda hidden: moca_fast.pool(hidden, boundaries(lengths), **options)[filled]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["mean", "last"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("lengths", [x for x in LENGTHS if any(x)], ids=str)
@pytest.mark.kernel
def test_exact(lengths, normalize, mode, dtype, backend):
    hidden = torch.randn(sum(lengths) + 3, 37)
    options = {"mode": mode, "normalize": normalize}
    check(ours(lengths, backend=backend, **options), plain(lengths, **options), [hidden], dtype)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 40), max_size=6),
    dim=st.integers(1, 40),
    seed=st.integers(0, 2**31),
)
@pytest.mark.kernel
def test_exact_random_shapes(lengths, dim, seed):
    torch.manual_seed(seed)
    lengths = [*lengths, 3]
    hidden = torch.randn(sum(lengths) + 2, dim)
    check(ours(lengths, backend="cpu"), plain(lengths), [hidden], torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["mean", "last"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_empty_documents_and_rows_past_the_last(lengths, mode, backend):
    hidden = torch.randn(sum(lengths) + 3, 8)
    hidden[sum(lengths) :] = torch.nan
    op = lambda x: moca_fast.pool(x, boundaries(lengths), mode=mode, backend=backend)  # noqa: E731
    pooled, d_hidden = run(op, [hidden])
    assert pooled.dtype == torch.float32 and pooled.shape == (len(lengths), 8)
    empty = torch.tensor(lengths) == 0
    assert torch.equal(pooled[empty], torch.zeros_like(pooled[empty]))
    assert pooled.isfinite().all() and d_hidden.isfinite().all()
    assert torch.equal(d_hidden[sum(lengths) :], torch.zeros(3, 8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_whose_squares_overflow(backend):
    pooled = moca_fast.pool(torch.full((4, 4), 1e25), boundaries([4]), backend=backend)
    torch.testing.assert_close(pooled, torch.full((1, 4), 0.5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_documents(backend):
    op = lambda x: moca_fast.pool(x, torch.zeros(1).int(), backend=backend)  # noqa: E731
    pooled, d_hidden = run(op, [torch.randn(4, 8)])
    assert pooled.shape == (0, 8) and torch.equal(d_hidden, torch.zeros(4, 8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_document(backend):
    hidden = torch.randn(9, 8)
    hidden[4] = torch.nan
    pooled, d_hidden = run(ours([3, 3, 3], backend=backend), [hidden])
    assert pooled[1].isnan().all() and pooled[[0, 2]].isfinite().all()
    assert d_hidden[3:6].isnan().all() and d_hidden[[0, 1, 2, 6, 7, 8]].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous(backend):
    bounds = torch.stack([boundaries([3, 5])] * 2, dim=1)[:, 0]

    def strided(hidden):
        return moca_fast.pool(hidden.T.contiguous().T, bounds, backend=backend)

    check(strided, plain([3, 5]), [torch.randn(9, 6)], torch.float32)


@pytest.mark.kernel
def test_bits_do_not_depend_on_runs_or_threads():
    assert_same_bits_on_threads(ours([40, 3, 0, 100], backend="cpu"), [torch.randn(150, 33)])


def test_gradcheck_of_the_reference():
    hidden = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    for mode in ("mean", "last"):
        for normalize in (True, False):
            op = ours([3, 0, 4], mode=mode, normalize=normalize)
            assert torch.autograd.gradcheck(op, hidden)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    hidden = torch.randn(9, 4, requires_grad=True)
    op = torch.ops.moca_fast.pool.default
    torch.library.opcheck(op, (hidden, boundaries([3, 4]), True, True, backend))


def test_compiles_whole():
    bounds, hidden = boundaries([3, 0, 4]), torch.randn(9, 8)
    op = lambda x: moca_fast.pool(x, bounds)  # noqa: E731
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for got, expected in zip(run(compiled, [hidden]), run(op, [hidden]), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bounds", [[1, 4], [0, 5, 3], [0, 3, 10], [-1, 4]])
def test_wrong_boundaries(bounds, backend):
    with pytest.raises(ValueError, match=r"cu_seqlens: expected non-decreasing entries.*T = 9"):
        moca_fast.pool(torch.randn(9, 4), torch.tensor(bounds).int(), backend=backend)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.zeros(9)}, ValueError, r"hidden: expected shape \(T, D\), got \(9,\)"),
        ({"hidden": torch.zeros(9, 4).int()}, TypeError, "hidden.*got int32"),
        ({"cu_seqlens": torch.tensor([0, 9])}, TypeError, "cu_seqlens.*int32, got int64"),
        ({"cu_seqlens": torch.zeros(0).int()}, ValueError, r"B \+ 1 entries, got none"),
        ({"cu_seqlens": torch.zeros(2, device="meta").int()}, ValueError, "cpu, got meta"),
        ({"mode": "max"}, ValueError, "mode.*'max'"),
        ({"normalize": 2}, TypeError, "normalize: expected True or False, got 2"),
    ],
)
def test_refusals(change, error, message):
    call = {"hidden": torch.zeros(9, 4), "cu_seqlens": boundaries([9]), **change}
    with pytest.raises(error, match=message):
        moca_fast.pool(**call)
