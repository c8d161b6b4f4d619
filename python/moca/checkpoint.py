"""Checkpoints that a crash, a full disk or a second writer cannot leave half-written.

A checkpoint is a folder `checkpoint-<step>`: tensors in safetensors, the rest in JSON, and a
manifest with the size and SHA-256 of every file. It is written beside its place and renamed into
it, so it is there whole or not at all. Nothing in it is ever unpickled.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from moca.config import ConfigError

MANIFEST, STATE = "manifest.json", "state.json"
_NAME = re.compile(r"checkpoint-(\d{8})$")
_LEFT = re.compile(r"\.(?P<name>.+)\.(?P<kind>partial|retired)-(?P<writer>\d+)$")


class CheckpointError(RuntimeError):
    """A checkpoint is missing or damaged; the message says which file and how."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the system in the block say what could not be written: of a full disk they do not.

    Raises:
        OSError: also where safetensors has an error of its own.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and (error.errno is None or error.filename is not None):
            raise
        raise OSError(f"{path} could not be written: {error}") from error


def check_place(path: Path) -> None:
    """Raise OSError unless a file or folder can be made at `path`; says what is in the way."""
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise OSError(
            f"{path} cannot be made: expected a folder that can be written to, but {parent}: "
            f"{error.strerror}"
        ) from None


def take_lock(lock: Path, output: Path) -> IO:
    """Keep other processes from writing `output` until the file that is returned is closed.

    Raises:
        ConfigError: another process keeps this one from it.
    """
    file = lock.open("w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.close()
            busy = f"output: another process writes to {output}"
            raise ConfigError(f"{busy}: wait for it, or give another place") from None
        tqdm.write(f"{output} is not kept from other writers: {error.strerror}")  # without locks
    return file


@contextmanager
def new_output(path: Path, kind: str) -> Iterator[None]:
    """Keep other processes from a file or folder that the block is to make.

    Args:
        path: of the file or folder to come.
        kind: "file" or "folder".

    Raises:
        ConfigError: it exists, cannot be made, or another process makes it.
    """
    _check_new(path, kind)
    try:
        check_place(path)
    except OSError as error:
        raise ConfigError(f"output: {error}") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    with take_lock(lock, path):
        try:
            _check_new(path, kind)  # another process may have ended since
            yield
        finally:
            lock.unlink(missing_ok=True)


def _check_new(path: Path, kind: str) -> None:
    if path.exists() or path.is_symlink():
        raise ConfigError(f"output: {path} exists; give another {kind}")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a fresh folder that takes the place of `path` when the block succeeds.

    On an error (a full disk, say) the folder is removed and `path` stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tidy(path.parent, path.name)
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    temporary.mkdir()
    try:
        with naming(path):
            yield temporary
        retired = path.with_name(f".{path.name}.retired-{os.getpid()}")
        if path.exists():
            path.rename(retired)
        temporary.rename(path)
        shutil.rmtree(retired, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def is_leftover(path: Path) -> bool:
    """Whether a file or folder is what a process that was killed left of something unfinished."""
    return _LEFT.match(path.name) is not None


def tidy(folder: str | Path, name: str | None = None) -> None:
    """Remove what processes that were killed while they wrote have left in a folder (of what was to
    be called `name`, or all of it), and bring back what they had moved out of the way.

    For before this process writes: what bears its own number is of an earlier process, as in a
    container, where the numbers are the same at every start.
    """
    for path in Path(folder).iterdir():
        found = _LEFT.match(path.name)
        if not found or name not in (None, found["name"]):
            continue
        writer = int(found["writer"])
        if writer != os.getpid() and _alive(writer):
            continue
        place = path.with_name(found["name"])
        if found["kind"] == "retired" and not place.exists():
            path.rename(place)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of somebody else
        return True
    return True


def write_file(path: str | Path, write: Callable[[Path], Any]) -> None:
    """Run `write(temporary)` and rename its file to `path`: there whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tidy(path.parent, path.name)
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with naming(path):
            write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(
    run: str | Path,
    step: int,
    *,
    modules: Mapping[str, torch.nn.Module],
    optimizers: list[torch.optim.Optimizer],
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write `run/checkpoint-<step>` and remove all but the newest `keep`.

    Args:
        modules: saved under their names.
        state: anything JSON holds (data order, loss history, elapsed seconds).

    Raises:
        CheckpointError: the checkpoint could not be written; earlier ones are untouched.
    """
    path = Path(run) / f"checkpoint-{step:08d}"
    try:
        with replacing(path) as folder:
            for name, module in modules.items():
                tensors = {k: v.detach().cpu().contiguous() for k, v in _unshared(module).items()}
                save_file(tensors, folder / f"{name}.safetensors")
            for number, optimizer in enumerate(optimizers):
                _save_optimizer(optimizer, folder, f"optimizer-{number}")
            _write_json(folder / STATE, {"step": step, **state})
            _write_json(folder / MANIFEST, {p.name: _digest(p) for p in sorted(folder.iterdir())})
    except (OSError, RuntimeError) as error:
        kept = latest_checkpoint(run)
        raise CheckpointError(
            f"{path} could not be written ({error}); "
            + (f"{kept} is intact" if kept else "no earlier checkpoint exists")
        ) from error
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return path


def load_checkpoint(
    path: str | Path,
    *,
    modules: Mapping[str, torch.nn.Module],
    optimizers: list[torch.optim.Optimizer],
) -> dict[str, Any]:
    """Verify a checkpoint, load it in place and return its `state`.

    Rates, decay and the like stay as the optimizers have them; their moments are loaded.

    Raises:
        CheckpointError: a file is missing, cut or changed, or is of other modules or optimizers.
            In the first case nothing has been loaded.
    """
    path = Path(path)
    verify_checkpoint(path)
    if (saved := len(list(path.glob("optimizer-*.json")))) != len(optimizers):
        raise CheckpointError(f"{path}: expected {len(optimizers)} optimizer(s), it holds {saved}")
    for name, module in modules.items():
        tensors = load_file(path / f"{name}.safetensors")
        missing = set(_unshared(module)) ^ set(tensors)
        if missing:
            raise CheckpointError(f"{path}: {name} differs in {sorted(missing)[:5]}")
        module.load_state_dict(tensors, strict=False)
    for number, optimizer in enumerate(optimizers):
        _load_optimizer(optimizer, path, f"optimizer-{number}")
    return json.loads((path / STATE).read_text(encoding="utf-8"))


def verify_checkpoint(path: str | Path) -> None:
    """Raise CheckpointError unless every file has the size and hash of the manifest."""
    path = Path(path)
    hint = f"; remove {path} to go on from the checkpoint before it"
    if not (path / MANIFEST).is_file():
        raise CheckpointError(f"{path}: {MANIFEST} is missing, this is no whole checkpoint{hint}")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST} is damaged: {error}{hint}") from error
    held = {file.name for file in path.iterdir()} - {MANIFEST}
    if unlisted := sorted((held | {STATE}) - files.keys()):
        raise CheckpointError(f"{path / MANIFEST} is damaged: it lacks {unlisted}{hint}")
    for name, (size, sha256) in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing{hint}")
        if (got := file.stat().st_size) != size:
            raise CheckpointError(f"{file}: expected {size} bytes, got {got}{hint}")
        if _digest(file)["sha256"] != sha256:
            raise CheckpointError(f"{file}: its SHA-256 is not that of the manifest{hint}")


def checkpoints(run: str | Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first."""
    return sorted(p for p in Path(run).glob("checkpoint-*") if _NAME.match(p.name))


def latest_checkpoint(run: str | Path) -> Path | None:
    found = checkpoints(run)
    return found[-1] if found else None


def _unshared(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict, each tensor under its first name only (tied weights appear once)."""
    seen: set[int] = set()
    unique = {}
    for name, tensor in module.state_dict().items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            unique[name] = tensor
            seen.add(tensor.data_ptr())
    return unique


def _save_optimizer(optimizer: torch.optim.Optimizer, folder: Path, name: str) -> None:
    saved = optimizer.state_dict()
    tensors, scalars = {}, {}
    for index, slots in saved["state"].items():
        for slot, value in slots.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{slot}"] = value.detach().cpu().contiguous()
            else:
                scalars[f"{index}.{slot}"] = value
    save_file(tensors, folder / f"{name}.safetensors")
    groups = {"param_groups": saved["param_groups"], "scalars": scalars}
    _write_json(folder / f"{name}.json", groups)


def _load_optimizer(optimizer: torch.optim.Optimizer, folder: Path, name: str) -> None:
    saved = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    state: dict[int, dict[str, Any]] = {}
    values = {**load_file(folder / f"{name}.safetensors"), **saved["scalars"]}
    for key, value in values.items():
        index, _, slot = key.partition(".")
        state.setdefault(int(index), {})[slot] = value
    groups = optimizer.state_dict()["param_groups"]
    wanted, got = ([group["params"] for group in g] for g in (groups, saved["param_groups"]))
    if got != wanted:
        sizes = [[len(params) for params in g] for g in (wanted, got)]
        raise CheckpointError(
            f"{folder / name}.json: expected groups of {sizes[0]} parameters, it holds {sizes[1]}"
        )
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }
