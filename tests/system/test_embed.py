"""`Embedder.encode`: what it takes, in which order it answers, and that packing changes nothing.

Then the index: what it refuses before any work, and what it does not answer from.
"""

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from moca import Document, Embedder, MocaModel
from moca.config import ConfigError, EmbedConfig, EvalConfig
from moca.data.records import IMAGE_MARKER
from moca.embed import EMBEDDINGS, INDEX, build_index, search
from moca.retrieval import evaluate_model


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


def test_fp32_of_bf16_weights_is_that_of_the_same_weights_in_float32(tmp_path):
    items = ["a red square", ["blue ", picture("blue", "frame")]]
    model = MocaModel.from_pretrained(tiny.write_model(tmp_path / "m"), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    exact = MocaModel.from_pretrained(tmp_path / "bf16", dtype=torch.float32).eval()
    asked = Embedder.from_pretrained(tmp_path / "bf16", precision="fp32")
    assert asked.model.vlm.dtype == torch.float32
    np.testing.assert_array_equal(
        asked.encode(items), Embedder(exact, precision="fp32").encode(items)
    )
    assert Embedder.from_pretrained(tmp_path / "bf16").model.vlm.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"precision fp32: .*float32.*, got torch\.bfloat16"):
        Embedder.from_pretrained(tmp_path / "bf16", precision="fp32", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"precision bf16: .*bfloat16.*, got torch\.float16"):
        Embedder.from_pretrained(tmp_path / "bf16", precision="bf16", dtype=torch.float16)


def test_interleaving_matters(embedder):
    a, b = embedder.encode([["red ", picture(), " square"], [picture(), "red  square"]])
    assert a @ b < 1 - 1e-6


def test_prompt_is_put_before(embedder):
    with_prompt = embedder.encode(["square"], prompt="a red ")
    np.testing.assert_allclose(with_prompt, embedder.encode(["a red square"]), atol=1e-5)


def test_a_prompt_has_a_place_for_the_document(embedder):
    item = ["red ", picture(), " square"]
    for prompt, same in (
        ("a {} in", ["a red ", picture(), " square in"]),
        ("{image}a {text} in", [picture(), "a red  square in"]),
        ("in {text}{image}", ["in red  square", picture()]),
    ):
        expected = embedder.encode([same])
        np.testing.assert_allclose(embedder.encode([item], prompt=prompt), expected, atol=1e-5)
    [braces] = embedder.encode("{} {image} {text}", prompt="{image}{text}")
    np.testing.assert_allclose(braces, embedder.encode("{} {image} {text}")[0], atol=1e-5)
    for prompt in ("{} {}", "{text}", "{image}", "{} {text}{image}", "<image>\nRepresent it."):
        with pytest.raises(ValueError, match=r"expected wording around one \{\}.*got"):
            embedder.encode([item], prompt=prompt)


def test_an_index_keeps_its_prompts(built, tmp_path):
    """Documents have one around them when they are embedded, queries when they are searched."""
    source = tmp_path / "records.jsonl"
    records = [{"text": IMAGE_MARKER, "images": ["red.png"]}, {"text": "a black square"}]
    source.write_text("\n".join(map(json.dumps, records)))
    picture().save(tmp_path / "red.png")
    settings = {"document_prompt": "{}\nred square", "query_prompt": "a picture of"}
    model, output = str(built / "model"), tmp_path / "index"
    build_index(EmbedConfig(model, str(source), str(output), precision="fp32", **settings))
    embedder = Embedder.from_pretrained(model, precision="fp32")
    table = pq.read_table(output / EMBEDDINGS)
    vectors = embedder.encode([[picture(), "\nred square"], "a black square\nred square"])
    np.testing.assert_allclose(np.stack(table["embedding"].to_pylist()), vectors, atol=1e-5)
    assert table["text"].to_pylist() == [record["text"] for record in records]
    scores = sorted(vectors @ embedder.encode("a picture of frame")[0], reverse=True)
    assert [hit.score for hit in search(output, " frame")] == pytest.approx(scores, abs=1e-5)


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


@pytest.mark.parametrize("name", ["batch_tokens", "max_length"])
@pytest.mark.parametrize("value", [0, -5])
def test_sizes_below_one_are_refused(embedder, name, value):
    with pytest.raises(ValueError, match=f"{name}.*got {value}"):
        Embedder(embedder.model, **{name: value})


def test_an_embedding_that_is_not_finite_is_named(tmp_path):
    broken = Embedder.from_pretrained(tiny.write_model(tmp_path / "model"), precision="fp32")
    with torch.no_grad():
        broken.model.vlm.model.visual.blocks[0].mlp.up_proj.weight[0] = float("nan")
    with pytest.raises(ValueError, match="item 1: the model's embedding of it is not finite"):
        broken.encode(["text", picture()])


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with a model, documents whose file name is no UTF-8, and an index of them."""
    folder = tmp_path_factory.mktemp("built")
    model = tiny.write_model(folder / "model")
    source = os.fsdecode(os.fsencode(folder) + b"/caf\xe9.jsonl")
    shutil.copy(tiny.write_data(folder / "data")["documents"], source)
    for picture in (folder / "data").glob("*.png"):
        shutil.copy(picture, folder)
    config = EmbedConfig(str(model), source, str(folder / "index"), max_length=8, on_error="skip")
    build_index(config)
    return folder


@pytest.fixture
def index(built, tmp_path) -> Path:
    """The index, to be changed."""
    return Path(shutil.copytree(built / "index", tmp_path / "index"))


def test_an_image_that_can_never_fit_is_a_bad_record(built, tmp_path, caplog):
    source = tmp_path / "records.jsonl"
    records = [{"text": IMAGE_MARKER, "images": ["large.png"]}, {"text": "a black square"}]
    source.write_text("\n".join(map(json.dumps, records)))
    picture().save(tmp_path / "large.png")
    options = {"model": str(built / "model"), "source": str(source), "max_length": 5}
    assert build_index(EmbedConfig(**options, output=str(tmp_path / "1"), on_error="skip")) == 1
    assert "skipped 1 of 2 records, most often: an image of 6 tokens" in caplog.text
    with pytest.raises(ValueError, match="line 1: an image of 6 tokens does not fit"):
        build_index(EmbedConfig(**options, output=str(tmp_path / "2")))


@pytest.mark.parametrize("command", ["embed", "pairs", "mmeb", "beir"])
def test_bad_documents_are_found_with_their_prompts_before_the_weights(built, tmp_path, command):
    """An image of 6 tokens fits without the wording around it, of which it is the only content."""
    model = shutil.copytree(built / "model", tmp_path / "model")
    (model / "model.safetensors").unlink()
    picture().save(tmp_path / "red.png")
    pair = {"qry": "", "qry_image_path": "red.png", "pos_text": "red", "pos_image_path": "red.png"}
    records = {
        "embed": {"images": "red.png"},
        "pairs": pair,
        "mmeb": {"qry_text": "red", "tgt_text": [""], "tgt_img_path": ["red.png"]},
        "beir": {"image": "red.png", "query": "red"},
    }
    sources = {name: tmp_path / f"{name}.jsonl" for name in records}
    (tmp_path / "beir").mkdir()
    picture().save(tmp_path / "beir" / "red.png")
    sources["beir"] = tmp_path / "beir" / "data.jsonl"
    sources[command].write_text(json.dumps(records[command]))

    def run(wording: str, on_error: str = "raise"):
        prompt = {"query_prompt" if command == "pairs" else "document_prompt": wording}
        options = {"model": str(model), "max_length": 6, "on_error": on_error, **prompt}
        if command == "embed":
            output = str(tmp_path / "index")
            return build_index(EmbedConfig(source=str(sources["embed"]), output=output, **options))
        source = tmp_path / "beir" if command == "beir" else sources[command]
        return evaluate_model(EvalConfig(**{command: {"t": str(source)}}, **options))

    with pytest.raises(ValueError, match=r"image of 6 tokens .* max_length 6 with the wording"):
        run("red {}")
    with pytest.raises(ValueError, match=r"holds no|no query has a relevant"):
        run("red {}", "skip")
    for on_error in ("raise", "skip"):
        with pytest.raises(OSError, match="safetensors"):
            run("", on_error)


def test_names_that_are_no_utf8_are_kept_readable(built):
    assert search(built / "index", "red", k=1)[0].name.startswith("caf\\udce9.jsonl line")


def test_a_query_that_is_cut_is_told(built, capsys):
    search(built / "index", "red")
    assert "cut" not in capsys.readouterr().err
    search(built / "index", "red square " * 250)
    captured = capsys.readouterr()
    assert "the query was cut to the 8 tokens" in captured.err and not captured.out


@pytest.mark.parametrize(
    ("query", "k", "message"),
    [
        (" ", 5, "query: expected what to look for, got ' '"),
        ("red", 0, "k: .* at least 1, got 0"),
        ("<|image_pad|>", 5, r"^query: <\|image_pad\|> stands outside"),
    ],
)
def test_bad_questions_are_refused(built, query, k, message):
    with pytest.raises(ValueError, match=message):
        search(built / "index", query, k)


def test_an_index_of_another_model_is_refused(index, tmp_path):
    about = json.loads((index / INDEX).read_text())
    about["model"] = str(tiny.write_model(tmp_path / "model", seed=1))
    (index / INDEX).write_text(json.dumps(about))
    with pytest.raises(
        ValueError, match=r"another model than the one that lies in .*embed the doc"
    ):
        search(index, "red")
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(FileNotFoundError, match=r"index: the model .*model, is gone; .*--model"):
        search(index, "red")


@pytest.mark.parametrize("file", ["moca.json", "tokenizer.json", "preprocessor_config.json"])
def test_all_that_makes_embeddings_is_of_the_model(built, tmp_path, file):
    """And a model that has been moved is known by it."""
    model = Path(shutil.copytree(built / "model", tmp_path / "model"))
    settings = json.loads((model / "moca.json").read_text())
    (model / "moca.json").write_text(json.dumps(settings | {"temperature": 0.5}))
    assert search(built / "index", "red", model=model) == search(built / "index", "red")
    changed = (model / file).read_text() + " "  # of moca.json, what it says counts
    if file == "moca.json":
        changed = json.dumps(settings | {"pooling": "last"})
    (model / file).write_text(changed)
    with pytest.raises(ValueError, match=r"another model.*weights, tokenizer or settings differ"):
        search(built / "index", "red", model=model)


def test_a_query_may_be_a_picture(built):
    [hit] = search(built / "index", built / "red-square.png", k=1)
    embedder = Embedder.from_pretrained(built / "model", max_length=8)
    vectors = np.stack(pq.read_table(built / "index" / EMBEDDINGS)["embedding"].to_pylist())
    scores = vectors @ embedder.encode([picture()])[0]
    assert hit.score == pytest.approx(scores.max(), abs=1e-5)


def test_hits_are_printable(built, tmp_path):
    source = tmp_path / "records.jsonl"
    record = {
        "name": "a\x1b]0;title\x07",
        "text": "red\x1b[2J\n\u202esquare\x9b café 👩\u200d🔬",
    }
    source.write_text(json.dumps(record))
    build_index(EmbedConfig(str(built / "model"), str(source), str(tmp_path / "index")))
    shown = (r"a\x1b]0;title\x07", r"red\x1b[2J \u202esquare\x9b café 👩" + "\u200d🔬")
    [hit] = search(tmp_path / "index", "red")
    assert (hit.name, hit.text) == shown
    table = pq.read_table(tmp_path / "index" / EMBEDDINGS)
    table = table.set_column(0, "name", [["\x1b[2J\nb"]])  # an index may be of somebody else
    pq.write_table(table, tmp_path / "index" / EMBEDDINGS)
    assert search(tmp_path / "index", "red")[0].name == r"\x1b[2J\nb"


def test_two_processes_never_make_one_index(built, tmp_path, monkeypatch):
    source = tmp_path / "records.jsonl"
    source.write_text('{"text": "red"}')
    config = EmbedConfig(str(built / "model"), str(source), str(tmp_path / "index"))
    lock = tmp_path / ".index.lock"
    with (
        tiny.locked(lock),
        pytest.raises(ConfigError, match=r"output: another process writes to .*index: wait"),
    ):
        build_index(config)
    scores = EvalConfig(config.model, {"a": str(source)}, output=str(tmp_path / "index"))
    with (
        tiny.locked(lock),
        pytest.raises(ConfigError, match=r"output: another process writes to .*index: wait"),
    ):
        evaluate_model(scores)

    def ended(*_):
        (tmp_path / "index").mkdir()

    with monkeypatch.context() as patch:
        patch.setattr("fcntl.lockf", ended)
        with pytest.raises(ConfigError, match=r"output: .*index exists; give another folder"):
            build_index(config)
    (tmp_path / "index").rmdir()
    assert build_index(config) == 1 and not lock.exists()


def test_a_source_is_read_before_the_weights(built, tmp_path):
    model = shutil.copytree(built / "model", tmp_path / "model")
    (model / "model.safetensors").unlink()
    source = tmp_path / "scans"
    source.mkdir()
    picture().save(source / "a.png")
    with pytest.raises(FileNotFoundError, match=r"scans: expected .*HTML files in it, got 1 \.png"):
        build_index(EmbedConfig(str(model), str(source), str(tmp_path / "index")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "{}",
            r"index\.json: expected model \(str\), model_digest \(str\), documents \(int\), dim",
        ),
        ("[]", r"index\.json: expected model \(str\)"),
        ("{", r"index\.json: damaged, no JSON"),
        ({"query_prompt": None}, r"index\.json: expected query_prompt \(str\); .*earlier version"),
        ({"model_digest": None}, r"index\.json: expected model_digest \(str\); .*earlier version"),
        ({"max_length": "8"}, r"index\.json: expected max_length \(int\)"),
        ({"dimension": 31}, r"embeddings\.parquet: expected 25 rows of .*31 x float.*32 x float"),
        ({"documents": 24}, r"embeddings\.parquet: expected 24 rows .* got 25"),
    ],
)
def test_a_damaged_index_json_is_named(index, change, message):
    if isinstance(change, dict):
        change = json.dumps(json.loads((index / INDEX).read_text()) | change)
    (index / INDEX).write_text(change)
    with pytest.raises(ValueError, match=message):
        search(index, "red")


def test_damaged_vectors_are_named(index):
    table = pq.read_table(index / EMBEDDINGS)
    lists = pa.array(table["embedding"].to_pylist())
    for broken in (
        table.drop_columns("name"),
        table.set_column(3, "embedding", lists),
        table.set_column(0, "name", pa.nulls(len(table), pa.string())),
    ):
        pq.write_table(broken, index / EMBEDDINGS)
        with pytest.raises(ValueError, match=r"embeddings\.parquet: expected 25 rows"):
            search(index, "red")
    (index / EMBEDDINGS).write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"embeddings\.parquet: damaged, no Parquet"):
        search(index, "red")
    (index / EMBEDDINGS).unlink()
    with pytest.raises(ConfigError, match=r"is no index: expected embeddings\.parquet"):
        search(index, "red")


def test_an_output_that_cannot_be_made_is_refused_first(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"idx cannot be made: .*file: Not a directory"):
        build_index(EmbedConfig("nowhere", "nowhere", str(tmp_path / "file" / "idx")))
