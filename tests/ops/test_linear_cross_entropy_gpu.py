"""linear_cross_entropy on its kernels for GPUs; interpreted where there is none."""

import pytest
import torch
from ahead import compile_launches
from moca_triton import linear_cross_entropy as triton_backend
from numerics import DEVICE, DTYPES, GPU_BACKENDS, HAS_GPU, check, run
from test_linear_cross_entropy import IGNORED, ours, plain, problem

from moca_fast import linear_cross_entropy

# T, D, V. The last: two blocks, and rows enough that no one rounding of a product decides.
SHAPES = [(1, 1, 2), (6, 0, 9), (7, 5, 3), (20, 33, 101), (48, 40, 4100)]
if HAS_GPU:
    SHAPES += [(1000, 512, 151643), (4096, 1024, 32000)]
CHUNK_ROWS = 5
BACKENDS = GPU_BACKENDS[:1]  # Triton alone


def on_device(*shape: int) -> list[torch.Tensor]:
    return [t.to(DEVICE) for t in problem(*shape)]


@pytest.fixture(params=["whole", "chunks"])
def chunks(request, monkeypatch):
    """All rows in one chunk, or a few in each."""
    if request.param == "chunks":
        monkeypatch.setattr(triton_backend, "CHUNK_BYTES", CHUNK_ROWS * 128 * 4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_exact(shape, dtype, backend):
    hidden, weight, bias, labels = on_device(*shape)
    for tensors in ((hidden, weight, bias), (hidden, weight)):
        check(ours(labels, backend=backend), plain(labels), tensors, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_reductions(dtype, reduction, chunks, backend):
    *tensors, labels = on_device(24, 24, 77)
    labels[labels == IGNORED] = 5
    op = ours(labels, reduction=reduction, ignore_index=5, backend=backend)
    check(op, plain(labels, reduction, ignore_index=5), tensors, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [0.1, 30.0])
def test_exact_at_scales(scale, backend):
    hidden, weight, bias, labels = on_device(20, 24, 77)
    check(ours(labels, backend=backend), plain(labels), (hidden * scale, weight, bias), DTYPES[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous(backend):
    *tensors, labels = on_device(12, 20, 40)
    spread = torch.stack([labels, labels], dim=1)[:, 0]

    def strided(hidden, weight, bias):
        hidden, weight = hidden.T.contiguous().T, weight.repeat(1, 2)[:, :20]
        bias = torch.stack([bias, bias], dim=1)[:, 0]
        assert not any(t.is_contiguous() for t in (hidden, weight, bias, spread))
        return ours(spread, backend=backend)(hidden, weight, bias)

    check(strided, plain(labels), tensors, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [0, 6])
def test_no_row_counts(tokens, backend):
    hidden, weight, bias, _ = on_device(max(tokens, 1), 8, 9)
    labels = torch.full((tokens,), IGNORED, device=DEVICE)
    for reduction in ("mean", "sum", "none"):
        op = ours(labels, reduction=reduction, backend=backend)
        for result in run(op, (hidden[:tokens], weight, bias)):
            assert torch.equal(result, torch.zeros_like(result))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_rows_are_not_read(backend):
    hidden, weight, _, labels = on_device(20, 8, 9)
    ignored = labels == IGNORED
    hidden[ignored] = torch.nan
    loss, d_hidden, d_weight = run(ours(labels, backend=backend), (hidden, weight))
    assert loss.isfinite() and d_weight.isfinite().all()
    assert torch.equal(d_hidden[ignored], torch.zeros_like(hidden[ignored]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_nan_stays_in_its_row(reduction, backend):
    hidden, weight, _, labels = on_device(9, 8, 70)
    hidden[2, 3] = torch.nan
    op = ours(labels, reduction=reduction, backend=backend)
    loss, d_hidden, d_weight = run(op, (hidden, weight))
    assert loss.reshape(-1).isnan().nonzero().tolist() == [[2 if reduction == "none" else 0]]
    assert d_hidden[2].isnan().all() and not d_hidden[[0, 3]].isnan().any()
    assert d_weight.isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("needed", [0, 1, 2])
def test_one_gradient_alone(needed, reduction, chunks, backend):
    *tensors, labels = on_device(24, 16, 50)
    op = ours(labels, reduction=reduction, backend=backend)
    whole = run(op, tensors)[1:]
    tensors[needed].requires_grad_()
    loss = op(*tensors)
    loss.backward(torch.linspace(-0.9, 1.1, loss.numel(), device=DEVICE) if loss.dim() else None)
    for place, tensor in enumerate(tensors):
        assert (tensor.grad is None) == (place != needed)
    assert torch.equal(tensors[needed].grad, whole[needed])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_run_gives_the_same_bits(reduction, chunks, backend):
    *tensors, labels = on_device(24, 24, 77)
    op = ours(labels, reduction=reduction, backend=backend)
    for first, second in zip(run(op, tensors), run(op, tensors), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_is_the_same_without_gradients(backend):
    *tensors, labels = on_device(20, 33, 101)
    with torch.no_grad():
        loss = ours(labels, backend=backend)(*tensors)
    assert torch.equal(loss, run(ours(labels, backend=backend), tensors)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    hidden, weight, bias, labels = on_device(9, 8, 11)
    hidden.requires_grad_()
    ops = torch.ops.moca_fast
    call = (hidden, weight, labels, bias, IGNORED, backend)
    torch.library.opcheck(ops.linear_cross_entropy.default, call)
    for needs in ([True, False, False], [True, True, True]):
        weight.requires_grad_(needs[1])
        bias.requires_grad_(needs[2])
        call = (hidden, weight, labels, bias, IGNORED, backend, needs, needs[1])
        torch.library.opcheck(ops.linear_cross_entropy_with_gradients.default, call)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole(backend):
    *tensors, labels = on_device(9, 8, 11)
    op = ours(labels, backend=backend)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for got, expected in zip(run(compiled, tensors), run(op, tensors), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("label", [-1, 11])
def test_label_out_of_range(label, backend):
    hidden, weight, bias, labels = on_device(9, 8, 11)
    labels[4] = label
    with pytest.raises(IndexError, match=rf"labels\[4\].*0 to 10.*got {label}"):
        linear_cross_entropy(hidden, weight, labels, bias=bias, backend=backend)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="measures the GPU's memory")
def test_logits_never_exist():
    hidden = torch.randn(16384, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(131072, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(131072, (16384,), device=DEVICE)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_cross_entropy(hidden, weight, labels, backend="triton").backward()
    added = torch.cuda.max_memory_allocated() - before
    assert added < triton_backend.CHUNK_BYTES + (256 << 20), "the logits would take 8 GiB"


@pytest.mark.gpu
def test_kernels_compile_without_a_gpu():
    """What the interpreter lets pass: types, shapes, spilled registers, narrow accesses."""
    kernels = compile_launches("""
import torch
from moca_triton import linear_cross_entropy as backend
hidden, weight, labels = torch.empty(9, 64), torch.empty(4099, 64), torch.arange(9)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for bias in (None, torch.empty(4099, dtype=dtype)):
        call = (hidden.to(dtype), weight.to(dtype), labels, bias, -100)
        backend.forward_with_gradients(*call, [True, True, bias is not None], True)
""")
    for arch in (80, 90):
        names = [kernel.name for kernel in kernels if kernel.arch == arch]
        # Statistics see the inputs' dtype in the bias, and in how exactly they are taken.
        assert names.count("statistics_kernel") == 5 and names.count("gradient_kernel") == 6
    for kernel in kernels:
        assert kernel.stack <= 8, f"{kernel} spills registers"  # a pointer, outside of the loop
        assert kernel.access == 16, f"{kernel} does not read 16 bytes at once"
