"""The saved directory: loaded by transformers and sentence-transformers without this package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from moca.data.encode import Encoder
from moca.data.packing import pack
from moca.data.records import IMAGE_MARKER, Document
from moca.model import MocaModel

WORKER = Path(__file__).with_name("encode_elsewhere.py")


def embeddings(model: MocaModel, items) -> np.ndarray:
    encoder = Encoder(model.tokenizer, model.image_settings)
    encoded = [encoder(Document.of(item)) for item in items]
    batch = pack(encoded, model.image_settings.merge_size, model.vlm.config.image_token_id)
    with torch.no_grad():
        return model.embed(batch).numpy()


def test_sentence_transformers_gives_the_same_embeddings(
    tiny_model, pictures, tmp_path, torchvision_folder
):
    tiny_model.save_pretrained(tmp_path / "model")
    paths = []
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i}.png")
        paths.append({"path": str(tmp_path / f"{i}.png")})
    interleaved = [
        {"type": "text", "text": "First "},
        {"type": "image", "image": paths[0]},
        {"type": "text", "text": "\nthen another: "},
        {"type": "image", "image": paths[1]},
    ]
    ours = [
        "The quick brown fox",
        "  Layers are like 12 cafés 😀\n",
        pictures[0],
        pictures[2],
        {"image": pictures[1], "text": "Represent the given image."},
        ["First ", pictures[0], "\nthen another: ", pictures[1]],
        ["\nthen another: ", pictures[1]],
    ]
    theirs = [
        *ours[:2],
        paths[0],
        paths[2],
        {"image": paths[1], "text": "Represent the given image."},
        [{"role": "user", "content": interleaved}],
        [{"role": "user", "content": interleaved[2:]}],
    ]
    (tmp_path / "inputs.json").write_text(json.dumps(theirs))
    command = [
        sys.executable,
        str(WORKER),
        str(tmp_path / "model"),
        str(tmp_path / "inputs.json"),
        str(tmp_path / "out.npy"),
        torchvision_folder,
    ]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    want = embeddings(tiny_model, ours)
    singly, together = np.load(tmp_path / "out.npy")
    for got in (singly, together):
        np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-5)
        np.testing.assert_array_less(1 - (got * want).sum(axis=1), 1e-3)
    # The comparison means something only if different inputs are told apart.
    others = (want @ want.T)[~np.eye(len(want), dtype=bool)]
    assert others.max() < 1 - 1e-2


def test_reload_is_identical(tiny_model, pictures, tmp_path):
    items = ["a text", pictures[0], ["a", pictures[1], "b"]]
    want = embeddings(tiny_model, items)
    tiny_model.save_pretrained(tmp_path / "model")
    loaded = MocaModel.from_pretrained(tmp_path / "model")
    np.testing.assert_array_equal(embeddings(loaded, items), want)
    assert loaded.settings == tiny_model.settings
    assert loaded.image_settings == tiny_model.image_settings


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_damaged_weights_are_named(tiny_model, tmp_path, size):
    tiny_model.save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"model: its weights are damaged: "):
        MocaModel.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_other_attention_takes_documents_apart(tiny_model, pictures, tmp_path, implementation):
    items = ["a text", pictures[0], ["a", pictures[1], "b", pictures[2]], "z"]
    tiny_model.save_pretrained(tmp_path / "model")
    loaded = MocaModel.from_pretrained(tmp_path / "model", attn_implementation=implementation)
    np.testing.assert_allclose(embeddings(loaded, items), embeddings(tiny_model, items), atol=1e-5)


def test_saving_replaces_the_old_directory_whole(tiny_model, tmp_path, monkeypatch):
    target = tmp_path / "model"
    tiny_model.save_pretrained(target)
    before = {path.name: path.read_bytes() for path in target.iterdir() if path.is_file()}

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tiny_model.tokenizer, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space left"):
        tiny_model.save_pretrained(target)
    after = {path.name: path.read_bytes() for path in target.iterdir() if path.is_file()}
    assert after == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("foreign", ["notes.txt", "data/rows.jsonl", "1_Pooling/mine"])
def test_saving_refuses_to_replace_what_it_does_not_write(tiny_model, tmp_path, foreign):
    target = tmp_path / "model"
    tiny_model.save_pretrained(target)
    (target / foreign).parent.mkdir(exist_ok=True)
    (target / foreign).write_text("mine")
    with pytest.raises(FileExistsError, match=rf"model holds {foreign.split('/rows')[0]}, which"):
        tiny_model.save_pretrained(target)
    assert (target / foreign).read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_saving_refuses_a_file_and_a_folder_of_another_kind(tiny_model, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="file: expected a folder for the model"):
        tiny_model.save_pretrained(tmp_path / "file")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match=r"other holds config\.json"):
        tiny_model.save_pretrained(tmp_path / "other")
    assert (tmp_path / "other" / "config.json").read_text() == "{}"
    assert (tmp_path / "file").read_text() == "mine"


def test_saving_replaces_an_empty_folder_and_an_earlier_model(tiny_model, tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    tiny_model.save_pretrained(target)
    shard = target / "model-00001-of-00002.safetensors"
    shard.write_bytes(b"of a larger model")
    tiny_model.save_pretrained(target)
    assert (target / "model.safetensors").exists() and not shard.exists()


def test_saving_follows_a_link(tiny_model, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "model")
    for _ in range(2):
        tiny_model.save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "model" / "model.safetensors").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["model"]


def test_config_says_bidirectional(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["text_config"]["is_causal"] is False
    assert "auto_map" not in config


def test_chat_template_concatenates(tiny_tokenizer):
    message = {
        "role": "user",
        "content": [
            {"type": "text", "text": " a "},
            {"type": "image"},
            {"type": "text", "text": "b"},
        ],
    }
    text = tiny_tokenizer.apply_chat_template([message], tokenize=False)
    assert text == f" a {IMAGE_MARKER}b"
    assert (
        tiny_tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
        == "x"
    )


def test_directory_without_image_settings_is_refused(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="preprocessor_config"):
        MocaModel.from_pretrained(tmp_path / "model")


def test_missing_directory_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        MocaModel.from_pretrained(tmp_path / "empty")


def test_a_run_folder_is_told_from_its_model(tmp_path):
    (tmp_path / "run/model").mkdir(parents=True)
    (tmp_path / "run/model/config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=f"did you mean {tmp_path}/run/model\\?"):
        MocaModel.from_pretrained(tmp_path / "run")
