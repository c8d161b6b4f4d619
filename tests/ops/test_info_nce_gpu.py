"""info_nce on its kernels for GPUs; interpreted where there is none."""

import pytest
import torch
from ahead import compile_launches
from moca_triton import info_nce as triton_backend
from numerics import DEVICE, DTYPES, GPU_BACKENDS, HAS_GPU, check, run
from test_info_nce import ours, plain, problem, targets

import moca_fast

SHAPES = [(1, 1, 1, 1), (4, 6, 1, 0), (5, 9, 0, 3), (20, 77, 2, 33), (5, 4100, 1, 70)]  # B, M, K, D
if HAS_GPU:
    SHAPES += [(1000, 5003, 3, 256), (4096, 4096, 0, 1024)]
CHUNK_ROWS = 9
BACKENDS = GPU_BACKENDS[:1]  # Triton alone


def on_device(*shape: int) -> list[torch.Tensor]:
    return [t.to(DEVICE) for t in problem(*shape)]


def targets_on_device(*shape: int) -> torch.Tensor:
    return targets(*shape).to(DEVICE)


@pytest.fixture(params=["whole", "chunks"])
def chunks(request, monkeypatch):
    """All queries in one chunk, or a few in each."""
    if request.param == "chunks":
        monkeypatch.setattr(triton_backend, "CHUNK_BYTES", CHUNK_ROWS * 64 * 4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_exact(shape, dtype, backend):
    tensors, target = on_device(*shape), targets_on_device(*shape[:2])
    check(ours(target, backend=backend), plain(target), tensors, dtype)
    check(ours(target, backend=backend), plain(target), tensors[:2], dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_with_ids(dtype, reduction, chunks, backend):
    """Query ids that are not those of the targets: a target is never left out."""
    tensors, target = on_device(20, 50, 2, 16), targets_on_device(20, 50)
    masks = {
        "query_ids": torch.randint(12, (20,), device=DEVICE),
        "document_ids": torch.randint(12, (50,), device=DEVICE),
    }
    op = ours(target, reduction=reduction, backend=backend, **masks)
    check(op, plain(target, reduction, **masks), tensors, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_exact_at_low_temperature(backend):
    query, document, hard, _ = on_device(20, 40, 2, 32)
    # Targets stand out: the loss is small, scores are large.
    document = torch.cat([query + 0.1 * document[:20], document[20:]])
    tensors = (query, document, hard, torch.tensor(0.03, device=DEVICE))
    exact = plain(torch.arange(20, device=DEVICE))
    check(ours(None, backend=backend), exact, tensors, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_everything_else_masked(backend):
    ids = torch.zeros(800, device=DEVICE).long()
    op = ours(None, document_ids=ids, reduction="none", backend=backend)
    for result in run(op, on_device(5, 800, 0, 8)):
        torch.testing.assert_close(result, torch.zeros_like(result), rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous(backend):
    target = targets_on_device(20, 30)
    spread = torch.stack([target, target], dim=1)[:, 0]

    def strided(query, document, hard, temperature):
        query, document = query.T.contiguous().T, document.repeat(1, 2)[:, :16]
        hard = hard.transpose(0, 1).contiguous().transpose(0, 1)
        assert not any(t.is_contiguous() for t in (query, document, hard, spread))
        return ours(spread, backend=backend)(query, document, hard, temperature)

    check(strided, plain(target), on_device(20, 30, 2, 16), torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    ids = torch.arange(7, device=DEVICE)
    for reduction in ("mean", "sum", "none"):
        op = ours(None, document_ids=ids, reduction=reduction, backend=backend)
        for result in run(op, on_device(0, 7, 2, 8)):
            assert torch.equal(result, torch.zeros_like(result))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_row(backend):
    query, document, hard, temperature = on_device(6, 70, 1, 8)
    query[2, 3] = torch.nan
    hard[4] = torch.nan
    op = ours(None, reduction="none", backend=backend)
    loss, d_query, d_document, d_hard, _ = run(op, (query, document, hard, temperature))
    assert loss.isnan().nonzero().flatten().tolist() == [2, 4]
    assert d_query[[2, 4]].isnan().all() and not d_query[[0, 1, 3, 5]].isnan().any()
    assert d_document.isnan().all() and not d_hard[0].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("needed", [0, 1, 2, 3])
def test_one_gradient_alone(needed, reduction, chunks, backend):
    tensors, target = on_device(20, 40, 2, 16), targets_on_device(20, 40)
    op = ours(target, reduction=reduction, backend=backend)
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
    tensors, target = on_device(20, 40, 2, 24), targets_on_device(20, 40)
    op = ours(target, reduction=reduction, backend=backend)
    for first, second in zip(run(op, tensors), run(op, tensors), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_is_the_same_without_gradients(backend):
    tensors, target = on_device(20, 40, 2, 24), targets_on_device(20, 40)
    with torch.no_grad():
        loss = ours(target, backend=backend)(*tensors)
    assert torch.equal(loss, run(ours(target, backend=backend), tensors)[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", [-1, 7])
@pytest.mark.parametrize("with_ids", [False, True])
def test_target_out_of_range(with_ids, wrong, backend):
    """The host does not wait for the device to say so."""
    query, document, *_ = on_device(4, 7, 0, 8)
    target = torch.tensor([0, 1, wrong, 2], device=DEVICE)
    ids = torch.arange(7, device=DEVICE) if with_ids else None
    loss = moca_fast.info_nce(
        query, document, target, document_ids=ids, reduction="none", backend=backend
    )
    assert loss.isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    query, document, hard, temperature = on_device(4, 6, 2, 5)
    query.requires_grad_()
    temperature.requires_grad_()
    target, ids = torch.arange(4, device=DEVICE), torch.arange(6, device=DEVICE)
    full = (query, document, target, temperature, hard, ids[target], ids, backend)
    torch.library.opcheck(torch.ops.moca_fast.info_nce.default, full)
    together = torch.ops.moca_fast.info_nce_with_gradients.default
    torch.library.opcheck(together, (*full, [True, False, False, True], False))
    document.requires_grad_()
    bare = (query, document, target, temperature, None, None, None, backend)
    torch.library.opcheck(together, (*bare, [True, True, False, True], True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole(backend):
    tensors = on_device(9, 11, 2, 8)
    op = ours(None, document_ids=torch.arange(11, device=DEVICE) // 2, backend=backend)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for got, expected in zip(run(compiled, tensors), run(op, tensors), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="measures the GPU's memory")
def test_scores_never_exist():
    options = {"device": DEVICE, "dtype": torch.bfloat16, "requires_grad": True}
    query, document = torch.randn(65536, 64, **options), torch.randn(65536, 64, **options)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    moca_fast.info_nce(query, document, backend="triton").backward()
    added = torch.cuda.max_memory_allocated() - before
    assert added < triton_backend.CHUNK_BYTES + (128 << 20), "the scores would take 16 GiB"


@pytest.mark.gpu
def test_kernels_compile_without_a_gpu():
    """What the interpreter lets pass: types, shapes, spilled registers, narrow accesses."""
    kernels = compile_launches("""
import torch
from moca_triton import info_nce as backend
query, document, hard = torch.empty(9, 64), torch.empty(97, 64), torch.empty(9, 3, 64)
target, temperature, ids = torch.arange(9), torch.tensor(0.1), torch.arange(97)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    states = query.to(dtype), document.to(dtype), target, temperature
    backend.forward_with_gradients([True] * 2 + [False] * 2, True, *states, None, None, None)
    own = hard.to(dtype), target, ids
    backend.forward_with_gradients([True] * 4, True, *states, *own)
    backend.forward_with_gradients([False, False, True, False], True, *states, *own)
""")
    for arch in (80, 90):
        names = [kernel.name for kernel in kernels if kernel.arch == arch]
        # Scores are float32, but those of float32 are taken more exactly; with ids and without.
        assert names.count("statistics_kernel") == 4
        assert names.count("own_scores_kernel") == 3 and names.count("own_gradients_kernel") == 6
        assert names.count("gradient_kernel") == 9
    for kernel in kernels:
        assert kernel.stack <= 8, f"{kernel} spills registers"  # a pointer, outside of the loop
        if kernel.name in ("statistics_kernel", "gradient_kernel"):
            assert kernel.access == 16, f"{kernel} does not read 16 bytes at once"
