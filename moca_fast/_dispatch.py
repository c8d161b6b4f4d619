"""Which backend runs an op.

An op is a folder of `moca_fast/ops`; a backend of it is the module of that name beside `op.py`
(`moca_triton.<op>` for Triton) with three functions: `unsupported(*inputs) -> reason | None`,
`forward` and `backward`; but for the CPU's kernels, those of a loss whose backward would repeat the
work of its forward have `forward_with_gradients` too. Nothing is registered anywhere: the
module path is the registration.

On a GPU, "auto" takes a kernel only where its tests have passed on that architecture
(`moca_fast/_verified.py`); a named backend runs regardless.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from moca_fast import _verified

# The order in which "auto" tries them. No call suits both cpu and triton, except where Triton is
# interpreted (TRITON_INTERPRET=1): the CPU's kernels are then the ones to take.
BACKENDS = ("cuda", "cpu", "triton", "reference")


def _checked(backend: str, source: str) -> str:
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"{source}: expected 'auto' or one of {BACKENDS}, got {backend!r}")
    return backend


_default = _checked(os.environ.get("MOCA_BACKEND") or "auto", "MOCA_BACKEND")


@cache
def op_names() -> tuple[str, ...]:
    """Names of all ops, sorted."""
    folder = Path(__file__).parent / "ops"
    return tuple(sorted(p.parent.name for p in folder.glob("*/op.py")))


@cache
def _load(op: str, backend: str) -> ModuleType | str:
    """The backend's module, or why there is none."""
    if backend == "triton":
        if find_spec("triton") is None:
            return "the triton package is not installed"
        name = f"moca_triton.{op}"
    else:
        name = f"moca_fast.ops.{op}.{backend}"
    package = name.rpartition(".")[0]
    if find_spec(package) is None or find_spec(name) is None:
        return f"{op} has no {backend} kernel in this version"
    try:
        if backend == "cuda" and not (cuda := import_module("moca_fast._cuda")).compiled():
            return cuda.NO_CODE
        return import_module(name)
    except ImportError as error:
        return f"{name} does not import: {error}"


def requested(backend: str) -> str:
    """The backend asked for by the call, else by `use_backend`, else by MOCA_BACKEND."""
    return _default if _checked(backend, "backend") == "auto" else backend


def _refusal(op: str, backend: str, inputs: tuple) -> str | None:
    module = _load(op, backend)
    return module if isinstance(module, str) else module.unsupported(*inputs)


def _device(inputs: tuple) -> torch.device:
    return next(x.device for x in inputs if isinstance(x, torch.Tensor))


def _unproven(op: str, backend: str, inputs: tuple) -> str | None:
    """Why "auto" does not take a kernel that could run: its tests have not passed on this GPU."""
    device = _device(inputs)
    if backend not in _verified.BACKENDS or device.type != "cuda":
        return None
    return _verified.reason(op, backend, _verified.architecture(device))


@dataclass(frozen=True)
class Kernel:
    """A backend's forward and backward, on the device and in the dtypes of what they are given:
    whichever GPU is the current one, and even inside autocast."""

    module: ModuleType

    def forward(self, *inputs: Any) -> Any:
        return self._run(self.module.forward, inputs)

    def backward(self, *inputs: Any) -> Any:
        return self._run(self.module.backward, inputs)

    def forward_with_gradients(self, *inputs: Any) -> Any:
        return self._run(self.module.forward_with_gradients, inputs)

    @staticmethod
    def _run(function: Callable[..., Any], inputs: tuple) -> Any:
        device = _device(inputs)
        if device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
            return function(*inputs)  # as below, for less: small calls are all overhead
        with (
            torch.autocast(device.type, enabled=False),
            torch.cuda.device(device.index if device.type == "cuda" else -1),  # -1 does nothing
        ):
            return function(*inputs)


def select(op: str, backend: str, *inputs: object) -> Kernel:
    """The kernel that runs this call. A named backend runs or raises with its reason."""
    if backend != "auto":
        if reason := _refusal(op, backend, inputs):
            other = _first(op, inputs)
            raise ValueError(
                f"moca_fast.{op}: backend {backend!r} cannot run this call: {reason}"
                + (f"; backend 'auto' would take {other}" if other else "")
            )
        return Kernel(_module(op, backend))
    name = _first(op, inputs)
    if name is None:
        raise ValueError(f"moca_fast.{op}: no backend runs this call\n{_reasons(op, inputs)}")
    if name == "reference":
        for other in _verified.BACKENDS:
            if _refusal(op, other, inputs) is None:
                _warn_of_unproven(op, other, _verified.architecture(_device(inputs)))
    return Kernel(_module(op, name))


def _first(op: str, inputs: tuple) -> str | None:
    """The backend that "auto" takes, or None if no backend runs this call."""
    return next((name for name in BACKENDS if _auto_refusal(op, name, inputs) is None), None)


def _auto_refusal(op: str, backend: str, inputs: tuple) -> str | None:
    return _refusal(op, backend, inputs) or _unproven(op, backend, inputs)


@cache
def _warn_of_unproven(op: str, backend: str, architecture: str) -> None:
    """Says once that the reference runs where a kernel could."""
    warnings.warn(
        f"moca_fast.{op}: the reference runs, slowly: tests of {backend} have not passed on "
        f"{architecture}. MOCA_BACKEND={backend} runs it all the same",
        stacklevel=2,
    )


def _module(op: str, backend: str) -> ModuleType:
    module = _load(op, backend)
    assert isinstance(module, ModuleType)
    return module


def _reasons(op: str, inputs: tuple) -> dict[str, str | None]:
    return {name: _auto_refusal(op, name, inputs) for name in BACKENDS}


@dataclass(frozen=True)
class Explanation:
    """Which backend runs a call (`backend`, None if none), each backend's refusal, and which was
    asked for ("auto" for the first that can)."""

    op: str
    backend: str | None
    reasons: dict[str, str | None]
    asked: str = "auto"

    def __str__(self) -> str:
        lines = [f"{self.op}: {self._summary()}"]
        idle = "not chosen" if self.asked == "auto" else "not asked for"
        for name, reason in self.reasons.items():
            verdict = "runs" if name == self.backend else reason or f"could run, {idle}"
            lines.append(f"  {name:<9} {verdict}")
        return "\n".join(lines)

    def _summary(self) -> str:
        if self.backend is None and self.asked != "auto":
            return f"{self.asked}, which was asked for, cannot run this call"
        return f"{self.backend or 'no backend'} runs this call"


def explain(op: str, *args: object, **kwargs: object) -> Explanation:
    """Which backend `moca_fast.<op>(*args, **kwargs)` would use, and why the others would not.

    Takes the op's own arguments and checks them as the op does. Nothing is computed.
    """
    if op not in op_names():
        raise ValueError(f"explain: expected one of {op_names()}, got {op!r}")
    backend = requested(str(kwargs.pop("backend", "auto")))
    module = import_module(f"moca_fast.ops.{op}.op")
    inputs = module.inputs(*args, **kwargs)
    reasons = _reasons(op, inputs)
    if backend != "auto":
        reasons[backend] = _refusal(op, backend, inputs)
    names = BACKENDS if backend == "auto" else (backend,)
    runs = next((name for name in names if reasons[name] is None), None)
    return Explanation(op, runs, reasons, backend)


def backends() -> dict[str, dict[str, str | None]]:
    """For every op and backend: None if its kernel is present, else why it is not."""
    table: dict[str, dict[str, str | None]] = {}
    for op in op_names():
        loaded = {name: _load(op, name) for name in BACKENDS}
        table[op] = {n: m if isinstance(m, str) else None for n, m in loaded.items()}
    return table


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Every op called in the block with backend="auto" uses `backend`. Process-wide."""
    global _default
    previous, _default = _default, _checked(backend, "use_backend")
    try:
        yield
    finally:
        _default = previous
