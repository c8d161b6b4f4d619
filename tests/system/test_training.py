"""Both stages on a miniature: they learn, they resume exactly, they refuse what cannot work."""

import dataclasses
import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import moca.checkpoint
import numpy as np
import PIL.Image
import pytest
import tiny
import torch
from moca.checkpoint import CheckpointError, checkpoints
from moca.config import ConfigError
from moca.contrast import PairBatches, contrast, load_tasks
from moca.data.encode import Encoder
from moca.data.packing import pack
from moca.data.records import IMAGE_MARKER, Document
from moca.embed import Embedder
from moca.model import MocaModel
from moca.optim import build_optimizers, set_learning_rate
from moca.pretrain import load_objective, mask_batch, patch_rows, pretrain
from moca.processes import leave_process_group, load_batches, stop_signal
from moca.run import (
    Diverged,
    Interrupted,
    Run,
    read_log,
    seeded,
)
from safetensors.torch import load_file
from tiny import contrast_config, cpt_config, same_weights


@contextmanager
def stopped_after(step: int):
    """A run is interrupted once it has saved that step."""
    save = Run.save

    def save_and_stop(run):
        save(run)
        if run.step == step:
            raise Interrupted("stopped")

    with patch.object(Run, "save", save_and_stop), pytest.raises(Interrupted):
        yield


def test_stage1_learns_text_and_pictures(data, tmp_path):
    pretrain(cpt_config(data, tmp_path / "run", steps=60))
    log = read_log(tmp_path / "run")
    assert [line["step"] for line in log] == list(range(1, 61))
    for name in ("loss_mlm", "loss_mae"):
        first, last = (np.mean([line[name] for line in part]) for part in (log[:5], log[-5:]))
        assert last < 0.8 * first, (name, first, last)
    objective = load_objective(tmp_path / "run")
    assert torch.isfinite(objective.patch_head.weight).all()


def test_matrices_have_their_own_learning_rate(data):
    model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 4))
    values = {"optimizer": "muon", "lr": 1e-3}
    for muon_lr, expected in ((0.0, 1e-3), (5e-3, 5e-3)):
        config = contrast_config(data, "run", **values, muon_lr=muon_lr)
        optimizers = build_optimizers(model, config)
        for scale in (0.5, 0.1):
            set_learning_rate(optimizers, scale)
            rates = {
                id(p): group["lr"]
                for optimizer in optimizers
                for group in optimizer.param_groups
                for p in group["params"]
            }
            assert rates[id(model[1].weight)] == pytest.approx(scale * expected)
            assert rates[id(model[0].weight)] == pytest.approx(scale * 1e-3)
            assert rates[id(model[1].bias)] == pytest.approx(scale * 1e-3)


def test_stage2_finds_every_picture_and_phrase(data, tmp_path):
    contrast(contrast_config(data, tmp_path / "run", steps=80, lr=5e-3))
    embedder = Embedder.from_pretrained(tmp_path / "run" / "model")
    queries = embedder.encode([f"{c} {s}" for c, s in tiny.names()])
    pictures = embedder.encode([tiny.picture(c, s) for c, s in tiny.names()])
    found = (queries @ pictures.T).argmax(1) == np.arange(len(queries))
    assert found.mean() > 0.6, found.mean()


@pytest.mark.parametrize("stage", ["cpt", "contrast"])
def test_resumed_run_equals_an_uninterrupted_one(data, tmp_path, stage):
    make, train = {"cpt": (cpt_config, pretrain), "contrast": (contrast_config, contrast)}[stage]
    options = {"flip": 0.5, "rotate": 5.0, "shift": 0.1, "zoom": 0.1, "muon_lr": 6e-3}
    train(make(data, tmp_path / "whole", **options))
    with stopped_after(2):
        train(make(data, tmp_path / "parts", **options))
    assert not (tmp_path / "parts" / "model").exists()
    train(make(data, tmp_path / "parts", **options, resume=True))
    assert same_weights(tmp_path / "whole", tmp_path / "parts")
    steps = [line["step"] for line in read_log(tmp_path / "parts")]
    assert steps == [1, 2, 3, 4]


def test_run_folder_that_exists_is_refused(data, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").write_text("keep")
    with pytest.raises(ConfigError, match="exists; give another folder, or resume=true"):
        pretrain(cpt_config(data, tmp_path / "run"))
    assert (tmp_path / "run" / "precious.txt").read_text() == "keep"


def test_nothing_to_resume(data, tmp_path):
    with pytest.raises(ConfigError, match="no checkpoint found"):
        contrast(contrast_config(data, tmp_path / "run", resume=True))


def test_damaged_checkpoint_is_named(data, tmp_path):
    pretrain(cpt_config(data, tmp_path / "run", steps=2))
    newest = checkpoints(tmp_path / "run")[-1] / "objective.safetensors"
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=r"objective\.safetensors: expected \d+ bytes"):
        pretrain(cpt_config(data, tmp_path / "run", steps=4, resume=True))


def test_a_checkpoint_of_an_earlier_version_is_named(data, tmp_path):
    contrast(contrast_config(data, tmp_path / "run", steps=2))
    newest = checkpoints(tmp_path / "run")[-1]
    state = json.loads((newest / "state.json").read_text())
    state.pop("values"), state.pop("batches")
    (newest / "state.json").write_text(json.dumps(state))
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["state.json"] = moca.checkpoint._digest(newest / "state.json")
    (newest / "manifest.json").write_text(json.dumps(manifest))
    message = r"00000002: state\.json lacks \['batches', 'values'\]; .* earlier version"
    with pytest.raises(CheckpointError, match=message):
        contrast(contrast_config(data, tmp_path / "run", steps=4, resume=True))


@pytest.mark.parametrize("stage", ["cpt", "contrast"])
def test_images_that_can_never_fit_are_bad_records(data, tmp_path, stage, caplog):
    PIL.Image.new("RGB", (64, 64)).save(tmp_path / "large.png")
    large = {"text": IMAGE_MARKER, "images": ["large.png"]}
    if stage == "contrast":
        large = {"qry": IMAGE_MARKER, "qry_image_path": "large.png", "pos_text": "a black square"}
    lines = [json.dumps(large)]
    for number in range(8):
        text = {"text": f"number {number}"}
        pair = {"qry": f"number {number}", "pos_text": f"the number {number}"}
        lines.append(json.dumps(text if stage == "cpt" else pair))
    source = tmp_path / "records.jsonl"
    source.write_text("\n".join(lines))
    train = {"cpt": pretrain, "contrast": contrast}[stage]
    values = {"steps": 2, "max_length": 5}
    if stage == "cpt":
        config = partial(cpt_config, data, documents=[str(source)], **values)
    else:
        config = partial(contrast_config, data, pairs={"n": str(source)}, task_weights={}, **values)
    train(config(tmp_path / "skip", on_error="skip"))
    assert "skipped 1 of 9 records" in caplog.text and "an image of 6 tokens" in caplog.text
    with pytest.raises(ValueError, match=r"line 1: .*an image of 6 tokens does not fit"):
        train(config(tmp_path / "raise"))


def test_resumed_before_the_first_checkpoint(data, tmp_path, monkeypatch):
    def killed(run):
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        pretrain(cpt_config(data, tmp_path / "run", steps=2))
    monkeypatch.undo()
    assert not checkpoints(tmp_path / "run")
    pretrain(cpt_config(data, tmp_path / "run", steps=2, resume=True))
    assert [line["step"] for line in read_log(tmp_path / "run")] == [1, 2]


def test_settings_may_change_between_starts(data, tmp_path, capsys):
    """What the optimizers go by is what the configuration says now, and what changed is said."""
    contrast(contrast_config(data, tmp_path / "run", steps=2, lr=1e-9, weight_decay=0.0))
    capsys.readouterr()
    contrast(contrast_config(data, tmp_path / "run", lr=0.01, betas=[0.5, 0.5], resume=True))
    said = capsys.readouterr()
    assert "resume: lr is 0.01, was 1e-09" in said.out + said.err
    assert "resume: steps is 4, was 2" in said.out + said.err
    newest = checkpoints(tmp_path / "run")[-1]
    (group, *_) = json.loads((newest / "optimizer-0.json").read_text())["param_groups"]
    assert group["initial_lr"] == 0.01
    assert (group["betas"], group["weight_decay"]) == ([0.5, 0.5], 0.01)
    moved = load_file(newest / "objective.safetensors")
    before = load_file(checkpoints(tmp_path / "run")[0] / "objective.safetensors")
    assert max(float((moved[k] - before[k]).abs().max()) for k in moved) > 1e-3


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seed": 1}, "made of other batches"),
        ({"batch_size": 4}, "made of other batches"),
        ({"pairs": ["words"]}, "made of other batches"),
        ({"steps": 1}, "steps: expected at least 2, which .* has reached, got 1"),
        ({"image_tokens": [1, 9]}, r"image_tokens: expected \[\], which .*, got \[1, 9\]"),
    ],
)
def test_stage2_refuses_to_resume_on_other_batches(data, tmp_path, change, message):
    contrast(contrast_config(data, tmp_path / "run", steps=2))
    if "pairs" in change:
        change = {"pairs": {task: data[task] for task in change["pairs"]}}
    with pytest.raises(ConfigError, match=message):
        contrast(contrast_config(data, tmp_path / "run", **{"steps": 4, **change, "resume": True}))


def test_stage1_refuses_to_resume_on_other_batches(data, tmp_path):
    pretrain(cpt_config(data, tmp_path / "run", steps=2))
    with pytest.raises(ConfigError, match="made of other batches"):
        pretrain(cpt_config(data, tmp_path / "run", batch_cost=300, resume=True))
    with pytest.raises(ConfigError, match=r"image_tokens: expected \[\], .* got \[1, 8\]"):
        pretrain(cpt_config(data, tmp_path / "run", image_tokens=[1, 8], resume=True))


def test_another_optimizer_is_named(data, tmp_path):
    contrast(contrast_config(data, tmp_path / "run", steps=2, optimizer="adamw"))
    with pytest.raises(CheckpointError, match=r"expected 2 optimizer\(s\), it holds 1"):
        contrast(contrast_config(data, tmp_path / "run", optimizer="muon", resume=True))


@pytest.mark.parametrize("stage", ["cpt", "contrast"])
def test_a_run_that_diverges_stops(data, tmp_path, stage, monkeypatch):
    make, train = {"cpt": (cpt_config, pretrain), "contrast": (contrast_config, contrast)}[stage]
    train(make(data, tmp_path / "run", steps=2))
    with pytest.raises(Diverged, match=r"step \d+: \w+ is (nan|inf); .*-00000002 is intact"):
        train(make(data, tmp_path / "run", steps=9, save_every=99, lr=1e30, resume=True))
    kept = load_file(checkpoints(tmp_path / "run")[-1] / "objective.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in kept.values())


def test_values_and_counts_outlive_a_start(data, tmp_path):
    options = {"steps": 4, "log_every": 4, "max_length": 6}
    contrast(contrast_config(data, tmp_path / "whole", **options))
    with stopped_after(2):
        contrast(contrast_config(data, tmp_path / "parts", **options))
    contrast(contrast_config(data, tmp_path / "parts", **options, resume=True))
    (whole,), (parts,) = (read_log(tmp_path / name) for name in ("whole", "parts"))
    assert whole["loss"] == parts["loss"]
    whole, parts = (
        json.loads((checkpoints(tmp_path / name)[-1] / "state.json").read_text())["counts"]
        for name in ("whole", "parts")
    )
    assert whole == parts and whole["documents truncated"] > 0


def test_a_batch_of_one_pair_needs_hard_negatives(data, tmp_path):
    with pytest.raises(ConfigError, match="batch_size: expected 2 or more for task 'pictures'"):
        contrast(contrast_config(data, tmp_path / "run", task_batch_sizes={"pictures": 1}))


def test_task_smaller_than_a_batch(data, tmp_path):
    with pytest.raises(ConfigError, match="words"):
        contrast(contrast_config(data, tmp_path / "run", task_batch_sizes={"words": 99}))


def test_tokens_are_dropped_from_the_task_that_says_so(data, tmp_path):
    def tokens(**options) -> dict[str, int]:
        config = contrast_config(data, tmp_path / "run", **options)
        tasks = load_tasks(config.pairs, config.on_error)
        model = MocaModel.from_pretrained(data["model"])
        encoder = Encoder(model.tokenizer, model.image_settings, config.max_length)
        schedule = [(task, range(8)) for task in tasks]
        batches = PairBatches(tasks, schedule, encoder, config)
        return {task: len(batches[step].batch.input_ids) for step, task in enumerate(tasks)}

    whole, words = tokens(), tokens(task_token_dropout={"words": 0.9})
    assert words["words"] < 0.8 * whole["words"]
    assert words["pictures"] == whole["pictures"]
    others = tokens(token_dropout=0.9, task_token_dropout={"words": 0.0})
    assert others["words"] == whole["words"]
    assert others["pictures"] < whole["pictures"]


def test_full_disk_leaves_the_earlier_checkpoint(data, tmp_path, monkeypatch):
    real, calls = moca.checkpoint.save_file, []

    def full_later(tensors, path):
        calls.append(path)
        if len(calls) > 4:
            raise OSError(28, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(moca.checkpoint, "save_file", full_later)
    with pytest.raises(CheckpointError, match=r"No space left.*checkpoint-00000002 is intact"):
        pretrain(cpt_config(data, tmp_path / "run", steps=6))
    monkeypatch.undo()
    pretrain(cpt_config(data, tmp_path / "run", steps=6, resume=True))
    pretrain(cpt_config(data, tmp_path / "whole", steps=6))
    assert same_weights(tmp_path / "whole", tmp_path / "run")


def command(stage: str, config: dict, folder: Path) -> list[str]:
    path = folder / f"{stage}.yaml"
    path.write_text(json.dumps(config))
    return [sys.executable, "-m", "moca", stage, str(path)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_processes_that_prepare_batches_outlive_a_signal(number):
    numbers = torch.utils.data.TensorDataset(torch.arange(40))
    loader = load_batches(numbers, range(40), workers=2)
    found = [next(loader), next(loader)]  # one of each, so both have begun
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, number)
    found += loader
    assert [int(value) for (value,) in found] == list(range(40))


def test_a_signal_that_comes_twice_stops_after_the_step(monkeypatch):
    with stop_signal() as asked:
        assert not asked
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)  # torchrun sends both
        assert asked
        monkeypatch.setattr("moca.processes.ECHO", -1.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_program_that_fails_with_batches_under_way_ends():
    """What multiprocessing sends the others at exit is the signal that they ignore."""
    code = (
        "import torch; from moca.processes import load_batches\n"
        "data = torch.utils.data.TensorDataset(torch.arange(40))\n"
        "def run():\n"
        "    batches = load_batches(data, range(40), workers=2)\n"
        "    next(batches), 1 / 0\n"
        "run()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr


class Slow(torch.utils.data.Dataset):
    def __getitem__(self, number: int) -> int:
        time.sleep(30 * (number == 1))
        return number


def test_a_batch_that_never_comes_is_told(monkeypatch):
    monkeypatch.setattr("moca.processes.PATIENCE", 10)  # a slow machine gives 0 by then
    batches = load_batches(Slow(), range(2), workers=1)
    assert next(batches) == 0
    with pytest.raises(RuntimeError, match=r"no batch came in 10 seconds .* workers=0"):
        next(batches)


def test_two_processes_never_write_to_one_folder(data, tmp_path):
    contrast(contrast_config(data, tmp_path / "run", steps=2))
    resumed = contrast_config(data, tmp_path / "run", steps=3, resume=True)
    with (
        tiny.locked(tmp_path / "run" / ".lock"),
        pytest.raises(ConfigError, match=r"output: another process writes to .*run"),
    ):
        contrast(resumed)
    contrast(resumed)


def test_a_file_system_without_locks_is_told(data, tmp_path, monkeypatch, capsys):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", none)
    contrast(contrast_config(data, tmp_path / "run", steps=1))
    said = capsys.readouterr()
    assert "run is not kept from other writers: No locks available" in said.out + said.err


@pytest.mark.parametrize("train, make", [(pretrain, cpt_config), (contrast, contrast_config)])
def test_an_output_that_cannot_be_made_is_refused_first(data, tmp_path, train, make):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"output: .*run.* cannot be made: .*file: Not a dir"):
        train(make({**data, "model": "nowhere"}, tmp_path / "file" / "run"))


def test_the_decoder_is_there_before_the_model_is(data, tmp_path, monkeypatch):
    """Who finds the model takes stage 1 for done."""

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(MocaModel, "save_pretrained", killed)
    with pytest.raises(KeyboardInterrupt):
        pretrain(cpt_config(data, tmp_path / "run", steps=1))
    monkeypatch.undo()
    pretrain(cpt_config(data, tmp_path / "run", steps=1, resume=True))
    load_objective(tmp_path / "run")
    monkeypatch.setattr("moca.pretrain.write_file", killed)
    with pytest.raises(KeyboardInterrupt):
        pretrain(cpt_config(data, tmp_path / "other", steps=1))
    assert not (tmp_path / "other" / "model").exists()


@pytest.mark.parametrize("config", ["", "[1", "- 1"])
def test_a_damaged_log_or_config_keeps_no_run_from_going_on(data, tmp_path, config, capsys):
    contrast(contrast_config(data, tmp_path / "run", steps=2))
    log = tmp_path / "run" / "log.jsonl"
    log.write_bytes(b'\0\0\n\n{"st\n[1]\n' + log.read_bytes() + b'{"step": 3')
    (tmp_path / "run" / "config.yaml").write_text(config)
    contrast(contrast_config(data, tmp_path / "run", steps=4, resume=True))
    assert [line["step"] for line in read_log(tmp_path / "run")] == [1, 2, 3, 4]
    said = capsys.readouterr()
    assert "4 damaged line(s) left out" in said.err
    assert "what has changed is not known" in said.err + said.out


def test_a_signal_to_all_processes_is_the_runs_to_answer(data, tmp_path):
    """As Ctrl-C in a terminal: the processes that prepare batches get it too."""
    values = {"steps": 400, "save_every": 400, "workers": 2}
    config = dataclasses.asdict(contrast_config(data, tmp_path / "run", **values))
    process = subprocess.Popen(
        command("contrast", config, tmp_path), stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip
    log, deadline = tmp_path / "run" / "log.jsonl", time.monotonic() + 300
    while not log.exists() and process.poll() is None:
        assert time.monotonic() < deadline, "no step was made"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert len(checkpoints(tmp_path / "run")) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopped_by_a_signal_then_resumed(data, tmp_path, number):
    config = dataclasses.asdict(contrast_config(data, tmp_path / "run", steps=400, save_every=5))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command("contrast", config, tmp_path), stderr=subprocess.PIPE, text=True, env=environment
    )
    deadline = time.monotonic() + 300
    while not checkpoints(tmp_path / "run") and process.poll() is None:
        assert time.monotonic() < deadline, "no checkpoint came"
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert process.returncode == 130, errors
        assert "resume=true" in errors
    saved = checkpoints(tmp_path / "run")[-1]
    step = json.loads((saved / "state.json").read_text())["step"]
    assert 0 < step < 400
    resumed = contrast_config(data, tmp_path / "run", steps=step + 2, save_every=5, resume=True)
    contrast(resumed)
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_a_process_leaves_its_group_once():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    leave_process_group()
    assert not torch.distributed.is_initialized()
    leave_process_group()


class TestMasking:
    def masked(self, data, **values):
        from moca.model import MocaModel

        model = MocaModel.from_pretrained(data["model"])
        encoder = Encoder(model.tokenizer, model.image_settings)
        documents = [
            Document.of([f"a {c} {s} ", tiny.picture(c, s), " document"]) for c, s in tiny.names()
        ]
        batch = pack([encoder(d) for d in documents], 2, encoder.image_token_id)
        special = torch.tensor(model.tokenizer.all_special_ids)
        options = {"mlm_probability": 0.4, "mae_probability": 0.5, **values}
        masked = mask_batch(
            batch, special_ids=special, mask_token_id=model.mask_token_id, merge_size=2,
            generator=seeded(1), **options,
        )  # fmt: skip
        return model, batch, masked, special

    def test_text(self, data):
        model, batch, masked, special = self.masked(data)
        changed = masked.labels != -100
        text = ~torch.isin(batch.input_ids, special)
        assert not (changed & ~text).any()
        assert 0.25 < changed[text].float().mean() < 0.55
        assert (masked.batch.input_ids[changed] == model.mask_token_id).all()
        assert torch.equal(masked.labels[changed], batch.input_ids[changed])
        assert torch.equal(masked.batch.input_ids[~changed], batch.input_ids[~changed])

    def test_pictures(self, data):
        _, batch, masked, _ = self.masked(data)
        rows = patch_rows(masked.units, 4)
        seen = torch.ones(len(batch.pixel_values), dtype=torch.bool)
        seen[rows] = False
        assert 0.3 < (~seen).float().mean() < 0.7
        assert torch.equal(masked.batch.pixel_values[seen], batch.pixel_values[seen])
        assert torch.equal(masked.patches, batch.pixel_values)
        noise = masked.batch.pixel_values[rows]
        assert len(noise.unique(dim=0)) == len(noise), "every patch has noise of its own"
        assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1

    def test_none_and_all(self, data):
        _, batch, masked, _ = self.masked(data, mlm_probability=0.0, mae_probability=0.0)
        assert (masked.labels == -100).all() and not len(masked.units)
        _, batch, masked, special = self.masked(data, mlm_probability=1.0, mae_probability=1.0)
        assert len(masked.units) * 4 == len(batch.pixel_values)
        text = ~torch.isin(batch.input_ids, special)
        assert torch.equal(masked.labels != -100, text)
