"""What a training step computes: in which precision, and of which mean."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from moca.contrast import contrast
from moca.model import MocaModel
from moca.pretrain import pretrain
from moca.run import read_log
from safetensors.torch import load_file
from test_training import command, stopped_after
from tiny import contrast_config, cpt_config, same_weights, weights

STAGES = {"cpt": (cpt_config, pretrain), "contrast": (contrast_config, contrast)}


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_in_bfloat16_trains_as_one_in_float32(data, tmp_path, stage):
    """At the rate of stage 1, few steps reach from one number of bfloat16 to the next."""
    make, train = STAGES[stage]
    model = MocaModel.from_pretrained(data["model"])
    model.vlm.to(torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    before = load_file(tmp_path / "bf16" / "model.safetensors")
    assert {tensor.dtype for tensor in before.values()} == {torch.bfloat16}
    half = {**data, "model": str(tmp_path / "bf16")}
    options = {"optimizer": "adamw", "lr": 2e-6, "warmup": 0.0, "steps": 2, "save_every": 1}
    train(make(half, tmp_path / "half", **options))
    train(make(data, tmp_path / "whole", **options))
    whole, start = weights(tmp_path / "whole"), load_file(data["model"] + "/model.safetensors")
    half_now = weights(tmp_path / "half")
    assert {tensor.dtype for tensor in half_now.values()} == {torch.float32}
    assert MocaModel.from_pretrained(tmp_path / "half" / "model").vlm.dtype == torch.float32
    moved = {name: (half_now[name] != before[name]).float().mean() for name in before}
    expected = {name: (whole[name] != start[name]).float().mean() for name in start}
    assert all(moved[name] > 0.98 * expected[name] for name in moved)
    assert all(moved[name] > 0.9 for name in moved if name.endswith("norm.weight"))
    with stopped_after(1):
        train(make(half, tmp_path / "parts", **options))
    train(make(half, tmp_path / "parts", **options, resume=True))
    assert same_weights(tmp_path / "half", tmp_path / "parts")


def in_two_processes(stage: str, config, folder) -> None:
    launch = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        "-m", "moca",
    ]  # fmt: skip
    done = subprocess.run(
        launch + command(stage, dataclasses.asdict(config), folder)[3:],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def mostly_words(data, tmp_path_factory) -> str:
    """Documents of which few have a picture, and batches of them none."""
    source = tmp_path_factory.mktemp("words") / "documents.jsonl"
    lines = [{"text": f"Only words stand in document {n}."} for n in range(40)]
    documents = Path(data["documents"])
    picture = json.loads(documents.read_text().splitlines()[0])
    picture["images"] = [str(documents.with_name(name)) for name in picture["images"]]
    source.write_text("".join(json.dumps(line) + "\n" for line in [*lines, *[picture] * 8]))
    return str(source)


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_equal_one(data, tmp_path, stage, mostly_words):
    """Two gloo processes with half the pairs or micro-batches each make the steps of one process
    with all; batches without pictures and of other lengths among them."""
    make, train = STAGES[stage]
    each, together = {
        "cpt": ({"accumulation": 2}, {"accumulation": 4}),
        "contrast": ({"batch_size": 4}, {"batch_size": 8}),
    }[stage]
    options = {"steps": 3, "optimizer": "adamw", "grad_clip": 0.0}
    if stage == "cpt":
        options |= {"documents": [mostly_words], "batch_cost": 100}
    in_two_processes(stage, make(data, tmp_path / "two", **options, **each), tmp_path)
    train(make(data, tmp_path / "one", **options, **together))
    one, two = (read_log(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) == 3
    for left, right in zip(one, two, strict=True):
        assert left.keys() == right.keys()
        names = [key for key in left if key.startswith("loss") or key == "grad_norm"]
        values = [[line[key] for key in names] for line in (left, right)]
        np.testing.assert_allclose(*values, rtol=1e-3)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    moved = max(float((one[name] - two[name]).abs().mean()) for name in one)
    assert moved < 0.02 * 3 * 3e-3, "of the three steps of lr 3e-3 at most a fiftieth differs"


def test_every_masked_token_and_patch_of_a_step_counts_the_same(data, tmp_path, mostly_words):
    """However a step is cut into micro-batches, and where one of them has no picture."""
    options = {"documents": [mostly_words], "batch_cost": 100, "steps": 8, "log_every": 1}
    frozen = {"lr": 1e-30, "weight_decay": 0.0, "optimizer": "adamw"}
    for name, values in (("single", {}), ("double", {"accumulation": 2, "steps": 4})):
        pretrain(cpt_config(data, tmp_path / name, **{**options, **frozen, **values}))
    single, double = (read_log(tmp_path / name) for name in ("single", "double"))
    without = [line for line in single if "loss_mae" not in line]
    assert 0 < len(without) < 8, "some micro-batches have no picture, and no loss of one"
    for step, line in enumerate(double):
        parts = [part["loss_mae"] for part in single[2 * step : 2 * step + 2] if "loss_mae" in part]
        if not parts:
            assert "loss_mae" not in line
        elif len(parts) == 1:
            assert line["loss_mae"] == pytest.approx(parts[0], rel=1e-5)
        else:
            assert min(parts) <= line["loss_mae"] <= max(parts)
        assert line["loss"] == pytest.approx(line["loss_mlm"] + line.get("loss_mae", 0.0))
