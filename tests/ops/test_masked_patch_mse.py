import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import BACKENDS, DTYPES, assert_same_bits_on_threads, check, run
from torch import Tensor

from moca_fast import masked_patch_mse

SHAPES = [(1, 1, 2), (3, 5, 7), (33, 20, 588), (70, 90, 1176)]  # M, N, P


def problem(masked: int, patches: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions, clean patches, index."""
    index = torch.randint(patches, (masked,))
    return torch.randn(masked, size), torch.randn(patches, size) * 2 + 0.5, index


def plain(patches: Tensor, index: Tensor, normalize: bool = False):
    def function(pred):
        target = patches[index].to(pred.dtype)
        if normalize:
            mean, variance = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6) ** 0.5
        return torch.nn.functional.mse_loss(pred, target)

    return function


def ours(patches: Tensor, index: Tensor, **options):
    return lambda pred: masked_patch_mse(pred, patches, index, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.kernel
def test_exact(shape, dtype, normalize, backend):
    pred, patches, index = problem(*shape)
    patches = patches.to(dtype)
    options = {"normalize": normalize}
    op = ours(patches, index, backend=backend, **options)
    check(op, plain(patches, index, **options), [pred], dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.kernel
def test_exact_in_mixed_precision(normalize, backend):
    pred, patches, index = problem(20, 30, 48)
    options = {"normalize": normalize}
    op = ours(patches, index, backend=backend, **options)
    check(op, plain(patches, index, **options), [pred], torch.bfloat16)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(4, 70)),
    offset=st.sampled_from([0.0, 3.0]),
    normalize=st.booleans(),
    seed=st.integers(0, 2**31),
)
@pytest.mark.kernel
def test_exact_random_shapes(shape, offset, normalize, seed):
    torch.manual_seed(seed)
    pred, patches, index = problem(*shape)
    patches += offset
    op = ours(patches, index, normalize=normalize, backend="cpu")
    check(op, plain(patches, index, normalize), [pred], torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_patches_stay_finite(backend):
    pred, patches, index = problem(5, 6, 12)
    op = ours(torch.full_like(patches, 0.3), index, normalize=True, backend=backend)
    loss, d_pred = run(op, [pred])
    torch.testing.assert_close(loss, pred.square().mean(), rtol=1e-3, atol=1e-3)
    assert d_pred.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("patches", [0, 4])
def test_empty_index(patches, backend):
    pred, clean, index = torch.zeros(0, 6), torch.zeros(patches, 6), torch.zeros(0).long()
    loss, d_pred = run(ours(clean, index, backend=backend), [pred])
    assert torch.equal(loss, torch.zeros(())) and d_pred.shape == (0, 6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_propagates(backend):
    pred, patches, index = problem(6, 6, 12)
    pred[2, 3] = torch.nan
    loss, d_pred = run(ours(patches, index, backend=backend), [pred])
    assert loss.isnan() and d_pred.isnan().nonzero().tolist() == [[2, 3]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous(backend):
    pred, patches, index = problem(20, 30, 48)
    spread = torch.stack([index, index], dim=1)[:, 0]
    op = ours(patches.T.contiguous().T, spread, backend=backend)
    check(lambda x: op(x.T.contiguous().T), plain(patches, index), [pred], torch.float32)


@pytest.mark.kernel
def test_bits_do_not_depend_on_runs_or_threads():
    pred, patches, index = problem(130, 50, 33)
    assert_same_bits_on_threads(ours(patches, index, normalize=True, backend="cpu"), [pred])


def test_gradcheck_of_the_reference():
    pred, patches, index = problem(4, 5, 6)
    pred = pred.double().requires_grad_()
    for normalize in (False, True):
        op = ours(patches.double(), index, normalize=normalize)
        assert torch.autograd.gradcheck(op, pred)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    pred, patches, index = problem(4, 5, 6)
    op = torch.ops.moca_fast.masked_patch_mse.default
    torch.library.opcheck(op, (pred.requires_grad_(), patches, index, True, backend))


def test_compiles_whole():
    pred, patches, index = problem(4, 5, 6)
    op = ours(patches, index)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for got, expected in zip(run(compiled, [pred]), run(op, [pred]), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row", [-1, 5])
def test_index_out_of_range(row, backend):
    pred, patches, index = problem(4, 5, 6)
    index[2] = row
    with pytest.raises(IndexError, match=r"masked_patch_mse: index\[2\].* expected 0 to 4"):
        masked_patch_mse(pred, patches, index, backend=backend)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pred": torch.zeros(4)}, ValueError, r"pred: expected shape \(M, P\), got \(4,\)"),
        ({"pred": torch.zeros(4, 6).int()}, TypeError, "pred.*got int32"),
        ({"patches": torch.zeros(5, 7)}, ValueError, r"patches.*\(N, 6\), got \(5, 7\)"),
        ({"patches": torch.zeros(5, 6, device="meta")}, ValueError, "device cpu, got meta"),
        ({"patches": torch.zeros(5, 6, requires_grad=True)}, ValueError, "detach it"),
        ({"index": torch.zeros(3).long()}, ValueError, r"index.*\(4,\), got \(3,\)"),
        ({"index": torch.zeros(4)}, TypeError, "index.*int64, got float32"),
    ],
)
def test_refusals(change, error, message):
    pred, patches, index = problem(4, 5, 6)
    with pytest.raises(error, match=message):
        masked_patch_mse(**{"pred": pred, "patches": patches, "index": index, **change})
