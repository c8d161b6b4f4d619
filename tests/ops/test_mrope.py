import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import BACKENDS, DTYPES, assert_same_bits_on_threads, check, run
from torch import Tensor

from moca_fast import mrope

SHAPES = [(1, 1, 1, 2), (5, 3, 1, 16), (7, 4, 2, 80), (33, 6, 2, 128), (40, 2, 2, 38)]  # T H Hkv D
MODELS = {  # the rotary modules and functions of transformers, and how they share out pairs
    "qwen2_vl": ("Qwen2VLConfig", "Qwen2VLRotaryEmbedding", [4, 6, 6], False),
    "qwen2_5_vl": ("Qwen2_5_VLConfig", "Qwen2_5_VLRotaryEmbedding", [4, 6, 6], False),
    "qwen3_vl": ("Qwen3VLConfig", "Qwen3VLTextRotaryEmbedding", [6, 5, 5], True),
}


def problem(tokens: int, heads: int, kv_heads: int, dim: int) -> list[Tensor]:
    """q, k, and tables that are no cosines and sines: nothing may be assumed of them."""
    shapes = (tokens, heads, dim), (tokens, kv_heads, dim), (tokens, dim), (tokens, dim)
    return [torch.randn(shape) for shape in shapes]


def plain(cos: Tensor, sin: Tensor):
    """What transformers' models do in eager torch, q and k side by side."""

    def turned(x):
        first, second = x.chunk(2, dim=-1)
        across = torch.cat([-second, first], dim=-1)
        return (x * cos.to(x.dtype)[:, None] + across * sin.to(x.dtype)[:, None]).flatten(1)

    return lambda q, k: torch.cat([turned(q), turned(k)], dim=1)


def ours(cos: Tensor, sin: Tensor, **options):
    def function(q, k):
        return torch.cat([x.flatten(1) for x in mrope(q, k, cos, sin, **options)], dim=1)

    return function


def axis_of(pair: int, section: list[int], interleaved: bool) -> int:
    """0, 1, 2 for the pairs that turn by time, height, width."""
    if not interleaved:
        return (pair >= section[0]) + (pair >= section[0] + section[1])
    axis, place = pair % 3, pair // 3
    return axis if place < section[axis] else 0


def merged(tables: Tensor, section: list[int], interleaved: bool) -> Tensor:
    """(T, D) of (3, T, D), pair by pair."""
    half = tables.shape[2] // 2
    axes = [axis_of(pair % half, section, interleaved) for pair in range(2 * half)]
    return torch.stack([tables[axis, :, dim] for dim, axis in enumerate(axes)], dim=1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tables", [None, torch.float32], ids=["same", "float32"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.kernel
def test_exact(shape, dtype, tables, backend):
    q, k, cos, sin = problem(*shape)
    cos, sin = cos.to(tables or dtype), sin.to(tables or dtype)
    check(ours(cos, sin, backend=backend), plain(cos, sin), [q, k], dtype)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 5), st.integers(1, 3), st.integers(1, 40)),
    cuts=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    interleaved=st.booleans(),
    seed=st.integers(0, 2**31),
)
@pytest.mark.kernel
def test_exact_random_shapes_and_sections(shape, cuts, interleaved, seed):
    torch.manual_seed(seed)
    *sizes, half = shape
    q, k, _, _ = problem(*sizes, 2 * half)
    first, second = sorted(int(cut * half) for cut in cuts)
    section = [first, second - first, half - second]
    cos, sin = torch.randn(2, 3, sizes[0], 2 * half)
    want = plain(*(merged(table, section, interleaved) for table in (cos, sin)))
    options = {"mrope_section": section, "interleaved": interleaved}
    for backend in BACKENDS:
        check(ours(cos, sin, backend=backend, **options), want, [q, k], torch.float32)


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_transformers(architecture, backend):
    modeling = pytest.importorskip(f"transformers.models.{architecture}.modeling_{architecture}")
    config_name, module, section, interleaved = MODELS[architecture]
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": section}
    text = {"hidden_size": 128, "num_attention_heads": 4, "head_dim": 32, "rope_parameters": rope}
    config = getattr(modeling, config_name)(text_config=text).text_config
    rotary = getattr(modeling, module)(config)
    positions = torch.randint(0, 50, (3, 1, 9))
    q, k = torch.randn(1, 4, 9, 32), torch.randn(1, 2, 9, 32)
    cos, sin = rotary(q, positions)
    want = modeling.apply_rotary_pos_emb(q, k, cos, sin)
    packed = q[0].transpose(0, 1), k[0].transpose(0, 1)
    angle = (positions[:, 0, :, None] * rotary.inv_freq).repeat(1, 1, 2)
    options = {"mrope_section": section, "interleaved": interleaved, "backend": backend}
    for got in (
        mrope(*packed, cos[0], sin[0], backend=backend),
        mrope(*packed, angle.cos(), angle.sin(), **options),
    ):
        for x, expected in zip(got, want, strict=True):
            torch.testing.assert_close(x.transpose(0, 1)[None], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_turns_back(backend):
    """Where cos^2 + sin^2 = 1 the gradient of the result is the input again."""
    q, k, angle, _ = problem(6, 3, 2, 16)
    angle = angle[:, :8].repeat(1, 2)
    q, k = q.requires_grad_(), k.requires_grad_()
    out = mrope(q, k, angle.cos(), angle.sin(), backend=backend)
    gradients = torch.autograd.grad(out, (q, k), out)
    torch.testing.assert_close(gradients, (q, k))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needed", [0, 1])
def test_partial_gradients(needed, backend):
    q, k, cos, sin = problem(6, 3, 2, 16)
    both = run(ours(cos, sin, backend=backend), [q, k])
    leaves = [q, k]
    leaves[needed] = leaves[needed].requires_grad_()
    out = ours(cos, sin, backend=backend)(*leaves)
    out.backward(torch.linspace(-0.9, 1.1, out.numel()).reshape(out.shape))
    assert torch.equal(leaves[needed].grad, both[1 + needed])
    assert leaves[1 - needed].grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_one_result(backend):
    q, k, cos, sin = (x.requires_grad_(i < 2) for i, x in enumerate(problem(6, 3, 2, 16)))
    mrope(q, k, cos, sin, backend=backend)[0].sum().backward()
    assert (q.grad != 0).any() and torch.equal(k.grad, torch.zeros_like(k))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3, 2, 16), (4, 0, 2, 16), (4, 3, 0, 16), (4, 3, 2, 0)])
def test_empty(shape, backend):
    q, k, cos, sin = problem(*shape)
    out, d_q, d_k = run(ours(cos, sin, backend=backend), [q, k])
    assert d_q.shape == q.shape and d_k.shape == k.shape and out.isfinite().all()


def layouts(q: Tensor, k: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The same q and k: in a fused projection, heads before tokens, dims before heads, expanded."""
    heads, kv_heads = q.shape[1], k.shape[1]
    fused = torch.cat([q, k, k], dim=1)
    return [
        (fused[:, :heads], fused[:, heads : heads + kv_heads]),
        tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k)),
        tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)),
        (q, k[:, :1].expand(-1, kv_heads, -1)),
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.kernel
def test_any_layout(backend):
    q, k, cos, sin = problem(5, 3, 2, 16)
    k[:, 1] = k[:, 0]
    want = mrope(q, k, cos, sin, backend=backend)
    for strided in layouts(q, k):
        for tables in ((cos, sin), (cos.T.contiguous().T, sin.T.contiguous().T)):
            got = mrope(*strided, *tables, backend=backend)
            assert all(
                torch.equal(a, b) and a.is_contiguous() for a, b in zip(got, want, strict=True)
            )


@pytest.mark.kernel
def test_bits_do_not_depend_on_runs_or_threads():
    q, k, cos, sin = problem(130, 3, 2, 38)
    assert_same_bits_on_threads(ours(cos, sin, backend="cpu"), [q, k])


def test_gradcheck_of_the_reference():
    q, k, cos, sin = (x.double() for x in problem(3, 2, 1, 6))
    q, k = q.requires_grad_(), k.requires_grad_()
    assert torch.autograd.gradcheck(ours(cos, sin), (q, k))
    cos, sin = torch.randn(2, 3, 3, 6, dtype=torch.float64)
    for interleaved in (False, True):
        op = ours(cos, sin, mrope_section=[1, 1, 1], interleaved=interleaved)
        assert torch.autograd.gradcheck(op, (q, k))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    q, k, cos, sin = problem(4, 3, 2, 16)
    q, k = q.requires_grad_(), k.requires_grad_()
    op = torch.ops.moca_fast.mrope.default
    torch.library.opcheck(op, (q, k, cos, sin, [], False, backend))
    tables = cos.expand(3, -1, -1), sin.expand(3, -1, -1)
    torch.library.opcheck(op, (q, k, *tables, [2, 3, 3], True, backend))


def test_compiles_whole():
    q, k, cos, sin = problem(4, 3, 2, 16)
    op = ours(cos, sin)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for got, expected in zip(run(compiled, [q, k]), run(op, [q, k]), strict=True):
        assert torch.equal(got, expected)


def test_autocast_leaves_the_dtype_alone():
    q, k, cos, sin = problem(4, 3, 2, 16)
    want = mrope(q.bfloat16(), k.bfloat16(), cos, sin)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = mrope(q.bfloat16(), k.bfloat16(), cos, sin)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


THREE = torch.zeros(3, 5, 16)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(5, 16)}, ValueError, r"q: expected shape \(T, H, D\), got \(5, 16\)"),
        ({"q": torch.zeros(5, 3, 15)}, ValueError, "even D, got 15"),
        ({"q": torch.zeros(5, 3, 16).int()}, TypeError, "q.*got int32"),
        ({"k": torch.zeros(4, 2, 16)}, ValueError, r"k: expected shape \(5, Hkv, 16\), got \(4"),
        ({"k": torch.zeros(5, 2, 16).half()}, TypeError, "k: expected dtype float32, got float16"),
        ({"cos": torch.zeros(5, 8)}, ValueError, r"cos: expected shape \(5, 16\), got \(5, 8\)"),
        ({"cos": THREE}, ValueError, r"cos: expected shape \(5, 16\), got \(3, 5, 16\)"),
        ({"mrope_section": [2, 3, 3]}, ValueError, r"cos: expected shape \(3, 5, 16\), got \(5,"),
        ({"sin": torch.zeros(5, 16).half()}, TypeError, "sin: expected dtype float32, got float16"),
        ({"sin": torch.zeros(5, 16, device="meta")}, ValueError, "device cpu, got meta"),
        ({"sin": torch.zeros(5, 16).requires_grad_()}, ValueError, "get no gradient; detach"),
        (
            {"cos": THREE, "sin": THREE, "mrope_section": [2, 3, 4]},
            ValueError,
            r"three numbers of pairs, D / 2 = 8 in all, got \(2, 3, 4\)",
        ),
        ({"cos": THREE, "sin": THREE, "mrope_section": [4, 4]}, ValueError, r"got \(4, 4\)"),
        ({"cos": THREE, "sin": THREE, "mrope_section": [9, 0, -1]}, ValueError, "three numbers"),
        (
            {"cos": THREE, "sin": THREE, "mrope_section": [2.0, 3, 3]},
            TypeError,
            r"mrope_section: expected a whole number, got 2\.0",
        ),
        ({"cos": THREE, "sin": THREE, "mrope_section": 8}, TypeError, "three numbers.*, got 8"),
        ({"interleaved": True}, ValueError, "expected an mrope_section with it"),
        ({"interleaved": 1}, TypeError, "interleaved: expected True or False, got 1"),
        ({"backend": "cuda"}, ValueError, "holds no CUDA code|tensors are on cpu"),
    ],
)
def test_refusals(change, error, message):
    q, k, cos, sin = problem(5, 3, 2, 16)
    with pytest.raises(error, match=message):
        mrope(**{"q": q, "k": k, "cos": cos, "sin": sin, **change})
