"""What a training step computes: in which precision, and of which mean."""

import pytest
import torch
from moca.contrast import contrast
from moca.model import MocaModel
from moca.pretrain import pretrain
from safetensors.torch import load_file
from test_training import stopped_after
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
    moved = {name: (half_now[name] != before[name]).float().mean() for name in before}
    expected = {name: (whole[name] != start[name]).float().mean() for name in start}
    assert all(moved[name] > 0.98 * expected[name] for name in moved)
    assert all(moved[name] > 0.9 for name in moved if name.endswith("norm.weight"))
    with stopped_after(1):
        train(make(half, tmp_path / "parts", **options))
    train(make(half, tmp_path / "parts", **options, resume=True))
    assert same_weights(tmp_path / "half", tmp_path / "parts")
