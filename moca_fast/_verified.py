"""Where kernels for GPUs have been proven: on which architectures their tests have passed.

The table is `verified.json` beside this file, {op: {backend: {architecture: how}}}; "auto" takes
cuda and triton only where it has an entry. Whoever tests on a GPU records what passed, with
`record()`, in a file of their own; `python -m moca_fast --record FILE` adds it to the table.

An entry says when and with what it was proven: date, GPU, driver and versions. Another version of
torch or Triton does not unprove it.
"""

import json
import re
from functools import cache
from pathlib import Path

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
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON: {error}") from error
    check(found, str(path))
    return found


def check(found: Table, source: str) -> None:
    """Raises ValueError, naming the entry, where `found` is not a table."""
    for op, backends in found.items():
        for backend, architectures in backends.items():
            for name, details in architectures.items():
                entry = f"{source}: {op}, {backend}, {name}"
                if backend not in BACKENDS:
                    raise ValueError(f"{entry}: expected a backend of {BACKENDS}")
                if not re.fullmatch(r"sm_\d+", name):
                    raise ValueError(f"{entry}: expected an architecture such as sm_90")
                if sorted(details) != sorted(DETAILS):
                    raise ValueError(f"{entry}: expected {DETAILS}, got {tuple(details)}")


def record(found: Table, path: Path) -> None:
    """Adds entries to the table at `path`, in place of older ones; makes the file if need be."""
    check(found, "record")
    merged = read(path) if path.exists() else {}
    for op, backends in found.items():
        for backend, architectures in backends.items():
            merged.setdefault(op, {}).setdefault(backend, {}).update(architectures)
    path.write_text(json.dumps(merged, indent=2, sort_keys=True) + "\n", encoding="utf-8")
