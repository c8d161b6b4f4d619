"""Every op has the one shape of the house, and every backend answers the same three questions."""

import ast
import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch

import moca_fast
from moca_fast import _dispatch

ROOT = Path(__file__).parents[2]
FUNCTION_LINES = 60  # without the docstring
OPS = _dispatch.op_names()
BACKENDS = ("reference", "cpu")
WITHOUT_GRADIENT = {"patchify"}  # its input is bytes
GRADIENTS_AHEAD = {"info_nce", "linear_cross_entropy"}  # made in the forward of a mean or a sum


def test_the_ops_are_there():
    """The one list of them that is written out: the others are read from their folders."""
    assert OPS == (
        "attention",
        "info_nce",
        "linear_cross_entropy",
        "masked_patch_mse",
        "mrope",
        "patchify",
        "pool",
    )


@pytest.mark.parametrize("op", OPS)
def test_files_of_an_op(op):
    expected = [
        f"moca_fast/ops/{op}/op.py",
        f"moca_fast/ops/{op}/reference.py",
        f"moca_fast/ops/{op}/cpu.py",
        f"csrc/{op}/{op}.h",
        f"csrc/{op}/binding.cpp",
        f"csrc/{op}/cpu.cpp",
        f"tests/ops/test_{op}.py",
    ]
    assert [name for name in expected if not (ROOT / name).is_file()] == []
    listed = re.search(r"set\(MOCA_OPS ([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())
    assert listed and op in listed.group(1).split()


@pytest.mark.parametrize("op", OPS)
def test_public_function(op):
    function = getattr(moca_fast, op)
    assert op in moca_fast.__all__
    assert function is getattr(import_module(f"moca_fast.ops.{op}.op"), op)
    backend = inspect.signature(function).parameters["backend"]
    assert backend.default == "auto" and backend.kind is inspect.Parameter.KEYWORD_ONLY
    for section in ("Args:", "Returns:", "Raises:"):
        assert section in function.__doc__, f"the docstring of {op} has no {section}"


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_functions(op, backend):
    module = import_module(f"moca_fast.ops.{op}.{backend}")
    functions = ["unsupported", "forward"] + ["backward"] * (op not in WITHOUT_GRADIENT)
    for name in functions:
        assert callable(getattr(module, name)), f"{module.__name__} has no {name}"


@pytest.mark.parametrize("name", ["moca_fast.ops.{}.reference", "moca_triton.{}"])
@pytest.mark.parametrize("op", sorted(GRADIENTS_AHEAD))
def test_backends_that_make_gradients_in_the_forward(op, name):
    assert callable(import_module(name.format(op)).forward_with_gradients)


@pytest.mark.parametrize("op", OPS)
def test_registered_with_torch(op):
    packet = getattr(torch.ops.moca_fast, op)
    assert packet.default is not None
    has_backward = hasattr(torch.ops.moca_fast, f"{op}_backward")
    assert has_backward is (op not in WITHOUT_GRADIENT)
    ahead = hasattr(torch.ops.moca_fast, f"{op}_with_gradients")
    assert ahead is (op in GRADIENTS_AHEAD)


SOURCES = [
    path
    for folder in ("moca_fast", "kernels", "python", "csrc")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")
]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_short(path):
    limit = 500 if path.suffix == ".cu" else 400
    assert len(path.read_text(encoding="utf-8").splitlines()) <= limit


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_left_open(path):
    text = path.read_text(encoding="utf-8")
    for word in ("TODO", "FIXME", "XXX", "NotImplementedError"):
        assert word not in text


def python_functions(path: Path) -> list[tuple[str, int]]:
    """Name and lines of every function, docstrings not counted."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= node.body[0].end_lineno - node.body[0].lineno + 1
            found.append((node.name, lines))
    return found


def native_functions(path: Path) -> list[tuple[str, int]]:
    """First line and lines of every function; relies on the indents that clang-format gives."""
    lines, found, end = path.read_text(encoding="utf-8").splitlines(), [], -1
    for begin, line in enumerate(lines):
        opens = re.match(r"( {0,2})\S.*\).*\{$", line)
        no_function = re.match(r"\s*(namespace|class|struct|if|for|while|switch)\b", line)
        if begin > end and opens and not no_function:
            closing = opens[1] + "}"
            end = next(n for n in range(begin, len(lines)) if lines[n].startswith(closing))
            found.append((line.strip(), end - begin + 1))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_stay_short(path):
    functions = python_functions(path) if path.suffix == ".py" else native_functions(path)
    assert [f for f in functions if f[1] > FUNCTION_LINES] == []


def test_functions_are_found():
    assert "select" in dict(python_functions(ROOT / "moca_fast/_dispatch.py"))
    kernel = dict(native_functions(ROOT / "csrc/attention/cpu.cpp"))
    assert kernel["void attention_forward(const AttentionParams& p) {"] > 5
    kernel = dict(native_functions(ROOT / "csrc/attention/cpu_forward.h"))
    assert any("soften(" in first for first in kernel) and any("void run(" in x for x in kernel)
