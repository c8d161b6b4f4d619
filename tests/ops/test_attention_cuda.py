"""The CUDA kernels of attention on an emulator (tests/ops/emulator), so that they are checked where
there is no GPU: fragments, copies, barriers and loop bounds, by the rule and the oracle of
test_attention. On a GPU, test_attention_gpu checks them."""

import ctypes
import itertools
import math
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from numerics import assert_close_to_exact, poisoned_memory
from test_attention import NAMES, cu, grads, make, masks, oracle, plain
from torch import Tensor

from moca_fast import SpanMask
from moca_fast.ops.attention import cuda
from moca_fast.ops.attention.op import TILE_ROWS

ROOT = Path(__file__).parents[2]
EMULATOR = Path(__file__).parent / "emulator"
DTYPES = {torch.bfloat16: 1, torch.float16: 2}


def structure(name: str, **fields: type) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


def pointers(*names: str) -> dict[str, type]:
    return dict.fromkeys(names, ctypes.c_void_p)


def sizes(*names: str) -> dict[str, type]:
    return dict.fromkeys(names, ctypes.c_int64)


Spans = structure("Spans", **pointers("start", "end", "tiles"), **sizes("size", "max_tiles"))
Params = structure(
    "AttentionCudaParams",
    **pointers("q", "k", "v"),
    **sizes("q_token", "q_head", "k_token", "k_head", "v_token", "v_head"),
    **pointers("out", "lse", "d_out", "d_lse", "rows", "d_q", "d_k", "d_v"),
    queries=Spans,
    keys=Spans,
    **sizes("tile_rows", "heads", "kv_heads", "dim"),
    softmax_scale=ctypes.c_float,
    dtype=ctypes.c_int,
)


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    """The kernels and the emulator, compiled."""
    target = tmp_path_factory.mktemp("emulator") / "attention.so"
    sources = [EMULATOR / "attention.cpp", *(ROOT / "csrc/attention").glob("*.cu")]
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O1", "-shared", "-fPIC"]
    command += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    command += [f"-I{EMULATOR}", f"-I{ROOT / 'csrc'}", "-x", "c++", *map(str, sources)]
    done = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(target))
    assert loaded.sizeof_params() == ctypes.sizeof(Params)
    return loaded


@pytest.fixture
def emulated(library, monkeypatch) -> SimpleNamespace:
    """Makes moca_fast.ops.attention.cuda run on the emulator, on tensors of the CPU."""
    settings = SimpleNamespace(seed=0, suffix="")

    def call(name, params, queue, **addresses):
        for field, address in addresses.items():
            setattr(params, field, address)
        function = getattr(library, name)
        function.restype = ctypes.c_char_p
        wrong = function(ctypes.byref(params), ctypes.c_uint(settings.seed))
        assert wrong is None, wrong

    native = SimpleNamespace(
        Spans=Spans,
        AttentionCudaParams=Params,
        attention_forward_cuda=lambda *args: call("attention_forward" + settings.suffix, *args),
        attention_backward_cuda=lambda *args, **kw: call(
            "attention_backward" + settings.suffix, *args, kw.pop("queue"), **kw
        ),
    )
    monkeypatch.setattr(cuda, "_C", native)
    monkeypatch.setattr(cuda, "DTYPES", DTYPES)
    monkeypatch.setattr(cuda, "queue", lambda tensor: None)
    return settings


class Emulated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, plan, scale):
        out, lse, rest = cuda.forward(q, k, v, plan, scale)
        ctx.save_for_backward(q, k, v, out, lse, rest)
        ctx.plan, ctx.scale = plan, scale
        return out, lse

    @staticmethod
    def backward(ctx, d_out, d_lse):
        saved = ctx.saved_tensors
        return *cuda.backward(d_out, d_lse, *saved, ctx.plan, ctx.scale), None, None


def plan(mask: SpanMask) -> list[Tensor]:
    """What op.plan makes on a GPU."""
    keys, rows = mask.transposed(), TILE_ROWS["cuda"]
    return [mask.start, mask.end, mask.tiles(rows), keys.start, keys.end, keys.tiles(rows)]


def run(inputs: list[Tensor], mask: SpanMask, scale: float) -> list[Tensor]:
    with poisoned_memory():
        return grads(lambda q, k, v: Emulated.apply(q, k, v, plan(mask), scale), inputs)


def check(mask, *, heads=2, kv_heads=1, dim=40, dtype=torch.bfloat16, scale=None):
    inputs = make(mask, heads, kv_heads, dim, dtype)
    scale = dim**-0.5 if scale is None else scale
    got = run(inputs, mask, scale)
    usual = grads(lambda q, k, v: plain(q, k, v, mask, scale), inputs)
    exact = grads(lambda q, k, v: oracle(q, k, v, mask, scale), [x.double() for x in inputs])
    for name, *values in zip(NAMES, got, usual, exact, strict=True):
        assert_close_to_exact(*values, dtype, name)


@pytest.fixture
def hopper(emulated) -> SimpleNamespace:
    """The same, with the kernels for Hopper."""
    emulated.suffix = "_sm90a"
    return emulated


LONG = {
    "causal": SpanMask.causal(cu(5, 200)),
    "window": SpanMask.window(cu(330), 90, 30),
    "full": SpanMask.full(cu(300, 90, 3)),
}


@pytest.mark.parametrize("name", masks())
def test_masks(name, emulated):
    check(masks()[name])


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("dim", [64, 128])
def test_full_and_masked_blocks(name, dim, emulated):
    """Documents of several tiles, with blocks that are seen whole and blocks that are not."""
    check(LONG[name], dim=dim, heads=1)


@pytest.mark.parametrize("name", [name for name in masks() if name != "no token"])
def test_masks_on_hopper(name, hopper):
    check(masks()[name])


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_full_and_masked_blocks_on_hopper(name, dim, hopper):
    check(LONG[name], dim=dim, heads=1)


@pytest.mark.parametrize("dim", [40, 64, 72, 80, 88, 120, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dims_on_hopper(dim, dtype, hopper):
    check(SpanMask.causal(cu(7, 50)), dim=dim, dtype=dtype)


def test_pipeline_on_hopper(hopper):
    """Many tiles for few multiprocessors, some that see nothing; warps in other orders."""
    mask = SpanMask.causal(cu(3, 420, 200), total=900)
    inputs = make(mask, 2, 1, 80, torch.bfloat16)
    usual = grads(lambda q, k, v: plain(q, k, v, mask, 0.1), inputs)
    exact = grads(lambda q, k, v: oracle(q, k, v, mask, 0.1), [x.double() for x in inputs])
    runs = []
    for hopper.seed in (1000, 2000):
        runs.append(run(inputs, mask, 0.1))
    assert all(map(torch.equal, *runs))
    for name, *values in zip(NAMES, runs[0], usual, exact, strict=True):
        assert_close_to_exact(*values, torch.bfloat16, name)


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (6, 1), (9, 3)])
def test_heads_on_hopper(heads, kv_heads, hopper):
    check(SpanMask.window(cu(7, 151), 20, 90), heads=heads, kv_heads=kv_heads, dim=64)


@pytest.mark.parametrize("dim", [16, 24, 32, 56, 64, 72, 80, 88, 96, 104, 128, 136, 192, 200, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dims(dim, dtype, emulated):
    check(SpanMask.causal(cu(7, 50)), dim=dim, dtype=dtype)


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (6, 1), (9, 3)])
def test_heads(heads, kv_heads, emulated):
    check(SpanMask.window(cu(7, 51), 20, 30), heads=heads, kv_heads=kv_heads, dim=16)


@pytest.mark.parametrize("scale", [0.3, 0.0, -0.2])
def test_softmax_scale(scale, emulated):
    check(SpanMask.causal(cu(45)), scale=scale)


def test_random_spans(emulated):
    """Any monotone spans, with another number of keys than of queries; warps in other orders."""
    random = torch.Generator().manual_seed(0)
    for emulated.seed in range(6):
        start = torch.randint(0, 150, (170,), generator=random).sort().values.int()
        end = torch.randint(0, 150, (170,), generator=random).sort().values.int()
        mask = SpanMask(start, torch.maximum(start, end), 150)
        for dim, emulated.suffix in ((16, ""), (64, "_sm90a")):
            check(mask, dim=dim)


def test_single_key_is_exact(emulated):
    """A row with one key returns its value, and there is nothing to learn about the score."""
    mask = SpanMask.full(cu(1, 1, 1))
    for dtype, emulated.suffix in itertools.product(DTYPES, ("", "_sm90a")):
        inputs = make(mask, 2, 2, 40, dtype)
        inputs[4].zero_()
        out, _, d_q, d_k, d_v = run(inputs, mask, 0.3)
        assert torch.equal(out, inputs[2]) and torch.equal(d_v, inputs[3])
        assert not d_q.any() and not d_k.any()


def test_rows_that_see_nothing(emulated):
    """What is past the documents reaches nobody, be it NaN, and learns nothing."""
    mask = SpanMask.causal(cu(3, 40), total=50)
    for dim, emulated.suffix in ((16, ""), (64, ""), (64, "_sm90a"), (80, "_sm90a")):
        inputs = make(mask, 2, 1, dim, torch.bfloat16)
        clean = run(inputs, mask, 0.25)
        for x in inputs[:4]:
            x[43:] = math.nan
        assert all(map(torch.equal, run(inputs, mask, 0.25), clean))
        assert not any(x[43:].any() for x in (clean[0], *clean[2:]))


def test_strided_inputs(emulated):
    mask = SpanMask.causal(cu(21, 30))
    fused = torch.randn(51, 4, 3, 32).bfloat16()
    q, k, v = fused.unbind(2)
    strange = torch.randn(32, 51, 4).bfloat16().permute(1, 2, 0)
    odd = torch.randn(51 * 4 * 32 + 1).bfloat16()[1:].view(51, 4, 32)  # not at 16 bytes
    spare = make(mask, 4, 2, 32, torch.bfloat16)[3:]
    for inputs in ((q, k[:, ::2], v[:, 1:3]), (strange, strange[:, :2], odd[:, 2:])):
        got = run([*inputs, *spare], mask, 0.2)
        want = run([*(x.contiguous().clone() for x in inputs), *spare], mask, 0.2)
        assert all(map(torch.equal, got, want))


def test_strided_inputs_on_hopper(hopper):
    mask = SpanMask.causal(cu(21, 30))
    q, k, v = torch.randn(51, 4, 3, 64).bfloat16().unbind(2)
    turned = torch.randn(2, 51, 64).bfloat16().transpose(0, 1)
    spare = make(mask, 4, 2, 64, torch.bfloat16)[3:]
    for inputs in ((q, k[:, ::2], v[:, 1:3]), (q, turned, v[:, ::3])):
        got = run([*inputs, *spare], mask, 0.2)
        want = run([*(x.contiguous().clone() for x in inputs), *spare], mask, 0.2)
        assert all(map(torch.equal, got, want))


def test_float32_is_refused(monkeypatch):
    monkeypatch.setattr(cuda, "unsupported_tensors", lambda *tensors: None)  # as if on a GPU
    x = torch.randn(3, 1, 16)
    assert "float32" in cuda.unsupported(x, x, x)
    assert cuda.unsupported(*[x.half()] * 3) is None
