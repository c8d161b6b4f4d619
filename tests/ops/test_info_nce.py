import math
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import (
    BACKENDS,
    DTYPES,
    added_peak_memory,
    assert_same_bits_on_threads,
    check,
    run,
)
from torch import Tensor

import moca_fast

# B, M, K, D
SHAPES = [
    (1, 1, 1, 1),
    (4, 6, 1, 0),
    (5, 9, 0, 3),
    (50, 77, 2, 33),
    (100, 801, 1, 70),
    (800, 40, 0, 9),
]
TEMPERATURE = 0.5
HELD_ROWS = "moca_fast.ops.info_nce.op.held_rows"


def problem(batch: int, documents: int, hard: int, dim: int) -> list[Tensor]:
    """Query, document, hard negatives (all of unit length), temperature."""
    rows = F.normalize(torch.randn(batch + documents + batch * hard, dim), dim=1)
    query, document, negatives = rows.split([batch, documents, batch * hard])
    return [query, document, negatives.view(batch, hard, dim), torch.tensor(TEMPERATURE)]


def targets(batch: int, documents: int) -> Tensor:
    return torch.randint(documents, (batch,))


def plain(target: Tensor, reduction: str = "mean", query_ids=None, document_ids=None):
    def function(query, document, hard=None, temperature=TEMPERATURE):
        scores = query @ document.T / temperature
        rows = torch.arange(len(query))
        if document_ids is not None:
            same = query_ids[:, None] == document_ids
            same[rows, target] = False
            scores = scores.masked_fill(same, -torch.inf)
        if hard is not None:
            scores = torch.cat([scores, (hard @ query[:, :, None])[..., 0] / temperature], dim=1)
        loss = -scores.log_softmax(dim=1)[rows, target]
        return loss if reduction == "none" else getattr(loss, reduction)()

    return function


def ours(target: Tensor | None, **options):
    def function(query, document, hard=None, temperature=TEMPERATURE):
        return moca_fast.info_nce(
            query, document, target, hard_negatives=hard, temperature=temperature, **options
        )

    return function


@pytest.mark.usefixtures("scores")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.kernel
def test_exact(shape, dtype, backend):
    tensors, target = problem(*shape), targets(*shape[:2])
    check(ours(target, backend=backend), plain(target), tensors, dtype)
    check(ours(target, backend=backend), plain(target), tensors[:2], dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.kernel
def test_exact_reductions(reduction, backend):
    tensors, target = problem(20, 30, 2, 16), targets(20, 30)
    op = ours(target, reduction=reduction, backend=backend)
    check(op, plain(target, reduction), tensors, torch.float32)


@pytest.mark.usefixtures("scores")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.kernel
def test_exact_with_ids(backend):
    tensors, target = problem(60, 90, 2, 16), targets(60, 90)
    ids = torch.randint(12, (90,))
    op = ours(target, document_ids=ids, backend=backend)
    exact = plain(target, query_ids=ids[target], document_ids=ids)
    check(op, exact, tensors, torch.float32)
    masks = {"query_ids": torch.randint(12, (60,)), "document_ids": ids}
    check(ours(target, backend=backend, **masks), plain(target, **masks), tensors, torch.float32)


@pytest.mark.usefixtures("scores")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.kernel
def test_exact_at_low_temperature(backend):
    query, document, hard, _ = problem(40, 40, 2, 32)
    document = query + 0.1 * document  # targets stand out: the loss is small, scores are large
    tensors = (query, document, hard, torch.tensor(0.03))
    check(ours(None, backend=backend), plain(torch.arange(40)), tensors, torch.float32)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(4, 60), st.integers(4, 60), st.integers(0, 3), st.integers(4, 40)),
    kinds=st.integers(1, 30),
    seed=st.integers(0, 2**31),
    part=st.integers(1, 30),
)
@pytest.mark.kernel
def test_exact_random_shapes(shape, kinds, seed, part):
    torch.manual_seed(seed)
    tensors, target = problem(*shape), targets(*shape[:2])
    ids = torch.randint(kinds, (shape[1],))
    op = ours(target, document_ids=ids, backend="cpu")
    exact = plain(target, query_ids=ids[target], document_ids=ids)
    check(op, exact, tensors[:3], torch.float32)
    with patch.multiple("moca_fast._gradients", HELD_SCORES=0, PART_ROWS=part):
        check(op, exact, tensors[:3], torch.float32)
    with patch(HELD_ROWS, lambda *_: 0):
        check(op, exact, tensors[:3], torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_everything_else_masked(backend):
    tensors = problem(5, 800, 0, 8)
    ids = torch.zeros(800).long()
    op = ours(None, document_ids=ids, reduction="none", backend=backend)
    for result in run(op, tensors):
        torch.testing.assert_close(result, torch.zeros_like(result), rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous(backend):
    target = targets(20, 30)
    spread = torch.stack([target, target], dim=1)[:, 0]

    def strided(query, document, hard, temperature):
        query, document = query.T.contiguous().T, document.repeat(1, 2)[:, :16]
        hard = hard.transpose(0, 1).contiguous().transpose(0, 1)
        assert not any(t.is_contiguous() for t in (query, document, hard, spread))
        return ours(spread, backend=backend)(query, document, hard, temperature)

    check(strided, plain(target), problem(20, 30, 2, 16), torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("documents", "hard"), [(0, 0), (0, 2), (7, 2)])
def test_empty_batch(documents, hard, backend):
    tensors = problem(0, documents, hard, 8)
    ids = torch.arange(documents)
    for reduction in ("mean", "sum", "none"):
        op = ours(None, document_ids=ids, reduction=reduction, backend=backend)
        for result in run(op, tensors):
            assert torch.equal(result, torch.zeros_like(result))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_row(backend):
    query, document, hard, temperature = problem(6, 70, 1, 8)
    query[2, 3] = torch.nan
    hard[4] = torch.nan
    op = ours(None, reduction="none", backend=backend)
    loss, d_query, d_document, d_hard, _ = run(op, (query, document, hard, temperature))
    assert loss.isnan().nonzero().flatten().tolist() == [2, 4]
    assert d_query[[2, 4]].isnan().all() and not d_query[[0, 1, 3, 5]].isnan().any()
    assert d_document.isnan().all() and not d_hard[0].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needed", [0, 1, 2, 3])
def test_one_gradient_alone(needed, backend):
    tensors, target = problem(60, 70, 2, 16), targets(60, 70)
    whole = run(ours(target, backend=backend), tensors)[1:]
    tensors = [t.clone() for t in tensors]
    tensors[needed].requires_grad_()
    ours(target, backend=backend)(*tensors).backward()
    for place, tensor in enumerate(tensors):
        assert (tensor.grad is None) == (place != needed)
    assert torch.equal(tensors[needed].grad, whole[needed])


@pytest.mark.usefixtures("scores")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_scales_and_repeats(dtype, backend):
    tensors, target = problem(60, 70, 2, 16), targets(60, 70)

    def loss(function):
        return lambda *tensors: 0.3 * function(*tensors)

    check(loss(ours(target, backend=backend)), loss(plain(target)), tensors, dtype)
    tensors = [t.to(dtype).requires_grad_() for t in tensors]
    out = 0.3 * ours(target, backend=backend)(*tensors)
    first = torch.autograd.grad(out, tensors, retain_graph=True)
    assert torch.equal(torch.autograd.grad(out, tensors[1])[0], first[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_gradient_of_a_mean_whose_sum_is_out_of_range(backend):
    query = torch.full((512, 16), 8.0).half()
    document = torch.zeros(4, 16).half().requires_grad_()
    target = torch.zeros(512, dtype=torch.long)
    moca_fast.info_nce(query, document, target, temperature=0.03, backend=backend).backward()
    assert document.grad[0, 0] == -200


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.kernel
def test_bits_do_not_depend_on_runs_or_threads(reduction):
    tensors, target = problem(130, 900, 2, 40), targets(130, 900)
    assert_same_bits_on_threads(ours(target, reduction=reduction, backend="cpu"), tensors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_gives_its_gradients_away(backend):
    """Whoever gets them may change them: another backward makes them again."""
    tensors = [t.requires_grad_() for t in problem(60, 70, 2, 16)]
    loss = ours(targets(60, 70), reduction="sum", backend=backend)(*tensors)
    loss.backward(retain_graph=True)
    first = [t.grad.clone() for t in tensors]
    for times in (2, 3):
        loss.backward(retain_graph=True)
        for tensor, once in zip(tensors, first, strict=True):
            torch.testing.assert_close(tensor.grad, times * once)


def test_scores_never_exist():
    added = added_peak_memory(
        "q = torch.randn(2048, 8, requires_grad=True)\n"
        "d = torch.randn(131072, 8, requires_grad=True)\n"
        "moca_fast.info_nce(q[:5], d[:5], backend='cpu').backward()",
        "moca_fast.info_nce(q, d, backend='cpu').backward()",
    )
    assert added < 64, "the scores would take 1024 MiB"


def test_gradcheck_of_the_reference():
    tensors = [t.double().requires_grad_() for t in problem(4, 6, 2, 5)]
    ids = torch.tensor([0, 1, 2, 0, 1, 4])
    for reduction in ("mean", "sum", "none"):
        op = ours(None, document_ids=ids, reduction=reduction)
        assert torch.autograd.gradcheck(op, tensors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    query, document, hard, temperature = problem(4, 6, 2, 5)
    query.requires_grad_()
    temperature.requires_grad_()
    target, ids = torch.arange(4), torch.arange(6)
    op = torch.ops.moca_fast.info_nce.default
    full = (query, document, target, temperature, hard, ids[target], ids, backend)
    torch.library.opcheck(op, full)
    bare = (query, document, target, temperature, None, None, None, backend)
    torch.library.opcheck(op, bare)
    together = torch.ops.moca_fast.info_nce_with_gradients.default
    for mean in (False, True):
        torch.library.opcheck(together, (*full, [True, False, False, True], mean))
        torch.library.opcheck(together, (*bare, [True, False, False, True], mean))


def test_compiles_whole():
    tensors = problem(9, 11, 2, 8)
    op = ours(None, document_ids=torch.arange(11) // 2)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for got, expected in zip(run(compiled, tensors), run(op, tensors), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", [-1, 7])
@pytest.mark.parametrize("with_ids", [False, True])
def test_target_out_of_range(with_ids, wrong, backend):
    query, document, *_ = problem(4, 7, 0, 8)
    target = torch.tensor([0, 1, wrong, 2])
    ids = torch.arange(7) if with_ids else None
    with pytest.raises(IndexError):
        moca_fast.info_nce(query, document, target, document_ids=ids, backend=backend)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.zeros(4)}, ValueError, r"query: expected shape \(B, D\), got \(4,\)"),
        ({"document": torch.zeros(6, 7)}, ValueError, r"document.*\(M, 8\), got \(6, 7\)"),
        ({"document": torch.zeros(6, 8).half()}, TypeError, "document.*float32, got float16"),
        ({"document": torch.zeros(6, 8, device="meta")}, ValueError, "device cpu, got meta"),
        ({"document": torch.zeros(3, 8)}, ValueError, "at least B = 4 rows.*got 3"),
        ({"hard_negatives": torch.zeros(3, 2, 8)}, ValueError, r"\(4, K, 8\), got \(3, 2, 8\)"),
        ({"target": torch.zeros(3).long()}, ValueError, r"target.*\(4,\), got \(3,\)"),
        ({"target": torch.zeros(4)}, TypeError, "target.*int64, got float32"),
        ({"query_ids": torch.zeros(4).long()}, ValueError, "document_ids beside them"),
        ({"document_ids": torch.zeros(5).long()}, ValueError, r"document_ids.*\(6,\), got \(5,\)"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a number above 0, got 0.0"),
        ({"temperature": 1e-50}, ValueError, "temperature: expected 1.2e-38 to 3.4e.38, got 1e-50"),
        ({"temperature": torch.tensor(1e-40)}, ValueError, "expected 1.2e-38 to 3.4e.38, got 9.9"),
        ({"temperature": 1e300}, ValueError, r"expected 1.2e-38 to 3.4e.38, got 1e\+300"),
        ({"temperature": torch.tensor(math.inf)}, ValueError, "expected a finite number, got inf"),
        ({"temperature": math.nan}, ValueError, "temperature: expected a finite number, got nan"),
        ({"temperature": None}, TypeError, "temperature: expected a number or a 0-d.*got None"),
        ({"temperature": torch.tensor(-1.0)}, ValueError, r"temperature: .*above 0, got -1\.0"),
        ({"temperature": torch.ones(1)}, ValueError, r"temperature.*\(\), got \(1,\)"),
        ({"reduction": "max"}, ValueError, "reduction.*'max'"),
    ],
)
def test_refusals(change, error, message):
    query, document, hard, _ = problem(4, 6, 2, 8)
    call = {"query": query, "document": document, "hard_negatives": hard, **change}
    with pytest.raises(error, match=message):
        moca_fast.info_nce(**call)
