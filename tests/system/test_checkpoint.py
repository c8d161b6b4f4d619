"""Checkpoints: whole or not there, verified before use, never at the cost of an earlier one."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import moca.checkpoint as checkpoint
import pytest
import torch
from moca.checkpoint import (
    CheckpointError,
    checkpoints,
    latest_checkpoint,
    load_checkpoint,
    replacing,
    save_checkpoint,
    tidy,
    write_file,
)
from safetensors import SafetensorError
from safetensors import torch as safetensors_torch
from torch import nn


def trained(steps: int = 2) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    torch.manual_seed(steps)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizers = [torch.optim.Muon(matrices, lr=0.1), torch.optim.AdamW(vectors, lr=0.1)]
    for _ in range(steps):
        model(torch.randn(3, 4)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return model, optimizers


def save(folder: Path, step: int, keep: int = 9) -> Path:
    model, optimizers = trained(step)
    return save_checkpoint(
        folder,
        step,
        modules={"model": model},
        optimizers=optimizers,
        state={"seconds": 1.5},
        keep=keep,
    )


def load(path: Path, into: tuple | None = None) -> dict:
    model, optimizers = into or trained(0)
    return load_checkpoint(path, modules={"model": model}, optimizers=optimizers)


def test_round_trip_is_exact(tmp_path):
    path = save(tmp_path, 3)
    model, optimizers = trained(0)
    assert load(path, (model, optimizers)) == {"step": 3, "seconds": 1.5}
    want_model, want_optimizers = trained(3)
    for got, want in zip(model.parameters(), want_model.parameters(), strict=True):
        assert torch.equal(got, want)
    for got, want in zip(optimizers, want_optimizers, strict=True):
        torch.testing.assert_close(got.state_dict(), want.state_dict(), rtol=0, atol=0)


def test_keeps_the_newest(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-00000002", "checkpoint-00000003"]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer-0.safetensors", "state.json", "manifest.json"]
)
def test_cut_in_half(tmp_path, name):
    path = save(tmp_path, 2)
    file = path / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    model, optimizers = trained(0)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(CheckpointError, match=name):
        load(path, (model, optimizers))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_changed_byte(tmp_path):
    file = save(tmp_path, 2) / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="SHA-256"):
        load(file.parent)


def test_missing_file(tmp_path):
    path = save(tmp_path, 2)
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda files: files.clear(), r"manifest\.json is damaged: it lacks .*'state\.json'"),
        (lambda files: files.pop("model.safetensors"), r"it lacks \['model\.safetensors'\]"),
    ],
)
def test_a_manifest_that_leaves_files_out_is_refused(tmp_path, change, message):
    path = save(tmp_path, 2)
    files = json.loads((path / "manifest.json").read_text())
    change(files)
    (path / "manifest.json").write_text(json.dumps(files))
    with pytest.raises(CheckpointError, match=message):
        load(path)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left")]
)
def test_a_full_disk_is_told_with_the_place(tmp_path, error):
    def full(path):
        raise error

    with pytest.raises(OSError, match=r"x\.json could not be written: .*No space left"):
        write_file(tmp_path / "x.json", full)
    told = pytest.raises(OSError, match=r"index could not be written: .*No space left")
    with told, replacing(tmp_path / "index") as folder:
        full(folder)


def test_what_a_process_of_the_same_number_left_is_in_nobodys_way(tmp_path):
    """In a container numbers are the same at every start."""
    for kind in ("partial", "retired"):
        (tmp_path / f".index.{kind}-{os.getpid()}").mkdir()
        (tmp_path / f".index.{kind}-{os.getpid()}" / "file").write_text("old")
    (tmp_path / "index").mkdir()
    with replacing(tmp_path / "index") as folder:
        (folder / "file").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    assert (tmp_path / "index" / "file").read_text() == "new"


def test_full_disk_keeps_the_earlier_checkpoint(tmp_path, monkeypatch):
    first = save(tmp_path, 1)

    def full(tensors, path):
        safetensors_torch.save_file(tensors, path)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match=r"No space left.*checkpoint-00000001 is intact"):
        save(tmp_path, 2)
    assert latest_checkpoint(tmp_path) == first
    assert [p.name for p in tmp_path.iterdir()] == [first.name]
    load(first)


def test_unfinished_folder_is_no_checkpoint(tmp_path):
    first = save(tmp_path, 1)
    (tmp_path / ".checkpoint-00000002.partial-123").mkdir()
    (tmp_path / "checkpoint-2").mkdir()
    assert latest_checkpoint(tmp_path) == first


def test_nothing_is_pickled(tmp_path):
    path = save(tmp_path, 2)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
    assert json.loads((path / "state.json").read_text())["step"] == 2


def test_replacing_restores_on_error(tmp_path):
    target = tmp_path / "folder"
    with replacing(target) as folder:
        (folder / "a").write_text("old")
    with pytest.raises(RuntimeError), replacing(target) as folder:
        (folder / "a").write_text("new")
        raise RuntimeError("stop")
    assert (target / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_write_file_leaves_nothing_half_written(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("ha")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_file(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("content", ["[]", '{"model.safetensors": 5}', '{"state.json": {}}'])
def test_manifest_of_another_form(tmp_path, content):
    path = save(tmp_path, 2)
    (path / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        load(path)


def test_what_killed_writers_left_is_tidied_up(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()  # its number is nobody's now
    for name in (".checkpoint-00000002.partial", ".model.retired", ".log.jsonl.retired"):
        (tmp_path / f"{name}-{process.pid}").mkdir()
        (tmp_path / f"{name}-{process.pid}" / "file").write_text("old")
    (tmp_path / f".state.json.partial-{process.pid}").write_text("half")
    (tmp_path / f".index.partial-{os.getppid()}").mkdir()  # a living writer's
    (tmp_path / "log.jsonl").write_text("")
    tidy(tmp_path)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [f".index.partial-{os.getppid()}", "log.jsonl", "model"]
    assert (tmp_path / "model" / "file").read_text() == "old"


def test_full_disk_while_tensors_are_written(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(tensors, path):
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match=r"No space left.*checkpoint-00000001 is intact"):
        save(tmp_path, 2)
