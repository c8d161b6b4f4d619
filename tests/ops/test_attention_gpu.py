"""attention on GPU backends, by the rule and the oracle of test_attention."""

import math
from threading import Thread

import pytest
import torch
from ahead import compile_launches
from numerics import (
    DEVICE,
    DTYPES,
    GPU_BACKENDS,
    HAS_GPU,
    assert_close_to_exact,
    poisoned_memory,
)
from test_attention import NAMES, Layers, cu, grads, make, masks, oracle, plain
from torch import Tensor

from moca_fast import SpanMask, attention
from moca_fast.ops.attention.op import plan

on_backends = pytest.mark.parametrize("backend", GPU_BACKENDS)


# The CUDA kernels take 16 bits alone.
USUAL = {"triton": torch.float32, "cuda": torch.bfloat16}


def check(mask, backend, *, heads=4, kv_heads=2, dim=24, dtype=None, scale=None):
    """Output, lse and all gradients by the rule, for a mask on the CPU."""
    dtype = dtype or USUAL[backend]
    inputs = make(mask, heads, kv_heads, dim, dtype)
    factor = dim**-0.5 if scale is None else scale
    there = mask.to(DEVICE)
    with poisoned_memory():
        got = grads(
            lambda q, k, v: attention(
                q, k, v, there, softmax_scale=scale, return_lse=True, backend=backend
            ),
            [x.to(DEVICE) for x in inputs],
        )
    usual = grads(lambda q, k, v: plain(q, k, v, mask, factor), inputs)
    exact = grads(lambda q, k, v: oracle(q, k, v, mask, factor), [x.double() for x in inputs])
    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    for name, value, *others in zip(NAMES, got, usual, exact, strict=True):
        assert_close_to_exact(value.cpu(), *others, dtype, name)


@pytest.mark.parametrize("name", masks())
@on_backends
def test_masks(name, backend):
    check(masks()[name], backend, heads=2, kv_heads=1, dim=16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", [SpanMask.full(cu(70, 1, 17)), SpanMask.causal(cu(70, 1, 17))])
@on_backends
def test_dtypes(mask, dtype, backend):
    check(mask, backend, dim=40, dtype=dtype)


@pytest.mark.parametrize("dim", [16, 24, 56, 64, 72, 80, 96, 128, 160, 256])
@on_backends
def test_dims(dim, backend):
    """Powers of two, exact sums of two, and sums padded by 8 columns and by more."""
    check(SpanMask.full(cu(7, 50)), backend, heads=2, kv_heads=1, dim=dim, dtype=torch.bfloat16)


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (5, 1), (4, 2)])
@on_backends
def test_heads(heads, kv_heads, backend):
    check(SpanMask.window(cu(7, 40), 20, 30), backend, heads=heads, kv_heads=kv_heads, dim=16)


@pytest.mark.parametrize("scale", [0.3, 0.0, -0.2])
@on_backends
def test_softmax_scale(scale, backend):
    check(SpanMask.causal(cu(45)), backend, scale=scale)


@pytest.mark.parametrize(
    "queries, keys, seen", [(40, 1, 1), (3, 90, 90), (37, 60, 25), (4, 0, 0), (0, 4, 4)]
)
@on_backends
def test_other_number_of_keys(queries, keys, seen, backend):
    """Each query sees `seen` keys, the first ones at first; the last queries see the last keys."""
    start = torch.linspace(0, keys - seen, queries).to(torch.int32)
    check(SpanMask(start, start + seen, keys), backend)


@on_backends
def test_random_spans(backend):
    """Any monotone spans, empty ones among them, with gaps of keys that nobody sees."""
    random = torch.Generator().manual_seed(0)
    for _ in range(4):
        start = torch.randint(0, 90, (50,), generator=random).sort().values.int()
        end = torch.maximum(start, torch.randint(0, 90, (50,), generator=random).sort().values)
        check(SpanMask(start, end.int(), 90), backend, heads=2, kv_heads=1, dim=16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_backends
def test_single_key_is_exact(dtype, backend):
    """A row with one key returns its value, and there is nothing to learn about the score."""
    mask = SpanMask.full(cu(1, 1, 1)).to(DEVICE)
    q, k, v, d_out, _ = (x.to(DEVICE) for x in make(mask, 2, 2, 40, dtype))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attention(q, k, v, mask, backend=backend)
    d_q, d_k, d_v = torch.autograd.grad(out, leaves, d_out)
    assert torch.equal(out, v) and not d_q.any() and not d_k.any()
    torch.testing.assert_close(d_v, d_out)


@on_backends
def test_rows_that_see_nothing(backend):
    """They give 0 and -inf, learn nothing, and what they hold reaches nobody, be it NaN."""
    mask = SpanMask.causal(cu(3, 40), total=50).to(DEVICE)
    q, k, v, d_out, _ = (x.to(DEVICE) for x in make(mask, 2, 1, 16, USUAL[backend]))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    results = []
    for value in (0.0, math.nan):
        for x in (*leaves, d_out):
            x.data[43:] = value
        with poisoned_memory():
            out, lse = attention(q, k, v, mask, return_lse=True, backend=backend)
            gradients = torch.autograd.grad(out, leaves, d_out)
        assert (lse[43:] == -math.inf).all()
        assert all(not x[43:].any() for x in (out, *gradients))
        assert all(x[:43].isfinite().all() and x[:43].any() for x in (out, *gradients))
        results.append([out, lse, *gradients])
    assert all(map(torch.equal, *results))


@on_backends
def test_a_thread_that_is_new_to_the_device(backend):
    """It has no context there before its first call."""
    mask = SpanMask.causal(cu(3, 40)).to(DEVICE)
    q, k, v, *_ = (x.to(DEVICE) for x in make(mask, 2, 1, 64, USUAL[backend]))
    want = attention(q, k, v, mask, backend=backend)
    got: list[Tensor] = []
    thread = Thread(target=lambda: got.append(attention(q, k, v, mask, backend=backend)))
    thread.start()
    thread.join()
    assert len(got) == 1 and torch.equal(got[0], want)


@on_backends
def test_strided_inputs(backend):
    mask = SpanMask.causal(cu(21, 30)).to(DEVICE)
    here = {"device": DEVICE, "dtype": USUAL[backend]}
    fused = torch.randn(51, 4, 3, 32, **here)  # its heads are not next to each other
    strange = torch.randn(32, 51, 4, **here).permute(1, 2, 0)
    shifted = torch.randn(51, 4, 36, **here)[..., 2:34]
    q, k, v = fused.unbind(2)
    for inputs in (
        (q, k[:, ::2], v[:, 1:3]),
        (strange, strange[:, :2], strange[:, 2:]),
        (shifted, q, shifted),
    ):
        d_out = torch.randn(4, 51, 32, **here).transpose(0, 1)
        leaves = [x.detach().requires_grad_() for x in inputs]
        got = attention(*leaves, mask, backend=backend)
        got = [got, *torch.autograd.grad(got, leaves, d_out)]
        leaves = [x.detach().contiguous().requires_grad_() for x in inputs]
        want = attention(*leaves, mask, backend=backend)
        want = [want, *torch.autograd.grad(want, leaves, d_out.contiguous())]
        assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2), (1, 2)])
@on_backends
def test_partial_requires_grad(needed, backend):
    mask = SpanMask.full(cu(9, 14)).to(DEVICE)
    inputs = [x.to(DEVICE) for x in make(mask, 2, 1, 16, USUAL[backend])]
    want = grads(lambda q, k, v: attention(q, k, v, mask, return_lse=True, backend=backend), inputs)
    leaves = [x.clone().requires_grad_(i in needed) for i, x in enumerate(inputs[:3])]
    out, lse = attention(*leaves, mask, return_lse=True, backend=backend)
    torch.autograd.backward([out, lse], [inputs[3], inputs[4]])
    for i, x in enumerate(leaves):
        assert torch.equal(x.grad, want[2 + i]) if i in needed else x.grad is None


@pytest.mark.parametrize("deterministic", [False, True])
@on_backends
def test_same_bits_every_time(deterministic, backend):
    lengths = (5000, 700, 30) if HAS_GPU else (40, 9)
    mask = SpanMask.full(cu(*lengths)).to(DEVICE)
    inputs = [x.to(DEVICE) for x in make(mask, 4, 2, 16, torch.bfloat16)]
    runs = [
        grads(
            lambda q, k, v: attention(
                q, k, v, mask, return_lse=True, deterministic=deterministic, backend=backend
            ),
            inputs,
        )
        for _ in range(2)
    ]
    assert all(map(torch.equal, *runs))


@on_backends
def test_large_scores(backend):
    mask, dtype = SpanMask.full(cu(70)), USUAL[backend]
    q, k, v, *_ = make(mask, 1, 1, 16, dtype)
    q, k = q * 200, k * 200
    got = attention(*(x.to(DEVICE) for x in (q, k, v)), mask.to(DEVICE), backend=backend)
    exact = oracle(q.double(), k.double(), v.double(), mask, 0.25)[0]
    assert_close_to_exact(got.cpu(), plain(q, k, v, mask, 0.25)[0], exact, dtype)


@on_backends
def test_opcheck(backend):
    mask = SpanMask.causal(cu(5, 6), total=12).to(DEVICE)
    q, k, v, d_out, d_lse = (x.to(DEVICE) for x in make(mask, 2, 1, 16, USUAL[backend]))
    spans = plan(mask)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    arguments = (*leaves, spans, 0.25, backend)
    torch.library.opcheck(torch.ops.moca_fast.attention.default, arguments)
    outputs = torch.ops.moca_fast.attention(q, k, v, spans, 0.25, backend)
    arguments = (d_out, d_lse, q, k, v, *outputs, spans, 0.25, backend)
    torch.library.opcheck(torch.ops.moca_fast.attention_backward.default, arguments)
    arguments = (mask.start, mask.end, mask.num_keys, 96)
    torch.library.opcheck(torch.ops.moca_fast.span_tiles.default, arguments)


@pytest.mark.parametrize("inside", [False, True])
@on_backends
def test_compile(inside, backend, monkeypatch):
    """Two layers that share a mask, or make it and its plan inside the graph."""
    monkeypatch.setattr("moca_fast._dispatch._default", backend)
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Layers().to(DEVICE, USUAL[backend])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for lengths in (cu(5, 0, 20), cu(7, 33)):
        x = torch.randn(int(lengths[-1]), 32, device=DEVICE, dtype=USUAL[backend])
        mask = SpanMask.full(lengths).to(DEVICE)
        got, want = compiled(x, lengths.to(DEVICE) if inside else mask), model(x, mask)
        d_got = torch.autograd.grad(got.square().sum(), list(model.parameters()))
        d_want = torch.autograd.grad(want.square().sum(), list(model.parameters()))
        torch.testing.assert_close([got, *d_got], [want, *d_want])


LARGE = {
    "dense": SpanMask.full(cu(1500)),
    "causal": SpanMask.causal(cu(700, 900)),
    "short documents": SpanMask.full(cu(*[16 + i * 37 % 240 for i in range(60)])),
    "window": SpanMask.window(cu(1200, 30), 200, 90),
}


@pytest.mark.skipif(not HAS_GPU, reason="too slow for the interpreter")
@pytest.mark.parametrize("mask", LARGE.values(), ids=LARGE)
@pytest.mark.parametrize("dim, dtype", [(64, torch.float16), (80, torch.bfloat16)])
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (8, 1)])
@on_backends
def test_large(mask, dim, dtype, heads, kv_heads, backend):
    """Many tiles and blocks, against torch in float64: the oracle's loops take too long."""
    inputs = [x.to(DEVICE) for x in make(mask, heads, kv_heads, dim, dtype)]
    there, factor = mask.to(DEVICE), dim**-0.5
    with poisoned_memory():
        got = grads(lambda *x: attention(*x, there, return_lse=True, backend=backend), inputs)
    usual = grads(lambda *x: plain(*x, there, factor), inputs)
    exact = grads(lambda *x: plain(*x, there, factor), [x.double() for x in inputs])
    for name, *values in zip(NAMES, got, usual, exact, strict=True):
        assert_close_to_exact(*values, dtype, name)


@pytest.mark.skipif(not HAS_GPU, reason="nothing to wait for")
@on_backends
def test_waits_for_nothing(backend):
    """A mask, its plans, forward and backward, without the host asking the GPU for anything."""
    lengths = cu(300, 0, 20).to(DEVICE)
    inputs = [x.to(DEVICE) for x in make(SpanMask.full(lengths), 2, 1, 64, torch.bfloat16)]
    leaves = [x.requires_grad_() for x in inputs[:3]]

    def step():
        mask = SpanMask.full(lengths, total=320)
        return torch.autograd.grad(attention(*leaves, mask, backend=backend), leaves, inputs[3])

    want = step()  # compiles, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, got, want))


LAUNCHES = """
import torch
from moca_triton import attention
x = torch.empty(300, 4, {dim}, dtype=torch.bfloat16)
lse, spans = torch.empty(300, 4), torch.empty(300, dtype=torch.int32)
mask = [spans, spans, torch.empty(9, 5, dtype=torch.int32)] * 2
attention.forward(x, x[:, :2], x[:, 2:], mask, 0.1)
attention.backward(x, lse, x, x[:, :2], x[:, 2:], x, lse, lse, mask, 0.1)
"""
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes a program may have, by architecture


@pytest.mark.parametrize("dim", [80, 128])
def test_compiles_ahead(dim):
    """What no interpreter shows: that it compiles and fits, reads 16 bytes at a time, and keeps its
    sums in registers (ROWS x D of them would take 1 KB of stack)."""
    kernels = compile_launches(LAUNCHES.format(dim=dim))
    assert len(kernels) == 8, [kernel.name for kernel in kernels]
    for kernel in kernels:
        assert kernel.shared <= SHARED[kernel.arch], kernel
        assert kernel.access == 16 and kernel.stack < 512, kernel
