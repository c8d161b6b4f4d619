"""Records of the two published schemas become documents and pairs, or a clear error."""

import io
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from moca.data.records import IMAGE_MARKER, Document, Pair, document_from_record, pair_from_record


def test_marker_and_image_counts_must_agree():
    with pytest.raises(ValueError, match=r"row 4: 3 image marker\(s\) .* 2 image\(s\)"):
        Document(IMAGE_MARKER * 3, (b"a", b"b"), "row 4")
    with pytest.raises(ValueError, match="row 4: 3 image"):
        document_from_record({"text": IMAGE_MARKER * 3, "images": [b"a", b"b"]}, name="row 4")
    with pytest.raises(ValueError, match=r"row 4: 2 .* \(<image> in a record, .* 1 image"):
        document_from_record({"text": "<image> <image>", "images": [b"a"]}, name="row 4")
    with pytest.raises(ValueError, match="outside a complete image marker"):
        Document("a <|image_pad|> b", (), "row 4")


def test_half_a_surrogate_pair_is_no_text():
    with pytest.raises(ValueError, match=r"row 4: the text holds '\\ud800' at character 2"):
        Document("a \ud800", (), "row 4")


@pytest.mark.parametrize(("text", "images"), [(3, ()), ("a" + IMAGE_MARKER, (3,)), (None, ())])
def test_document_types(text, images):
    with pytest.raises(TypeError, match="row 1"):
        Document(text, images, "row 1")


def test_document_of():
    image, path = PIL.Image.new("RGB", (4, 4)), Path("a.png")
    document = Document("x")
    assert Document.of(document) is document
    assert Document.of("text") == Document("text")
    assert Document.of(image) == Document(IMAGE_MARKER, (image,))
    assert Document.of(path) == Document(IMAGE_MARKER, (path,))
    assert Document.of(b"png") == Document(IMAGE_MARKER, (b"png",))
    mixed = Document.of(["a ", image, " b ", (path, "c")])
    assert mixed == Document(f"a {IMAGE_MARKER} b {IMAGE_MARKER}c", (image, path))
    after, before = {"text": "t", "image": "a.png"}, {"image": ["a.png", "b.png"], "text": "t"}
    assert Document.of(after) == Document("t" + IMAGE_MARKER, ("a.png",))
    assert Document.of(before) == Document(IMAGE_MARKER * 2 + "t", ("a.png", "b.png"))
    placed = Document.of({"text": f"t {IMAGE_MARKER}", "image": [b"x"]})
    assert placed == Document(f"t {IMAGE_MARKER}", (b"x",))
    assert Document.of({"text": "t"}) == Document("t")
    for wrong in (3, None, {"text": "t", "video": "v"}, {}, ["a", 3]):
        with pytest.raises(TypeError, match="row 2"):
            Document.of(wrong, "row 2")


def test_empty():
    assert Document(" \n").empty and not Document("a").empty
    assert not Document(IMAGE_MARKER, (b"x",)).empty


def test_keys_tell_documents_apart():
    image = PIL.Image.new("RGB", (4, 4))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    documents = [
        *(Document("a"), Document("b"), Document(IMAGE_MARKER, (b"x",)), Document.of(image)),
        *(Document(IMAGE_MARKER, (b"y",)), Document.of(Path("a.png")), Document.of(Path("b.png"))),
    ]
    assert len({document.key() for document in documents}) == len(documents)
    assert Document.of(image.copy()).key() == Document.of(image).key()
    assert Document.of(Path("\ud800")).key() != Document.of(Path("\ud801")).key()
    assert Document("a", name="here").key() == Document("a", name="there").key()


def test_interleaved_record(tmp_path):
    record = {
        "text": "a <|image_1|> b <image>" + IMAGE_MARKER,
        "images": [b"raw", {"bytes": b"raw2", "path": None}, "sub/c.png"],
    }
    document = document_from_record(record, root=tmp_path, name="row 1")
    assert document.text == f"a {IMAGE_MARKER} b {IMAGE_MARKER}{IMAGE_MARKER}"
    assert document.images == (b"raw", b"raw2", tmp_path / "sub/c.png")
    assert document_from_record({"text": "plain", "images": None}).images == ()
    array = np.array([b"one"], object)
    assert document_from_record({"text": "<image>", "images": array}).images == (b"one",)


@pytest.mark.parametrize("image", [{"bytes": b"raw", "path": "a.png"}, b"raw", [b"raw"]])
def test_one_image_may_be_called_so(image):
    for text in ("boat", "", None):
        document = document_from_record({"image": image, "text": text, "id": 7})
        assert document == Document(IMAGE_MARKER + (text or ""), (b"raw",))
    placed = document_from_record({"text": "boat <image>", "image": image})
    assert placed == Document(f"boat {IMAGE_MARKER}", (b"raw",))
    assert document_from_record({"image": image}).text == IMAGE_MARKER
    with pytest.raises(ValueError, match="row 2: expected 'images' or 'image', got both"):
        document_from_record({"image": image, "images": [b"raw"], "text": "boat"}, name="row 2")


def test_images_without_a_marker_go_first():
    record = {"text": "boat", "images": [b"one", b"two"]}
    assert document_from_record(record).text == IMAGE_MARKER * 2 + "boat"
    assert document_from_record({"text": "", "images": ["a.png"]}).text == IMAGE_MARKER
    assert document_from_record({"images": '["a.png"]'}).images == ("a.png",)


def test_a_marker_without_an_image_is_text_only_where_the_record_says_so():
    assert document_from_record({"text": "the <image> tag", "images": []}).text == "the <image> tag"
    given = {"qry_image_path": "", "pos_image_path": [], "neg_image_path": ["", "b.png"]}
    pair = {"qry": "q <image>", "pos_text": "p <image>", "neg_text": ["n <image>", "m"]}
    read = pair_from_record(pair | given)
    assert [side.text for side in (read.query, read.positive)] == ["q <image>", "p <image>"]
    assert [side.text for side in read.negatives] == ["n <image>", IMAGE_MARKER + "m"]
    for field, where in (("qry", "qry"), ("pos", "pos_text"), ("neg", "negative 0")):
        record = pair | given | {f"{field}_image_path": None}
        with pytest.raises(ValueError, match=f"row 3: {where}: <image> in the text but no image"):
            pair_from_record(record, name="row 3")
    for record in ({"text": "a <image>"}, {"text": "a <image>", "images": None, "image": None}):
        with pytest.raises(ValueError, match="row 3: <image> in the text but no image"):
            document_from_record(record, name="row 3")


@pytest.mark.parametrize(
    ("field", "known"),
    [
        *((name, "images") for name in ("Images", "imgs", "img", "image_path", "imges", "picture")),
        *((name, "qry") for name in ("query", "qry_text", "QRY")),
        *((name, "qry_image_path") for name in ("qry_img_path", "query_image", "qryImagePath")),
        *((name, "pos_text") for name in ("positive", "pos", "pos_txt", "positives")),
        *((name, "pos_image_path") for name in ("pos_image", "pos-image-path", "pos_image_pth")),
        *((name, "neg_text") for name in ("neg_texts", "negatives", "neg", "hard_negatives")),
        *((name, "neg_image_path") for name in ("neg_images", "neg_image_paths", "negative_image")),
    ],
)
def test_misspelt_fields_are_refused(field, known):
    whole = {"qry": "q", "pos_text": "p", "qry_image_path": "q.png", "pos_image_path": "p.png"}
    pair = {name: value for name, value in whole.items() if name != known}
    read, record = (
        (document_from_record, {"text": "t"}) if known == "images" else (pair_from_record, pair)
    )
    with pytest.raises(
        ValueError, match=rf"row 6: field '{known}' is missing; found \['{field}'\]"
    ):
        read(record | {field: ["a.png"]}, name="row 6")
    given = {known: "" if known in ("qry", "pos_text") else []}
    assert read(record | given | {field: ["a.png"]}) == read(record | given)
    if known not in ("qry", "pos_text"):
        assert read(record | {field: 3}) == read(record | {field: None}) == read(record)


def test_other_fields_are_metadata():
    record = {"text": "t"}
    others = (
        "id page pages tags title message messages language url source filename date usage next "
        "image_url image_id image_ids is_image image_alt imageType"
    )
    assert document_from_record(record | dict.fromkeys(others.split(), "x")) == Document("t")
    pair = {"qry": "q", "pos_text": "p"}
    others = (
        "qry_id pos_id neg_ids query_type positive query instruction negative_score neg_type next "
        "neg_title neg_meta neg_score neg_scores neg_ctx neg_count pos_page pos_path post_image "
        "page_image_path qry_image_id"
    )
    assert pair_from_record(pair | dict.fromkeys(others.split(), "x")) == pair_from_record(pair)


@pytest.mark.parametrize(
    "field", [{"caption": "a boat"}, {"conversations": [{"from": "human", "value": "What?"}]}]
)
def test_an_image_beside_text_that_is_not_read_is_no_document(field):
    record = {"image": "a.png", "id": 7, "name": "boat"}
    with pytest.raises(
        ValueError, match=rf"row 2: field 'text' is missing; .*{next(iter(field))}.*empty"
    ):
        document_from_record(record | field, name="row 2")
    for text in ("", None):
        given = document_from_record(record | field | {"text": text})
        assert given == document_from_record(record) and given.text == IMAGE_MARKER


def test_a_record_may_name_its_document():
    def name(value):
        return document_from_record({"text": "t", "name": value}, name="row 1").name

    assert name(" page.html:\nLayers") == "page.html: Layers"
    assert [name(value) for value in ("", " ", None, 7)] == ["row 1"] * 4
    with pytest.raises(ValueError, match="row 1: 1 image marker"):
        document_from_record({"text": IMAGE_MARKER, "name": "page"}, name="row 1")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"images": []}, r"'text' is missing; found \['images'\]"),
        ({"text": 3}, "'text' must be a string, got int"),
        ({"text": "<image>", "images": 3}, "'images' must be a list, got int"),
        ({"text": "<image>", "images": [3]}, "got int"),
        ({"text": "<image>", "images": [{"bytes": None}]}, "both are empty"),
        ({"text": "<image>", "images": [{"bytes": "iVBORw0KGgo="}]}, "must be bytes, got str"),
        ({"text": "<image>", "images": [{"bytes": 5}]}, "must be bytes, got int"),
        ({"text": "<image>", "images": [{"path": 5}]}, "got int"),
        ({"text": ""}, "'text' is empty and 'images' gives no image"),
        ({"text": " \n", "images": []}, "'text' is empty and 'images' gives no image"),
        ({"text": "a \ud800"}, r"'\\ud800' at character 2"),
    ],
)
def test_bad_interleaved_records(record, message):
    with pytest.raises(ValueError, match=f"row 9.*{message}"):
        document_from_record(record, name="row 9")


def test_pair_record(tmp_path):
    record = {
        "qry": "<|image_1|>\nRepresent the given image.",
        "qry_image_path": "a.jpg",
        "pos_text": "a boat",
        "pos_image_path": "",
        "neg_text": ["a car", "", "a dog"],
        "neg_image_path": ["", "b.jpg", "c.jpg"],
    }
    pair = pair_from_record(record, root=tmp_path, task="caption", name="row 1")
    assert isinstance(pair, Pair) and (pair.task, pair.name) == ("caption", "row 1")
    assert pair.query.text == f"{IMAGE_MARKER}\nRepresent the given image."
    assert pair.query.images == (tmp_path / "a.jpg",)
    assert (pair.positive.text, pair.positive.images) == ("a boat", ())
    assert [negative.text for negative in pair.negatives] == [
        *("a car", IMAGE_MARKER, IMAGE_MARKER + "a dog")
    ]


def test_pair_without_marker_or_negatives():
    pair = pair_from_record({"qry": "q", "pos_image_path": b"png", "neg_text": "", "extra": 1})
    assert pair.positive == Document(IMAGE_MARKER, (b"png",), "record: pos_text")
    assert pair.negatives == ()
    several = pair_from_record({"qry": "q", "pos_text": "p", "pos_image_path": ["a", "b"]})
    assert several.positive.text == IMAGE_MARKER * 2 + "p"


def test_negatives_as_a_string():
    def negatives(value):
        pair = pair_from_record({"qry": "q", "pos_text": "p", "neg_text": value}, name="row 5")
        return [negative.text for negative in pair.negatives]

    assert negatives("one plain text") == ["one plain text"]
    assert negatives('["a", "b"]') == ["a", "b"]
    assert negatives("[]") == []


@pytest.mark.parametrize(
    "value", ["['a', 'b']", "[__import__('os').system('touch hacked')]", "[b'x']", "[1, 2,]"]
)
def test_python_lists_in_strings_are_refused(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = {"qry": "q", "pos_text": "p", "neg_text": value}
    with pytest.raises(ValueError, match=r"row 5.*'neg_text'.*never evaluated"):
        pair_from_record(record, name="row 5")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qry": None}, "'qry' must be a string"),
        ({"qry": ""}, "'qry' is empty"),
        ({"pos_text": " "}, "'pos_text' is empty"),
        ({"qry": "<|image_1|> what?"}, r"1 image marker\(s\)"),
        ({"qry": "<image> <image>", "qry_image_path": "a"}, r"2 image marker\(s\)"),
        ({"neg_text": ["a", "b"], "neg_image_path": ["x"]}, "2 entries .* 1"),
        ({"neg_text": [1]}, "negative 0: expected a string, got int"),
        ({"neg_text": {"a": 1}}, "'neg_text' must be a list, got dict"),
        ({"qry_image_path": 7}, "got int"),
        ({"pos_text": "\udfff"}, r"'\\udfff' at character 0"),
        ({"neg_text": ["a", "\ud800"]}, r"negative 1: .*'\\ud800' at character 0"),
        ({"neg_text": "[" * 100_000 + "]" * 100_000}, "'neg_text'.*no JSON list"),
    ],
)
def test_bad_pair_records(change, message):
    record = {"qry": "q", "pos_text": "p"} | change
    with pytest.raises(ValueError, match=f"row 9.*{message}"):
        pair_from_record(record, name="row 9")


def test_missing_field_lists_those_found():
    with pytest.raises(ValueError, match=r"'pos_text' is missing; found \['qry', 'query'\]"):
        pair_from_record({"qry": "a", "query": "b"})
