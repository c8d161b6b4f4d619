"""Where kernels for GPUs have been proven: on which architectures their tests have passed.

The table is `verified.json` beside this file, {op: {backend: {architecture: how}}}; "auto" takes
cuda and triton only where it has an entry. Whoever tests on a GPU records what passed, with
`record()`, in a file of their own; `python -m moca_fast --record FILE` adds it to the table.

An entry says when and with what it was proven: date, GPU, driver and versions. Another version of
torch or Triton does not unprove it.
"""

import json
import os
import re
from collections.abc import ItemsView
from functools import cache
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_name("verified.json")
BACKENDS = ("cuda", "triton")
DETAILS = ("date", "gpu", "driver", "torch", "triton", "cuda", "commit")

# op -> backend -> architecture ("sm_90") -> DETAILS
Table = dict[str, dict[str, dict[str, dict[str, str]]]]


@cache
def architecture(device: torch.device) -> str:
    """What the table calls a GPU: "sm_90"."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def table() -> Table:
    """The table as it was when it was first asked for."""
    return read(TABLE)


def reason(op: str, backend: str, architecture: str) -> str | None:
    """None where a kernel's tests have passed, else what is missing."""
    if architecture in table().get(op, {}).get(backend, {}):
        return None
    return f"its tests have not passed on {architecture} (moca_fast/verified.json)"


def read(path: Path) -> Table:
    """The table in a file.

    Raises:
        ValueError: not a table; names the entry that is wrong.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected JSON: {error}") from error
    check(found, str(path))
    return found


def check(found: Table, source: str) -> None:
    """Raises ValueError, naming the entry, where `found` is not a table."""
    for op, backends in _items(found, source):
        for backend, architectures in _items(backends, f"{source}: {op}"):
            for name, details in _items(architectures, f"{source}: {op}, {backend}"):
                entry = f"{source}: {op}, {backend}, {name}"
                if backend not in BACKENDS:
                    raise ValueError(f"{entry}: expected a backend of {BACKENDS}")
                if not re.fullmatch(r"sm_\d+", name):
                    raise ValueError(f"{entry}: expected an architecture such as sm_90")
                given = tuple(key for key, _ in _items(details, entry))
                if sorted(given) != sorted(DETAILS):
                    raise ValueError(f"{entry}: expected {DETAILS}, got {given}")


def _items(value: Any, entry: str) -> ItemsView[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{entry}: expected names with values, got {value!r:.80}")
    return value.items()


def record(found: Table, path: Path) -> None:
    """Adds entries to the table at `path`, in place of older ones; makes the file if need be.

    The file is the old one or the new one, also where it cannot be written.

    Raises:
        ValueError: as `read`, of `found` too.
    """
    check(found, "record")
    merged = read(path) if path.exists() else {}
    for op, backends in found.items():
        for backend, architectures in backends.items():
            merged.setdefault(op, {}).setdefault(backend, {}).update(architectures)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        text = json.dumps(merged, indent=2, sort_keys=True) + "\n"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
