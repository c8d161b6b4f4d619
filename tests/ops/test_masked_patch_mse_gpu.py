"""masked_patch_mse on the kernels for GPUs."""

import pytest
import torch
from ahead import compile_launches
from numerics import DEVICE, DTYPES, GPU_BACKENDS, HAS_GPU, check, run
from test_masked_patch_mse import ours, plain, problem

SHAPES = [(1, 1, 2), (3, 5, 7), (33, 20, 588), (9, 12, 1176), (300, 7, 27)]  # M, N, P
LARGE = [(4096, 9000, 1176), (70_000, 1000, 1536)]
pytestmark = pytest.mark.parametrize("backend", GPU_BACKENDS)


def on_device(*shape: int):
    return [x.to(DEVICE) for x in problem(*shape)]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES + LARGE * HAS_GPU)
def test_exact(shape, dtype, normalize, backend):
    pred, patches, index = on_device(*shape)
    patches = patches.to(dtype)
    op = ours(patches, index, normalize=normalize, backend=backend)
    check(op, plain(patches, index, normalize), [pred], dtype)


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str
)
def test_exact_in_mixed_precision(dtypes, backend):
    pred, patches, index = on_device(20, 30, 48)
    patches = patches.to(dtypes[1])
    op = ours(patches, index, normalize=True, backend=backend)
    check(op, plain(patches, index, True), [pred], dtypes[0])


def test_weighted_loss(backend):
    pred, patches, index = on_device(20, 30, 48)
    op = ours(patches, index, backend=backend)
    for weight in (0.25, 3e4):
        check(
            lambda x, w=weight: op(x) * w,
            lambda x, w=weight: plain(patches, index)(x) * w,
            [pred],
            torch.float16,
        )


def test_small_gradients_of_float16_do_not_vanish(backend):
    """2 / (M P) is below its range; what the loss is scaled by brings it back."""
    pred, patches, index = on_device(600, 30, 60)
    pred = pred.half().requires_grad_()
    loss = ours(patches.half(), index, backend=backend)(pred)
    (loss * 2.0**16).backward()
    assert (pred.grad != 0).float().mean() > 0.99


def test_constant_patches_stay_finite(backend):
    pred, patches, index = on_device(5, 6, 12)
    op = ours(torch.full_like(patches, 0.3), index, normalize=True, backend=backend)
    loss, d_pred = run(op, [pred])
    torch.testing.assert_close(loss, pred.square().mean(), rtol=1e-3, atol=1e-3)
    assert d_pred.isfinite().all()


@pytest.mark.parametrize("patches", [0, 4])
def test_empty_index(patches, backend):
    clean, index = torch.zeros(patches, 6, device=DEVICE), torch.zeros(0, device=DEVICE).long()
    loss, d_pred = run(ours(clean, index, backend=backend), [torch.zeros(0, 6, device=DEVICE)])
    assert loss == 0 and d_pred.shape == (0, 6)


def test_nan_propagates(backend):
    pred, patches, index = on_device(6, 6, 12)
    pred[2, 3] = torch.nan
    loss, d_pred = run(ours(patches, index, backend=backend), [pred])
    assert loss.isnan() and d_pred.isnan().nonzero().tolist() == [[2, 3]]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("row", [-1, 5, 2**40])
def test_index_out_of_range_is_nan(row, normalize, backend):
    pred, patches, index = on_device(4, 5, 6)
    index[2] = row
    loss, d_pred = run(ours(patches, index, normalize=normalize, backend=backend), [pred])
    assert loss.isnan() and d_pred.isnan().any(dim=1).tolist() == [False, False, True, False]


def test_non_contiguous(backend):
    pred, patches, index = on_device(20, 30, 48)
    spread = torch.stack([index, index], dim=1)[:, 0]
    op = ours(patches.T.contiguous().T, spread, backend=backend)
    check(lambda x: op(x.T.contiguous().T), plain(patches, index), [pred], torch.float32)


def test_bits_do_not_depend_on_runs(backend):
    pred, patches, index = on_device(130, 50, 33)
    op = ours(patches, index, normalize=True, backend=backend)
    first = run(op, [pred])
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(op, [pred]), strict=True))


def test_patches_that_are_too_long_are_refused(backend):
    pred, index = torch.zeros(1, 16385, device=DEVICE), torch.zeros(1, device=DEVICE).long()
    if backend == "triton":
        with pytest.raises(ValueError, match="patches of 16385 values"):
            ours(pred, index, backend=backend)(pred)
    else:
        assert ours(pred, index, backend=backend)(pred) == 0


def test_compiles_ahead(backend):
    if backend != "triton":
        pytest.skip("nvcc compiles it when the wheel is built")
    kernels = compile_launches("""
import torch
from moca_triton import masked_patch_mse as op
for dtype, rows, size in (
    (torch.bfloat16, 33, 1176), (torch.float32, 33, 1536), (torch.float16, 1, 1),
    (torch.float32, 2, op.MAX_SIZE),
):
    for normalize in (False, True):
        pred, patches = torch.zeros(rows, size, dtype=dtype), torch.zeros(9, size, dtype=dtype)
        index = torch.zeros(rows, dtype=torch.int64)
        op.forward(pred, patches, index, normalize)
        op.backward(torch.ones(()), pred, patches, index, normalize)
""")
    names = {kernel.name for kernel in kernels}
    assert names == {"_forward_kernel", "_mean_kernel", "_backward_kernel"}
    assert all(kernel.stack == 0 for kernel in kernels)
    vectors = [k for k in kernels if k.access == 16]
    assert len(vectors) == 2 * 2 * 2 * 3  # architectures, directions, normalize, wide sizes
