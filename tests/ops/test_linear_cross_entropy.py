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

from moca_fast import linear_cross_entropy

IGNORED = -100
SHAPES = [(1, 1, 2), (6, 0, 9), (7, 5, 3), (50, 33, 101), (131, 70, 801)]  # T, D, V


def problem(tokens: int, dim: int, vocabulary: int) -> list[Tensor]:
    """Hidden, weight, bias, labels."""
    labels = torch.randint(vocabulary, (tokens,))
    labels[1::3] = IGNORED
    weight = torch.randn(vocabulary, dim) / max(dim, 1) ** 0.5
    return [torch.randn(tokens, dim), weight, torch.randn(vocabulary), labels]


def plain(labels: Tensor, reduction: str = "mean", ignore_index: int = IGNORED):
    def function(hidden, weight, bias=None):
        logits = F.linear(hidden, weight, bias)
        return F.cross_entropy(logits, labels, reduction=reduction, ignore_index=ignore_index)

    return function


def ours(labels: Tensor, **options):
    def function(hidden, weight, bias=None):
        return linear_cross_entropy(hidden, weight, labels, bias=bias, **options)

    return function


@pytest.mark.usefixtures("scores")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.kernel
def test_exact(shape, dtype, backend):
    hidden, weight, bias, labels = problem(*shape)
    for tensors in ((hidden, weight, bias), (hidden, weight)):
        check(ours(labels, backend=backend), plain(labels), tensors, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.kernel
def test_exact_reductions(reduction, backend):
    *tensors, labels = problem(90, 24, 77)
    labels[labels == IGNORED] = 5
    op = ours(labels, reduction=reduction, ignore_index=5, backend=backend)
    check(op, plain(labels, reduction, ignore_index=5), tensors, torch.float32)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(4, 60), st.integers(4, 40), st.integers(2, 70)),
    scale=st.sampled_from([0.1, 1.0, 20.0]),
    seed=st.integers(0, 2**31),
)
@pytest.mark.kernel
def test_exact_random_shapes(shape, scale, seed):
    torch.manual_seed(seed)
    hidden, weight, bias, labels = problem(*shape)
    op = ours(labels, backend="cpu")
    check(op, plain(labels), (hidden * scale, weight, bias), torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_gradient_of_a_mean_whose_sum_is_out_of_range(backend):
    hidden = torch.full((2048, 16), 33.0).half()
    weight = torch.zeros(1000, 16).half().requires_grad_()
    labels = torch.zeros(2048, dtype=torch.long)
    linear_cross_entropy(hidden, weight, labels, backend=backend).backward()
    torch.testing.assert_close(weight.grad[0], torch.full((16,), -33 * 0.999).half())


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous(backend):
    *tensors, labels = problem(30, 20, 40)
    spread = torch.stack([labels, labels], dim=1)[:, 0]

    def strided(hidden, weight, bias):
        hidden, weight = hidden.T.contiguous().T, weight.repeat(1, 2)[:, :20]
        bias = torch.stack([bias, bias], dim=1)[:, 0]
        assert not any(t.is_contiguous() for t in (hidden, weight, bias, spread))
        return ours(spread, backend=backend)(hidden, weight, bias)

    check(strided, plain(labels), tensors, torch.float32)


@pytest.mark.usefixtures("scores")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocabulary", [0, 9])
@pytest.mark.parametrize("tokens", [0, 6])
def test_no_row_counts(tokens, vocabulary, backend):
    hidden, weight, bias, _ = problem(max(tokens, 1), 8, 9)
    weight, bias = weight[:vocabulary], bias[:vocabulary]
    labels = torch.full((tokens,), IGNORED)
    for reduction in ("mean", "sum", "none"):
        op = ours(labels, reduction=reduction, backend=backend)
        for result in run(op, (hidden[:tokens], weight, bias)):
            assert torch.equal(result, torch.zeros_like(result))


@pytest.mark.usefixtures("scores")
@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_rows_are_not_read(backend):
    hidden, weight, _, labels = problem(20, 8, 9)
    ignored = labels == IGNORED
    hidden[ignored] = torch.nan
    loss, d_hidden, d_weight = run(ours(labels, backend=backend), (hidden, weight))
    assert loss.isfinite() and d_weight.isfinite().all()
    assert torch.equal(d_hidden[ignored], torch.zeros_like(hidden[ignored]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_row(backend):
    hidden, weight, _, labels = problem(9, 8, 70)
    hidden[2, 3] = torch.nan
    op = ours(labels, reduction="none", backend=backend)
    loss, d_hidden, d_weight = run(op, (hidden, weight))
    assert loss.isnan().nonzero().flatten().tolist() == [2]
    assert d_hidden[2].isnan().all() and not d_hidden[[0, 3]].isnan().any()
    assert d_weight.isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needed", [0, 1, 2])
def test_one_gradient_alone(needed, backend):
    *tensors, labels = problem(60, 16, 50)
    whole = run(ours(labels, backend=backend), tensors)[1:]
    tensors[needed].requires_grad_()
    ours(labels, backend=backend)(*tensors).backward()
    for place, tensor in enumerate(tensors):
        assert (tensor.grad is None) == (place != needed)
    assert torch.equal(tensors[needed].grad, whole[needed])


@pytest.mark.usefixtures("scores")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_scales_and_repeats(dtype, backend):
    *tensors, labels = problem(60, 16, 50)

    def loss(function):
        return lambda *tensors: 0.3 * function(*tensors)

    check(loss(ours(labels, backend=backend)), loss(plain(labels)), tensors, dtype)
    tensors = [t.to(dtype).requires_grad_() for t in tensors]
    out = 0.3 * ours(labels, backend=backend)(*tensors)
    first = torch.autograd.grad(out, tensors, retain_graph=True)
    assert torch.equal(torch.autograd.grad(out, tensors[1])[0], first[1])


@pytest.mark.kernel
def test_bits_do_not_depend_on_runs_or_threads():
    *tensors, labels = problem(130, 40, 900)
    assert_same_bits_on_threads(ours(labels, reduction="none", backend="cpu"), tensors)


def test_logits_never_exist():
    added = added_peak_memory(
        "x = torch.randn(2048, 8, requires_grad=True)\n"
        "w = torch.randn(131072, 8, requires_grad=True)\n"
        "labels = torch.arange(2048)\n"
        "moca_fast.linear_cross_entropy(x[:5], w[:5], labels[:5], backend='cpu').backward()",
        "moca_fast.linear_cross_entropy(x, w, labels, backend='cpu').backward()",
    )
    assert added < 64, "the logits would take 1024 MiB"


def test_gradcheck_of_the_reference():
    *tensors, labels = problem(6, 4, 7)
    tensors = [t.double().requires_grad_() for t in tensors]
    for reduction in ("mean", "sum", "none"):
        assert torch.autograd.gradcheck(ours(labels, reduction=reduction), tensors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    hidden, weight, bias, labels = problem(9, 8, 11)
    hidden.requires_grad_()
    op = torch.ops.moca_fast.linear_cross_entropy.default
    torch.library.opcheck(op, (hidden, weight, labels, bias, IGNORED, backend))
    torch.library.opcheck(op, (hidden, weight.requires_grad_(), labels, None, IGNORED, backend))


def test_compiles_whole():
    *tensors, labels = problem(9, 8, 11)
    compiled = torch.compile(ours(labels), fullgraph=True, backend="aot_eager")
    for got, expected in zip(run(compiled, tensors), run(ours(labels), tensors), strict=True):
        assert torch.equal(got, expected)


def test_autocast_casts_as_linear_does():
    *tensors, labels = problem(9, 8, 11)
    half = [t.bfloat16() for t in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(labels)(*tensors)
    assert torch.equal(loss, ours(labels)(*half))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("label", [-1, 11])
def test_label_out_of_range(label, backend):
    hidden, weight, bias, labels = problem(9, 8, 11)
    labels[4] = label
    with pytest.raises(IndexError, match=rf"labels\[4\].*0 to 10.*got {label}"):
        linear_cross_entropy(hidden, weight, labels, bias=bias, backend=backend)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.zeros(9)}, ValueError, r"hidden: expected shape \(T, D\), got \(9,\)"),
        ({"weight": torch.zeros(11, 7)}, ValueError, r"weight.*\(V, 8\), got \(11, 7\)"),
        ({"weight": torch.zeros(11, 8).half()}, TypeError, "weight.*float32, got float16"),
        ({"weight": torch.zeros(11, 8, device="meta")}, ValueError, "device cpu, got meta"),
        ({"labels": torch.zeros(8).long()}, ValueError, r"labels.*\(9,\), got \(8,\)"),
        ({"labels": torch.zeros(9).int()}, TypeError, "labels.*int64, got int32"),
        ({"bias": torch.zeros(10)}, ValueError, r"bias.*\(11,\), got \(10,\)"),
        ({"hidden": [1.0]}, TypeError, "hidden: expected a tensor, got list"),
        (
            {"ignore_index": -100.0},
            TypeError,
            r"ignore_index: .* whole number, got -100\.0",
        ),
        ({"reduction": "max"}, ValueError, "reduction.*'max'"),
        ({"backend": "fast"}, ValueError, "backend.*'fast'"),
    ],
)
def test_refusals(change, error, message):
    hidden, weight, bias, labels = problem(9, 8, 11)
    call = {"hidden": hidden, "weight": weight, "labels": labels, "bias": bias, **change}
    with pytest.raises(error, match=message):
        linear_cross_entropy(**call)


def test_cpu_refuses_float64():
    hidden, weight, _, labels = problem(9, 8, 11)
    with pytest.raises(ValueError, match="float64 has no native kernel"):
        linear_cross_entropy(hidden.double(), weight.double(), labels, backend="cpu")
