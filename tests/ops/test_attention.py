"""attention against a float64 oracle that shares no code with it: a loop over queries and heads."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import DTYPES, added_peak_memory, assert_close_to_exact, poisoned_memory
from torch import Tensor

from moca_fast import SpanMask, attention

NAMES = ("out", "lse", "d_q", "d_k", "d_v")


def cu(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def oracle(q, k, v, mask: SpanMask, scale: float) -> tuple[Tensor, Tensor]:
    """Row by row over the keys that each one sees; a loop, so that it needs no mask at all."""
    group = q.shape[1] // k.shape[1]
    outs, lses = [], []
    for i, (start, end) in enumerate(zip(mask.start.tolist(), mask.end.tolist(), strict=True)):
        for h in range(q.shape[1]):
            if start == end:
                outs.append(0 * q[i, h])
                lses.append(0 * q[i, h, 0] - math.inf)
                continue
            scores = k[start:end, h // group] @ q[i, h] * scale
            outs.append(scores.softmax(0) @ v[start:end, h // group])
            lses.append(scores.logsumexp(0))
    nothing = 0 * (q.sum() + k.sum() + v.sum())  # keeps every input in the graph
    if not outs:
        return q + nothing, q.sum(-1)
    return torch.stack(outs).view(q.shape) + nothing, torch.stack(lses).view(q.shape[:2])


def plain(q, k, v, mask: SpanMask, scale: float) -> tuple[Tensor, Tensor]:
    """What one writes in eager torch: all scores at once, in the dtype of q."""
    group = q.shape[1] // k.shape[1]
    queries, keys, values = (
        x.transpose(0, 1) for x in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))
    )
    visible = mask.dense()
    scores = (queries @ keys.transpose(1, 2) * scale).masked_fill(~visible, -math.inf)
    weights = scores.softmax(-1).masked_fill(~visible, 0)
    return (weights @ values).transpose(0, 1), scores.logsumexp(-1).t()


def make(mask, heads, kv_heads, dim, dtype, seed=0) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes = [(mask.num_queries, heads, dim)] + [(mask.num_keys, kv_heads, dim)] * 2
    shapes += [(mask.num_queries, heads, dim), (mask.num_queries, heads)]
    return [torch.randn(shape, generator=random).to(dtype) for shape in shapes]


def grads(function, inputs: list[Tensor]) -> list[Tensor]:
    """Output, lse and all gradients, for given gradients of output and (finite) lse."""
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    out, lse = function(q, k, v)
    seen = lse.isfinite()
    d_lse = torch.where(seen, inputs[4].to(lse.dtype), 0)
    gradients = torch.autograd.grad([out, lse], [q, k, v], [inputs[3].to(out.dtype), d_lse])
    return [out.detach(), torch.where(seen, lse.detach(), 0), *gradients]


def check(mask, heads=4, kv_heads=2, dim=24, dtype=torch.float32, backend="cpu", scale=None):
    inputs = make(mask, heads, kv_heads, dim, dtype)
    factor = dim**-0.5 if scale is None else scale
    with poisoned_memory():
        got = grads(
            lambda q, k, v: attention(
                q, k, v, mask, softmax_scale=scale, return_lse=True, backend=backend
            ),
            inputs,
        )
    usual = grads(lambda q, k, v: plain(q, k, v, mask, factor), inputs)
    exact = grads(lambda q, k, v: oracle(q, k, v, mask, factor), [x.double() for x in inputs])
    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    for name, *values in zip(NAMES, got, usual, exact, strict=True):
        assert_close_to_exact(*values, dtype, name)


def masks() -> dict[str, SpanMask]:
    lengths = cu(20, 0, 1, 37, 0)
    images = torch.tensor([[3, 10], [10, 12], [25, 50]])
    return {
        "full": SpanMask.full(lengths),
        "full, tokens past the end": SpanMask.full(lengths, total=61),
        "causal": SpanMask.causal(lengths, total=60),
        "window": SpanMask.window(lengths, 5, 2),
        "half window": SpanMask.window(lengths, None, 0),
        "image blocks": SpanMask.image_blocks(lengths, images),
        "one token": SpanMask.full(cu(1)),
        "no token": SpanMask.full(cu(0, 0)),
        "nothing seen": SpanMask.full(cu(0), total=5),
        "long": SpanMask.full(cu(260, 3)),
        "long, causal": SpanMask.causal(cu(5, 200)),
    }


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.kernel
def test_masks(name, backend):
    check(masks()[name], backend=backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.kernel
def test_dtypes(dtype, backend):
    check(SpanMask.full(cu(33, 1, 17)), dim=40, dtype=dtype, backend=backend)


@pytest.mark.parametrize("dim", [16, 24, 80, 128, 256])
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (6, 1), (9, 3)])
@pytest.mark.kernel
def test_shapes(dim, heads, kv_heads):
    check(SpanMask.full(cu(7, 61)), heads=heads, kv_heads=kv_heads, dim=dim)


def test_softmax_scale():
    check(SpanMask.full(cu(80)), scale=0.3)
    check(SpanMask.full(cu(80)), scale=0.0)
    check(SpanMask.full(cu(80)), scale=-0.3)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
@pytest.mark.kernel
def test_random_spans(data):
    """Any monotone spans, with another number of keys than of queries."""
    queries = data.draw(st.integers(1, 40))
    keys = data.draw(st.integers(1, 150))
    ends = st.lists(st.integers(0, keys), min_size=queries, max_size=queries)
    start = torch.tensor(sorted(data.draw(ends)), dtype=torch.int32)
    end = torch.maximum(start, torch.tensor(sorted(data.draw(ends)), dtype=torch.int32))
    kv_heads = data.draw(st.integers(1, 2))
    heads = kv_heads * data.draw(st.integers(1, 5))
    dim = 8 * data.draw(st.integers(2, 6))
    mask = SpanMask(start, end, keys)
    inputs = make(mask, heads, kv_heads, dim, torch.float32)
    with poisoned_memory():
        got = grads(lambda *x: attention(*x, mask, return_lse=True, backend="cpu"), inputs)
    doubles = [x.double() for x in inputs]
    exact = grads(lambda *x: oracle(*x, mask, dim**-0.5), doubles)
    # So few numbers that plain torch may be exact by chance: a bound of a few roundings instead.
    torch.testing.assert_close(got, [x.float() for x in exact], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [None, -0.3, 0.0])
def test_single_key_is_exact(scale):
    """A row with one key returns its value, and there is nothing to learn about the score."""
    mask = SpanMask.full(torch.arange(65, dtype=torch.int32))
    for dtype in DTYPES:
        q, k, v, d_out, _ = make(mask, 2, 2, 40, dtype)
        leaves = [(8 * x).requires_grad_() for x in (q, k, v)]
        q, k, v = leaves
        out = attention(q, k, v, mask, softmax_scale=scale, backend="cpu")
        d_q, d_k, d_v = torch.autograd.grad(out, leaves, d_out)
        assert torch.equal(out, v) and torch.equal(d_v, d_out)
        assert not d_q.any() and not d_k.any()


@pytest.mark.kernel
def test_empty_rows():
    mask = SpanMask.full(cu(3), total=6)
    q, k, v, d_out, _ = make(mask, 2, 1, 16, torch.float32)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    for backend in ("cpu", "reference"):
        with poisoned_memory():
            out, lse = attention(q, k, v, mask, return_lse=True, backend=backend)
            gradients = torch.autograd.grad(out, leaves, d_out)
        assert not out[3:].any() and (lse[3:] == -math.inf).all()
        assert all(not x[3:].any() and x[:3].any() for x in gradients)


@pytest.mark.kernel
def test_strided_inputs():
    mask = SpanMask.causal(cu(21, 30))
    fused = torch.randn(51, 4, 3, 32)
    q, k, v = (x.requires_grad_() for x in fused.unbind(2))
    strange = torch.randn(32, 51, 4).permute(1, 2, 0)
    for inputs in ((q, k[:, ::2], v[:, 1:3]), (strange, strange[:, :2], strange[:, 2:])):
        want = attention(*(x.contiguous() for x in inputs), mask, backend="cpu")
        assert torch.equal(attention(*inputs, mask, backend="cpu"), want)
    d_out = torch.randn(4, 51, 32).transpose(0, 1)
    got = torch.autograd.grad(attention(q, k, v, mask, backend="cpu"), [q, k, v], d_out)
    copies = [x.detach().contiguous().requires_grad_() for x in (q, k, v)]
    out = attention(*copies, mask, backend="cpu")
    want = torch.autograd.grad(out, copies, d_out.contiguous())
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_partial_requires_grad(needed):
    mask = SpanMask.full(cu(9, 14))
    inputs = make(mask, 2, 1, 16, torch.float32)
    want = grads(lambda q, k, v: attention(q, k, v, mask, return_lse=True), inputs)
    leaves = [x.clone().requires_grad_(i in needed) for i, x in enumerate(inputs[:3])]
    out, lse = attention(*leaves, mask, return_lse=True)
    torch.autograd.backward([out, lse], [inputs[3], inputs[4]])
    for i, x in enumerate(leaves):
        assert torch.equal(x.grad, want[2 + i]) if i in needed else x.grad is None


def test_gradcheck():
    mask = SpanMask.causal(cu(4, 0, 3), total=8)
    inputs = [x.double().requires_grad_() for x in make(mask, 4, 2, 16, torch.float32)[:3]]
    assert torch.autograd.gradcheck(lambda *x: attention(*x, mask), inputs)


@pytest.mark.kernel
def test_threads_do_not_change_a_bit():
    mask = SpanMask.full(cu(130, *range(1, 30)))
    inputs = make(mask, 4, 2, 32, torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            results.append(grads(lambda q, k, v: attention(q, k, v, mask, return_lse=True), inputs))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_packing_does_not_change_a_bit():
    """A document gives the same bits alone as between others, long or short."""
    lengths = [7, 600, 1, 40, 256, 257, 20]
    mask = SpanMask.full(cu(*lengths))
    q, k, v, *_ = make(mask, 2, 1, 32, torch.bfloat16)
    packed = attention(q, k, v, mask).split(lengths)
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), packed, strict=True)
    for *inputs, want in parts:
        alone = SpanMask.full(cu(len(want)))
        assert torch.equal(attention(*inputs, alone), want)


@pytest.mark.parametrize("spoiled", ["q", "k", "v", "d_out"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_stays_in_its_document(spoiled, value):
    mask = SpanMask.full(cu(5, 9, 110, 3))
    inputs = make(mask, 2, 1, 16, torch.float32)
    clean = grads(lambda *x: attention(*x, mask, return_lse=True, backend="cpu"), inputs)
    inputs[("q", "k", "v", "d_out").index(spoiled)][8, 0, 3] = value
    got = grads(lambda *x: attention(*x, mask, return_lse=True, backend="cpu"), inputs)
    inside = torch.zeros(127, dtype=torch.bool)
    inside[5:14] = True
    for name, x, y in zip(NAMES, got, clean, strict=True):
        assert torch.equal(x[~inside], y[~inside]), name
    assert not all(x[inside].isfinite().all() for x in got)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_what_nobody_sees_reaches_nobody(backend):
    mask = SpanMask.causal(cu(3, 40), total=50)
    inputs = make(mask, 2, 1, 16, torch.float32)
    run = lambda *x: attention(*x, mask, return_lse=True, backend=backend)  # noqa: E731
    clean = grads(run, inputs)
    for x in inputs[:4]:
        x[43:] = math.nan
    assert all(map(torch.equal, grads(run, inputs), clean))
    assert not any(x[43:].any() for x in (clean[0], *clean[2:]))


def test_hidden_nan_does_not_reach_causal_rows():
    mask = SpanMask.causal(cu(40))
    q, k, v, *_ = make(mask, 1, 1, 16, torch.float32)
    clean = attention(q, k, v, mask, backend="cpu")
    k[30], v[31] = math.nan, math.nan
    got = attention(q, k, v, mask, backend="cpu")
    assert torch.equal(got[:30], clean[:30]) and got[31:].isnan().all()


def test_large_scores():
    mask = SpanMask.full(cu(70))
    q, k, v, *_ = make(mask, 1, 1, 16, torch.float32)
    got = attention(q * 200, k * 200, v, mask, backend="cpu")
    exact = oracle(q.double() * 200, k.double() * 200, v.double(), mask, 0.25)[0]
    usual = plain(q * 200, k * 200, v, mask, 0.25)[0]
    assert_close_to_exact(got, usual, exact, torch.float32)


def test_deterministic_backward():
    mask = SpanMask.full(cu(50, 20))
    inputs = make(mask, 4, 1, 16, torch.float32)
    for deterministic in (False, True):
        runs = [
            grads(
                lambda q, k, v, d=deterministic: attention(
                    q, k, v, mask, return_lse=True, deterministic=d
                ),
                inputs,
            )
            for _ in range(2)
        ]
        assert all(map(torch.equal, *runs))


def test_opcheck():
    mask = SpanMask.causal(cu(5, 6), total=12)
    q, k, v, d_out, d_lse = make(mask, 2, 1, 16, torch.float32)
    keys = mask.transposed()
    spans = [mask.start, mask.end, mask.tiles(96), keys.start, keys.end, keys.tiles(96)]
    for backend in ("cpu", "reference"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        arguments = (*leaves, spans, 0.25, backend)
        torch.library.opcheck(torch.ops.moca_fast.attention.default, arguments)
        outputs = torch.ops.moca_fast.attention(q, k, v, spans, 0.25, backend)
        arguments = (d_out, d_lse, q, k, v, *outputs, spans, 0.25, backend)
        torch.library.opcheck(torch.ops.moca_fast.attention_backward.default, arguments)
    torch.library.opcheck(
        torch.ops.moca_fast.span_tiles.default, (mask.start, mask.end, mask.num_keys, 96)
    )


class Layers(torch.nn.Module):
    """Two attention layers that share a mask, or make it from cu_seqlens themselves."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(32, 96) for _ in range(2))

    def forward(self, x: Tensor, mask: SpanMask | Tensor) -> Tensor:
        if isinstance(mask, Tensor):
            mask = SpanMask.full(mask, total=x.shape[0])
        for layer in self.layers:
            q, k, v = layer(x).unflatten(-1, (3, 2, 16)).unbind(1)
            x = x + attention(q, k, v, mask).flatten(1)
        return x


@pytest.mark.parametrize("inside", [False, True])
def test_compile(inside):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Layers()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for lengths in (cu(5, 0, 20), cu(7, 33), cu(1, 8, 2)):
        x = torch.randn(int(lengths[-1]), 32)
        got = compiled(x, lengths if inside else SpanMask.full(lengths))
        want = model(x, SpanMask.full(lengths))
        d_got = torch.autograd.grad(got.square().sum(), list(model.parameters()))
        d_want = torch.autograd.grad(want.square().sum(), list(model.parameters()))
        torch.testing.assert_close([got, *d_got], [want, *d_want])


def test_memory_grows_with_tokens_only():
    """8192 tokens of one document: T x T scores would take 256 MiB a head."""
    added = added_peak_memory(
        "x = torch.randn(8192, 1, 16, requires_grad=True)\n"
        "def step(n):\n"
        "    mask = moca_fast.SpanMask.full(torch.tensor([0, n], dtype=torch.int32))\n"
        "    moca_fast.attention(x[:n], x[:n], x[:n], mask, backend='cpu').sum().backward()\n"
        "step(64)",
        "step(8192)",
    )
    assert added < 32
