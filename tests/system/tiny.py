"""A miniature model and corpus for tests of training: seconds, not minutes."""

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from moca.config import ContrastConfig, CptConfig, from_dict
from moca.data.images import ImageSettings
from moca.data.records import IMAGE_MARKER
from moca.model import build_model, tiny_config
from moca.saving import build_tokenizer
from safetensors.torch import load_file

IMAGES = ImageSettings(patch_size=4, merge_size=2, min_pixels=64, max_pixels=512)
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 200, 60),
    "blue": (40, 60, 220),
    "grey": (90, 90, 90),
}
SHAPES = ("square", "circle", "cross", "stripes", "corner", "frame")


def picture(colour: str, shape: str) -> bytes:
    """A 16 x 16 PNG of a coloured shape."""
    grid = np.full((16, 16, 3), 255, np.uint8)
    y, x = np.mgrid[:16, :16]
    where = {
        "square": (abs(x - 8) < 5) & (abs(y - 8) < 5),
        "circle": (x - 8) ** 2 + (y - 8) ** 2 < 36,
        "cross": (abs(x - 8) < 2) | (abs(y - 8) < 2),
        "stripes": x % 4 < 2,
        "corner": (x < 8) & (y < 8),
        "frame": (x < 3) | (x > 12) | (y < 3) | (y > 12),
    }[shape]
    grid[where] = COLOURS[colour]
    buffer = io.BytesIO()
    PIL.Image.fromarray(grid).save(buffer, "PNG")
    return buffer.getvalue()


def names() -> list[tuple[str, str]]:
    return [(colour, shape) for colour in COLOURS for shape in SHAPES]


def write_data(folder: Path) -> dict[str, Path]:
    """Interleaved documents, picture pairs and text pairs; their paths by name."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.jsonl" for name in ("documents", "pictures", "words")}
    documents, pictures, words = [], [], []
    for colour, shape in names():
        file = folder / f"{colour}-{shape}.png"
        file.write_bytes(picture(colour, shape))
        text = f"Here is a {colour} {shape}: {IMAGE_MARKER} It is {colour}, and it is a {shape}."
        documents.append({"text": text, "images": [file.name]})
        pictures.append({"qry": f"{colour} {shape}", "pos_text": "", "pos_image_path": file.name})
        words.append({
            "qry": f"{colour} {shape}",
            "pos_text": f"a {shape} in {colour}",
            "neg_text": [f"a {shape} without colour", f"no {colour} shape", "nothing at all"],
        })  # fmt: skip
    documents.append({"text": "Only words stand in this document, and no picture.", "images": []})
    for name, rows in (("documents", documents), ("pictures", pictures), ("words", words)):
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


def write_model(folder: Path, seed: int = 0) -> Path:
    """A saved model with random weights whose tokenizer knows the corpus."""
    texts = [f"a {c} {s} picture document without colour in" for c, s in names()]
    tokenizer = build_tokenizer(texts, 320)
    config = tiny_config(
        tokenizer, hidden=32, layers=3, heads=2, vision_hidden=32, vision_layers=2,
        vision_heads=2, patch_size=4, max_length=512,
    )  # fmt: skip
    build_model(config, tokenizer, IMAGES, seed=seed).save_pretrained(folder)
    return folder


def cpt_config(data: dict[str, str], output: Path, **values) -> CptConfig:
    """Four steps of stage 1 on what the fixture `data` gives."""
    base = {
        "model": data["model"], "output": str(output), "documents": [data["documents"]],
        "steps": 4, "optimizer": "muon", "lr": 3e-3, "batch_cost": 400, "log_every": 1,
        "save_every": 2, "precision": "fp32", "mae_weight": 1.0, "max_length": 128,
    }  # fmt: skip
    return from_dict(CptConfig, {**base, **values})


def contrast_config(data: dict[str, str], output: Path, **values) -> ContrastConfig:
    """Four steps of stage 2 on what the fixture `data` gives."""
    base = {
        "model": data["model"], "output": str(output),
        "pairs": {"pictures": data["pictures"], "words": data["words"]},
        "steps": 4, "optimizer": "muon", "lr": 3e-3, "batch_size": 8, "log_every": 1,
        "save_every": 2, "precision": "fp32", "temperature": 0.05,
    }  # fmt: skip
    return from_dict(ContrastConfig, {**base, **values})


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Those of the model that a run left."""
    return load_file(run / "model" / "model.safetensors")


def same_weights(a: Path, b: Path) -> bool:
    left, right = weights(a), weights(b)
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Another process holds a lock: one of this process would not count."""
    code = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(path)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    try:
        yield
    finally:
        holder.communicate()
