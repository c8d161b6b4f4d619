"""What numbers depend on: GPU, driver, versions and commit."""

from __future__ import annotations

import platform
import shutil
import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "triton", "transformers")


def machine() -> dict[str, str | int]:
    """Versions, threads and, where there is one, the GPU with its driver, architecture and CUDA."""
    found: dict[str, str | int] = {
        "python_version": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found["moca_fast"] = project["version"]
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        found["gpu"] = torch.cuda.get_device_name()
        found["architecture"] = f"sm_{major}{minor}"
        found["cuda"] = str(torch.version.cuda)
        found["driver"] = _output(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        )
    return found


def commit() -> dict[str, str | bool]:
    """The commit that is checked out ("unknown" where there is no git), and whether files that
    it holds were changed since."""
    identity = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changes = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return {"id": identity or "unknown", "dirty": bool(changes)}


def _output(*command: str) -> str:
    """The first line that a command prints; empty where it cannot run."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.split("\n")[0].strip() if done.returncode == 0 else ""
