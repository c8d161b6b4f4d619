"""What training makes of its data: sizes of images, bad records, hard negatives."""

import json

import PIL.Image
import pytest
from moca.data.encode import Encoder
from moca.data.records import Document
from moca.embed import Embedder
from moca.model import MocaModel
from test_training_numbers import STAGES
from tiny import IMAGES


@pytest.mark.parametrize("stage", STAGES)
def test_image_tokens_bound_images_here_and_in_the_saved_model(data, tmp_path, stage):
    make, train = STAGES[stage]
    options = {"steps": 1, "max_length": 40, "image_tokens": [12, 24]}
    page = PIL.Image.new("RGB", (64, 60))
    (tmp_path / "pages").mkdir()
    for number in range(8):
        page.save(tmp_path / "pages" / f"{number}.png")
    rows = [
        {"text": f"number {n} <image>", "images": [f"{n}.png"]}
        if stage == "cpt"
        else {"qry": f"number {n}", "pos_text": f"page {n}", "pos_image_path": f"{n}.png"}
        for n in range(8)
    ]
    source = tmp_path / "pages" / "pages.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = {"documents": [str(source)]} if stage == "cpt" else {"pairs": {"pages": str(source)}}
    train(make(data, tmp_path / "run", **options, **sources))
    model = MocaModel.from_pretrained(tmp_path / "run" / "model")
    assert MocaModel.from_pretrained(data["model"]).image_settings == IMAGES
    for side in (64, 8):  # as the checkpoint has them, 4 tokens and 1
        document = Document.of(PIL.Image.new("RGB", (side, side)))
        encoded = Encoder(model.tokenizer, model.image_settings)(document)
        assert len(encoded) - 2 == 16
    embedder = Embedder.from_pretrained(tmp_path / "run" / "model", max_length=26)
    assert embedder.encode([page]).shape == (1, 32)
