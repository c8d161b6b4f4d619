"""The CUDA kernels of masked_patch_mse, mrope and pool on an emulator (tests/ops/emulator), so that
they are checked where there is no GPU: indices, tails, sums over warps and blocks. On a GPU, the
tests of each op for GPUs check them."""

import ctypes
import os
import subprocess
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_masked_patch_mse as mse
import test_mrope as mrope
import test_pool as pool
import torch
from numerics import DTYPES, check, run

import moca_fast
from moca_fast import _dispatch

ROOT = Path(__file__).parents[2]
EMULATOR = Path(__file__).parent / "emulator"
OPS = ("masked_patch_mse", "mrope", "pool")
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
POINTER, SIZE, CODE, FLAG = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_bool


def structure(**names: type) -> type[ctypes.Structure]:
    """Fields in order; a keyword holds the names of neighbours of one type, underscores apart."""
    fields = [(field, kind) for group, kind in names.items() for field in group.split("__")]
    return type("Params", (ctypes.Structure,), {"_fields_": fields})


PARAMS = {
    "MaskedPatchMseParams": structure(
        pred__patches__index__row_loss__d_loss__d_pred=POINTER,
        rows__row_size__num_patches=SIZE,
        pred_dtype__patches_dtype=CODE,
        normalize=FLAG,
        threads=CODE,
    ),
    "MropeParams": structure(
        q__k__cos__sin__q_out__k_out=POINTER,
        tokens__heads__kv_heads__dim__q_stride__k_stride=SIZE,
        dtype__table_dtype=CODE,
        sections=FLAG,
        time__height__width=SIZE,
        interleaved__inverse=FLAG,
        threads=CODE,
    ),
    "PoolParams": structure(
        hidden__cu_seqlens__pooled__norm__d_pooled__d_hidden=POINTER,
        documents__tokens__dim=SIZE,
        dtype=CODE,
        mean__normalize=FLAG,
        threads=CODE,
    ),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    """The kernels and the emulator, compiled."""
    target = tmp_path_factory.mktemp("emulator") / "streaming.so"
    sources = [path for op in OPS for path in (ROOT / "csrc" / op).glob("*.cu")]
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O1", "-shared", "-fPIC"]
    command += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    command += [f"-I{EMULATOR / 'cuda'}", f"-I{ROOT / 'csrc'}", "-x", "c++"]
    command += [str(EMULATOR / "cuda/streaming.cpp"), *map(str, sources), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(target))
    loaded.pool_pieces.restype = ctypes.c_int64
    assert loaded.sizeof_masked_patch_mse_forward() == ctypes.sizeof(PARAMS["MaskedPatchMseParams"])
    assert loaded.sizeof_mrope_rotate() == ctypes.sizeof(PARAMS["MropeParams"])
    assert loaded.sizeof_pool_backward() == ctypes.sizeof(PARAMS["PoolParams"])
    return loaded


@pytest.fixture(autouse=True)
def emulated(library, monkeypatch):
    """Makes backend="cuda" of these ops run on the emulator, on tensors of the CPU."""

    def kernel(name: str, *written: str):
        """Of `_C`: what the binding takes besides params goes into fields of it."""

        def call(params, *addresses):
            for field, address in zip(written, addresses[:-1], strict=True):  # the last is a queue
                setattr(params, field, address)
            getattr(library, name)(ctypes.byref(params))

        return call

    def pool_forward(params, sums, queue):
        library.pool_forward(ctypes.byref(params), ctypes.c_void_p(sums))

    native = SimpleNamespace(
        masked_patch_mse_forward_cuda=kernel("masked_patch_mse_forward", "row_loss"),
        masked_patch_mse_backward_cuda=kernel("masked_patch_mse_backward", "d_loss", "d_pred"),
        mrope_rotate_cuda=kernel("mrope_rotate"),
        pool_pieces=lambda params: library.pool_pieces(ctypes.byref(params)),
        pool_forward_cuda=pool_forward,
        pool_backward_cuda=kernel("pool_backward", "d_pooled", "d_hidden"),
        **PARAMS,
    )
    modules = {op: import_module(f"moca_fast.ops.{op}.cuda") for op in OPS}
    for op, module in modules.items():
        monkeypatch.setattr(module, "_C", native)
        monkeypatch.setattr(module, "queue", lambda tensor: None)
        monkeypatch.setattr(module, "unsupported", lambda *inputs: None)
        cpu = import_module(f"moca_fast.ops.{op}.cpu")  # whose parameters cuda.py shares
        monkeypatch.setattr(cpu, "_C", native)
        monkeypatch.setattr(cpu, "DTYPES", CODES)
    monkeypatch.setattr(_dispatch, "_load", lambda op, backend: modules[op])


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 2), (9, 5, 27), (11, 6, 588), (3, 4, 1176)])
def test_masked_patch_mse(shape, dtype, normalize):
    pred, patches, index = mse.problem(*shape)
    for target in {dtype, torch.float32}:
        op = mse.ours(patches.to(target), index, normalize=normalize, backend="cuda")
        check(op, mse.plain(patches.to(target), index, normalize), [pred], dtype)


def test_masked_patch_mse_of_no_patch():
    pred, patches, index = mse.problem(4, 5, 8)
    index[1], index[2] = 5, -1
    loss, d_pred = run(mse.ours(patches, index, backend="cuda"), [pred])
    assert loss.isnan() and d_pred.isnan().all(dim=1).tolist() == [False, True, True, False]
    assert d_pred[[0, 3]].isfinite().all()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mode", ["mean", "last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "lengths", [[1], [0, 255, 0, 257, 0, 64, 65, 1], [2] * 40, [600, 3]], ids=len
)
def test_pool(lengths, dtype, mode, normalize):
    options = {"mode": mode, "normalize": normalize}
    for dim in (37, 264):  # no multiple of an access; more than one slice of a warp
        hidden = torch.randn(sum(lengths) + 70, dim)
        op = pool.ours(lengths, backend="cuda", **options)
        check(op, pool.plain(lengths, **options), [hidden], dtype)


@pytest.mark.parametrize("mode", ["mean", "last"])
def test_pool_of_empty_and_wrong_documents(mode):
    bounds = torch.tensor([0, 2, 2, 5, 4, 9]).int()
    hidden = torch.randn(8, 16).requires_grad_()
    pooled = moca_fast.pool(hidden, bounds, mode=mode, backend="cuda")
    assert pooled.isnan().all(dim=1).tolist() == [False, False, False, True, True]
    assert (pooled[1] == 0).all()
    rows, bounds = torch.randn(70, 16).requires_grad_(), torch.tensor([0, 3]).int()
    moca_fast.pool(rows, bounds, mode=mode, backend="cuda").sum().backward()
    assert (rows.grad[3:] == 0).all() and rows.grad[2].abs().max() > 0
    if mode == "last":
        rows.grad = None  # no document holds the rows before the first
        moca_fast.pool(rows, bounds + 1, mode=mode, backend="cuda").sum().backward()
        assert rows.grad.isnan().any(dim=1).nonzero().tolist() == [[3]]


@pytest.mark.parametrize("table", [None, torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 2, 1, 2), (2, 5, 2, 72), (2, 3, 1, 80), (1, 28, 4, 128)])
def test_mrope(shape, dtype, table):
    q, k, cos, sin = mrope.problem(*shape)
    cos, sin = cos.to(table or dtype), sin.to(table or dtype)
    check(mrope.ours(cos, sin, backend="cuda"), mrope.plain(cos, sin), [q, k], dtype)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("section", [[16, 24, 24], [5, 20, 15], [0, 0, 64], [1, 2, 0]], ids=str)
def test_mrope_in_sections(section, interleaved):
    q, k, _, _ = mrope.problem(3, 3, 2, 2 * sum(section))
    cos, sin = torch.randn(2, 3, 3, 2 * sum(section))
    want = mrope.plain(*(mrope.merged(table, section, interleaved) for table in (cos, sin)))
    op = mrope.ours(cos, sin, mrope_section=section, interleaved=interleaved, backend="cuda")
    check(op, want, [q, k], torch.bfloat16)
