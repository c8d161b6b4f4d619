"""`Embedder.encode`: what it takes, in which order it answers, and that packing changes nothing."""

import io

import numpy as np
import PIL.Image
import pytest
import tiny
from moca import Document, Embedder


@pytest.fixture(scope="module")
def embedder(tmp_path_factory) -> Embedder:
    folder = tiny.write_model(tmp_path_factory.mktemp("m") / "model")
    return Embedder.from_pretrained(folder, precision="fp32")


def picture(colour="red", shape="square") -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(tiny.picture(colour, shape)))


def test_kinds_of_items(embedder, tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(tiny.picture("red", "square"))
    same = [picture(), tiny.picture("red", "square"), path, {"image": picture()}, [picture()]]
    vectors = embedder.encode(same)
    assert vectors.shape == (5, embedder.dimension) and vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, np.repeat(vectors[:1], 5, axis=0), atol=1e-5)
    np.testing.assert_allclose(
        embedder.encode("a red square")[0], embedder.encode(["a red square"])[0]
    )


def test_packing_and_order_change_nothing(embedder):
    items = [f"a {colour} {shape}" * (1 + i % 5) for i, (colour, shape) in enumerate(tiny.names())]
    items[3] = ["before ", picture(), " after"]
    items[7] = picture("blue", "frame")
    together = embedder.encode(items)
    alone = np.concatenate([embedder.encode([item]) for item in items])
    np.testing.assert_allclose(together, alone, atol=2e-5)
    small = Embedder(embedder.model, batch_tokens=1, precision="fp32")
    np.testing.assert_allclose(together, small.encode(items), atol=2e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, atol=1e-5)


def test_precision(embedder):
    items = ["a red square", ["blue ", picture("blue", "frame")]]
    exact = embedder.encode(items)
    rough = Embedder(embedder.model, precision="bf16").encode(items)
    assert rough.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rough, axis=1), 1.0, atol=1e-5)
    assert 0 < np.abs(rough - exact).max() < 0.02
    with pytest.raises(ValueError, match=r"precision: expected one of .*'bf16'.*, got 'half'"):
        Embedder(embedder.model, precision="half")


def test_interleaving_matters(embedder):
    a, b = embedder.encode([["red ", picture(), " square"], [picture(), "red  square"]])
    assert a @ b < 1 - 1e-6


def test_prompt_is_put_before(embedder):
    with_prompt = embedder.encode(["square"], prompt="a red ")
    np.testing.assert_allclose(with_prompt, embedder.encode(["a red square"]), atol=1e-5)


def test_long_documents_are_counted(embedder):
    short = Embedder(embedder.model, max_length=12)
    short.encode(["a red square without colour in a picture document " * 3, [picture(), "a"]])
    assert short.counts["documents truncated"] == 1


@pytest.mark.parametrize(
    ("item", "error", "message"),
    [
        ("", ValueError, "item 1: the document is empty"),
        ("  \n", ValueError, "item 1: the document is empty"),
        (3.5, TypeError, "item 1: expected text, an image"),
        (b"no picture", ValueError, "item 1.*cannot read image"),
        (tiny.picture("red", "cross")[:60], ValueError, "item 1.*cannot read image"),
        (PIL.Image.new("RGB", (1, 5000)), ValueError, "item 1.*aspect ratio"),
    ],
)
def test_bad_items_are_named(embedder, item, error, message):
    with pytest.raises(error, match=message):
        embedder.encode(["fine", item])


def test_no_items(embedder):
    assert embedder.encode([]).shape == (0, embedder.dimension)


def test_documents_pass_through(embedder):
    document = Document.of(["a ", picture()])
    np.testing.assert_allclose(
        embedder.encode([document]), embedder.encode([["a ", picture()]]), atol=1e-5
    )
