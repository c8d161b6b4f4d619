"""A source distribution holds all that a wheel is built from."""

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PARTS = ("csrc", "moca_fast", "kernels", "python")
FILES = ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")


def test_everything_is_in_it(tmp_path):
    copy = tmp_path / "copy"
    for part in PARTS:
        shutil.copytree(ROOT / part, copy / part, ignore=LEFT_OUT)
    for name in FILES:
        shutil.copy(ROOT / name, copy)
    wanted = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}
    command = [sys.executable, "setup.py", "--quiet", "sdist"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (archive,) = (copy / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
    assert len(wanted) > 100 and wanted <= held, sorted(wanted - held)
