"""The arrows of the house point one way: csrc -> moca_fast -> moca, and Triton is loaded lazily."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def imported(path: Path) -> set[str]:
    """Top-level names of every import statement in a file, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def python_files(folder: str) -> list[Path]:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, f"{folder} holds no Python files"
    return files


@pytest.mark.parametrize("path", python_files("moca_fast"), ids=str)
def test_moca_fast_uses_nothing_above_it(path):
    names = imported(path)
    assert "moca" not in names
    assert "moca_triton" not in names, "Triton kernels are found by name when a call needs them"
    if "integrations" not in path.parts:
        assert "transformers" not in names


@pytest.mark.parametrize("path", python_files("kernels"), ids=str)
def test_triton_kernels_stand_alone(path):
    assert not imported(path) & {"moca", "moca_fast", "transformers"}


@pytest.mark.parametrize("path", python_files("python"), ids=str)
def test_the_system_uses_the_public_ops(path):
    """The system reaches kernels through ops, never the native module (its name is only shown)."""
    text = path.read_text(encoding="utf-8")
    assert "moca_fast.ops" not in text
    assert "torchvision" not in imported(path)
    assert "trust_remote_code=True" not in text


@pytest.mark.parametrize(
    "path", sorted(p for p in (ROOT / "csrc").rglob("*") if p.is_file()), ids=str
)
def test_native_code_knows_no_torch(path):
    text = path.read_text(encoding="utf-8")
    for line in text.splitlines():
        if line.lstrip().startswith("#include"):
            assert not any(name in line for name in ("torch", "ATen", "c10")), line


def test_package_roots_have_no_init_of_their_own():
    """A root-level `kernels` package would shadow the one that transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "python" / "__init__.py").exists()


def test_the_modules_are_there_after_one_import():
    code = "import moca_fast; moca_fast.nn.InfoNCELoss()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_reading_a_configuration_loads_no_framework():
    code = (
        "import sys, moca.cli, moca.config; "
        "sys.exit(bool({'torch', 'transformers', 'accelerate'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
