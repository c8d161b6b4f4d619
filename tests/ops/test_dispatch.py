"""Which backend runs, how it is chosen, and what `python -m moca_fast` says about it."""

import os
import subprocess
import sys
from pathlib import Path

import every_op
import pytest
import torch

import moca_fast
from moca_fast import SpanMask, _cuda, _dispatch, attention, backends, explain, use_backend
from moca_fast.__main__ import report

OPS_FOLDER = Path(moca_fast.__file__).parent / "ops"
MASK = SpanMask.full(torch.tensor([0, 3, 7], dtype=torch.int32))


def inputs(dtype=torch.float32, device="cpu"):
    q = torch.ones(7, 2, 16, dtype=dtype, device=device)
    return q, q[:, :1], q[:, :1], MASK.to(device)


def without_cuda(op: str) -> str | None:
    """Why there is no CUDA kernel of an op, or None."""
    if not (OPS_FOLDER / op / "cuda.py").exists():
        return f"{op} has no cuda kernel in this version"
    if not _cuda.compiled():
        return _cuda.NO_CODE
    return None


def test_backends_lists_every_op():
    table = backends()
    assert tuple(table) == _dispatch.op_names()
    for op, reasons in table.items():
        assert tuple(reasons) == _dispatch.BACKENDS
        assert reasons["cpu"] is None and reasons["reference"] is None
        assert reasons["cuda"] == without_cuda(op)


def test_explain():
    explanation = explain("attention", *inputs())
    assert explanation.backend == "cpu"
    assert "attention: cpu runs this call" in str(explanation)
    assert "reference could run, not chosen" in str(explanation)
    explanation = explain("attention", *inputs(torch.float64), softmax_scale=1.0)
    assert explanation.backend == "reference"
    assert explanation.reasons["cpu"] == "dtype float64 has no native kernel"
    explanation = explain("attention", *inputs(torch.float64), backend="cpu")
    assert explanation.backend is None
    assert "attention: cpu, which was asked for, cannot run this call" in str(explanation)
    assert "reference could run, not asked for" in str(explanation)
    with use_backend("cpu"):
        assert "cpu, which was asked for, ca" in str(explain("attention", *inputs(torch.float64)))
    assert "meta" in explain("attention", *inputs(device="meta")).reasons["cpu"]


def test_explain_checks_as_the_op_does():
    with pytest.raises(ValueError, match="mask: expected 7 queries"):
        explain("attention", *inputs()[:3], SpanMask.full(torch.tensor([0, 3])))
    with pytest.raises(ValueError, match=r"explain: expected one of .*'pool'.*, got 'attend'"):
        explain("attend")


def test_named_backend_runs_or_says_why_not():
    assert attention(*inputs(), backend="cpu").shape == (7, 2, 16)
    why = "this build holds no CUDA code|tensors are on cpu"
    with pytest.raises(ValueError, match=f"backend 'cuda' cannot run this call: ({why})"):
        attention(*inputs(), backend="cuda")
    with pytest.raises(ValueError, match=r"backend: expected 'auto' or one of .*, got 'gpu'"):
        attention(*inputs(), backend="gpu")


def test_use_backend(monkeypatch):
    ran = []
    for name in ("cpu", "reference"):
        module = _dispatch._load("attention", name)
        forward = module.forward

        def watched(*arguments, name=name, forward=forward):
            ran.append(name)
            return forward(*arguments)

        monkeypatch.setattr(module, "forward", watched)
    attention(*inputs())
    with use_backend("reference"):
        attention(*inputs())
        attention(*inputs(), backend="cpu")
        assert explain("attention", *inputs()).backend == "reference"
        with use_backend("auto"):
            attention(*inputs())
    attention(*inputs())
    assert ran == ["cpu", "reference", "cpu", "cpu", "cpu"]
    with (
        pytest.raises(ValueError, match="use_backend: expected 'auto' or one of"),
        use_backend("x"),
    ):
        pass


def test_use_backend_is_undone_by_an_error():
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert explain("attention", *inputs()).backend == "cpu"


def test_autocast_leaves_the_arguments_as_they_are():
    want = attention(*inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for backend in ("cpu", "reference"):
            out = attention(*inputs(), backend=backend)
            assert out.dtype == torch.float32 and torch.allclose(out, want)


def test_report():
    text = report()
    assert text.startswith(f"moca_fast {moca_fast.__version__}")
    for part in ("portable", "this machine", f"torch          {torch.__version__}", "gpus"):
        assert part in text
    for op in _dispatch.op_names():
        reason = without_cuda(op) or "runs on GPUs"
        assert f"  {op}: cpu runs\n    cuda      {reason}" in text


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_environment_sets_the_backend():
    done = run("-m", "moca_fast", MOCA_BACKEND="reference")
    assert done.returncode == 0, done.stderr
    assert "  attention: reference runs" in done.stdout and "not asked for" in done.stdout
    done = run("-c", "import moca_fast", MOCA_BACKEND="fast")
    assert "MOCA_BACKEND: expected 'auto' or one of" in done.stderr


def test_environment_names_an_unknown_instruction_set():
    done = run("-m", "moca_fast", MOCA_CPU_ISA="sse9")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("MOCA_CPU_ISA: expected one of portable")
    assert done.stderr.endswith("got sse9\n")


@pytest.mark.parametrize("op", [moca_fast.linear_cross_entropy, moca_fast.info_nce])
def test_a_second_derivative_of_a_mean_is_refused(op):
    x = torch.randn(4, 8, requires_grad=True)
    loss = op(x, torch.randn(4, 8), torch.arange(4))
    with pytest.raises(RuntimeError, match=r"moca_fast\.\w+ has no second gradient"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_a_forward_derivative_is_refused():
    bounds = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"moca_fast\.pool has no forward-mode"):
        torch.func.jacfwd(lambda hidden: moca_fast.pool(hidden, bounds))(torch.randn(4, 8))


@pytest.mark.parametrize("name", [name for name in every_op.CALLS if name != "patchify"])
def test_the_reference_gives_contiguous_tensors(name):
    """As its fakes say, which torch.compile believes; here of inputs that are not contiguous."""

    def random(*shape, dtype):
        turned = torch.randn(shape[::-1], dtype=dtype).permute(*range(len(shape))[::-1])
        return turned.requires_grad_()

    with pytest.MonkeyPatch.context() as patch, moca_fast.use_backend("reference"):
        patch.setattr(every_op, "random", random)
        out, leaves = every_op.CALLS[name](torch.float64)
        gradients = torch.autograd.grad(out.square().sum(), leaves)
    assert not any(leaf.is_contiguous() for leaf in leaves if leaf.dim() > 1)
    assert all(result.is_contiguous() for result in (out, *gradients))


def test_a_second_derivative_is_refused():
    hidden = torch.randn(4, 8, requires_grad=True)
    pooled = moca_fast.pool(hidden, torch.tensor([0, 4], dtype=torch.int32))
    (gradient,) = torch.autograd.grad(pooled.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"moca_fast\.pool_backward has no gradient"):
        gradient.sum().backward()
