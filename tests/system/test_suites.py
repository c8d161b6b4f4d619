"""The published forms of evaluation sets: what is read, what is refused, what is skipped."""

import io
import json
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moca.data.records import IMAGE_MARKER, Document
from moca.suites import load_beir, load_mmeb


def png(colour: str) -> bytes:
    target = io.BytesIO()
    PIL.Image.new("RGB", (8, 8), colour).save(target, "PNG")
    return target.getvalue()


def letter_embedding(documents: list[Document]) -> np.ndarray:
    """Counts of the letters a to e: enough to rank a few words."""
    return np.array([[document.text.count(c) for c in "abcde"] for document in documents], float)


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


MMEB_ROWS = [
    {
        "qry_text": "<|image_1|>What is it?",
        "qry_img_path": "it.png",
        "tgt_text": ["a cat", "a dog"],
        "tgt_img_path": ["", ""],
    },
    {
        "qry_text": "Find a cat",
        "qry_img_path": "",
        "tgt_text": ["<|image_1|>", "<|image_1|>", "<|image_1|>"],
        "tgt_img_path": ["it.png", "b.png", "c.png"],
    },
]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_mmeb_rows(tmp_path, suffix):
    path = tmp_path / f"Set.{suffix}"
    if suffix == "jsonl":
        write_jsonl(path, MMEB_ROWS)
    else:
        pq.write_table(pa.Table.from_pylist(MMEB_ROWS), path)
    first, second = load_mmeb(path)
    assert first.query.text == f"{IMAGE_MARKER}What is it?"
    assert first.query.images == (tmp_path / "it.png",)
    assert [item.text for item in (first.positive, *first.negatives)] == ["a cat", "a dog"]
    assert second.query.images == () and second.task == "Set"
    shown = [item.images[0].name for item in (second.positive, *second.negatives)]
    assert shown == ["it.png", "b.png", "c.png"]


def test_mmeb_images_may_lie_beside_the_folder_of_a_task(tmp_path):
    """As in MMEB-eval, where all tasks share the folders of images."""
    write_jsonl(tmp_path / "Set" / "test-00000-of-00001.jsonl", MMEB_ROWS)
    (tmp_path / "it.png").write_bytes(png("red"))
    first, second = load_mmeb(tmp_path / "Set")
    assert first.query.images == second.positive.images == (tmp_path / "it.png",)
    assert first.task == "Set"
    (tmp_path / "Set" / "it.png").write_bytes(png("blue"))
    assert next(iter(load_mmeb(tmp_path / "Set"))).query.images == (tmp_path / "Set" / "it.png",)


def test_mmeb_instructions_go_before_the_texts(tmp_path):
    """As VLM2Vec v2's rows have them; their image markers are those of the texts."""
    query = {"qry_inst": "<|image_1|>\nName it.\n", "qry_text": "", "qry_img_path": "it.png"}
    texts = {"tgt_inst": "Match", "tgt_text": ["a cat", "a dog"], "tgt_img_path": ["", ""]}
    images = {"tgt_inst": "<|image_1|> Match", "tgt_text": ["", "a b"], "tgt_img_path": ["i", "j"]}
    other = {"qry_inst": "Find", "qry_text": "<|image_1|> it", "qry_img_path": "it.png"}
    none = {"qry_inst": None, "qry_text": "it", "qry_img_path": "", "tgt_inst": ""}
    rows = [query | texts, other | images, texts | none]
    first, second, third = load_mmeb(write_jsonl(tmp_path / "Set.jsonl", rows))
    assert first.query.text == f"{IMAGE_MARKER}\nName it."
    assert first.positive.text == "Match a cat" and first.negatives[0].text == "Match a dog"
    assert second.query.text == f"Find {IMAGE_MARKER} it"
    assert second.positive.text == f"{IMAGE_MARKER} Match"
    assert second.negatives[0].text == f"{IMAGE_MARKER} Match a b"
    assert third.query.text == "it" and third.positive.text == "a cat"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tgt_text": "['a cat']"}, "Set.jsonl line 1: tgt_text must be a list, got str"),
        ({"tgt_text": [], "tgt_img_path": []}, "both empty"),
        ({"tgt_img_path": [""]}, "2 tgt_text but 1 tgt_img_path"),
        ({"tgt_text": ["a", " "]}, "Set.jsonl line 1: target 1 is empty: no text and no image"),
        ({"tgt_text": ["", "a"]}, "Set.jsonl line 1: target 0 is empty"),
        ({"tgt_text": ["a", ""], "tgt_inst": "Match"}, "Set.jsonl line 1: target 1 is empty"),
        ({"qry_text": "", "qry_img_path": None, "qry_inst": "Name it"}, "line 1: query is empty"),
        ({"qry_inst": ["Name it"]}, "Set.jsonl line 1: query: qry_inst must be text, got list"),
        ({"tgt_inst": 3}, "Set.jsonl line 1: target 0: tgt_inst must be text, got int"),
    ],
)
def test_bad_mmeb_rows_are_named(tmp_path, change, message):
    path = write_jsonl(tmp_path / "Set.jsonl", [MMEB_ROWS[0] | change])
    with pytest.raises(ValueError, match=message):
        list(load_mmeb(path))


def test_mmeb_errors_name_the_line(tmp_path):
    path = tmp_path / "Set.jsonl"
    path.write_text(json.dumps(MMEB_ROWS[0]) + "\n{broken\n")
    with pytest.raises(ValueError, match=r"Set\.jsonl line 2: bad JSON"):
        list(load_mmeb(path))
    with pytest.raises(FileNotFoundError, match="absent"):
        load_mmeb(tmp_path / "absent.jsonl")


def test_mmeb_rows_of_the_hub(monkeypatch):
    """A name without a split reads "test"; images lie in a root of their own."""
    calls = []

    def load_dataset(*args, **options):
        calls.append((*args, options["split"]))
        return datasets.Dataset.from_list(MMEB_ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    first, _ = load_mmeb("owner/name:Set", image_root="root")
    assert first.query.images == (Path("root/it.png"),) and first.task == "Set"
    assert calls == [("owner/name", "Set", "test")]


def test_beir_json_lines(tmp_path):
    write_jsonl(
        tmp_path / "corpus.jsonl",
        [{"_id": "x", "title": "A", "text": "aa"}, {"_id": "y", "title": "", "text": "bb"}],
    )
    write_jsonl(tmp_path / "queries.jsonl", [{"_id": "1", "text": "b"}, {"_id": "2", "text": "c"}])
    qrels = tmp_path / "qrels" / "test.tsv"
    qrels.parent.mkdir()
    qrels.write_text("query-id\tcorpus-id\tscore\n1\ty\t2\n1\tx\t0\n")
    (tmp_path / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\n2\tx\t1\n")
    pool = load_beir(tmp_path)
    assert [item.text for item in pool.candidates] == ["A\naa", "bb"]
    assert [item.text for item in pool.queries] == ["b"]
    assert pool.relevance == [{1: 2.0}]
    assert pool.evaluate(letter_embedding, ks=(5,))["ndcg@5"] == 1
    dev = load_beir(tmp_path, split="dev")
    assert [item.text for item in dev.queries] == ["c"] and dev.relevance == [{0: 1.0}]


def test_beir_texts_may_speak_of_the_image_tag(tmp_path):
    write_jsonl(tmp_path / "corpus.jsonl", [{"_id": "x", "text": "the <image> tag"}])
    write_jsonl(tmp_path / "queries.jsonl", [{"_id": "1", "text": "what is <image>?"}])
    write_jsonl(tmp_path / "qrels.jsonl", [{"query-id": "1", "corpus-id": "x", "score": 1}])
    pool = load_beir(tmp_path)
    assert [item.text for item in (*pool.candidates, *pool.queries)] == [
        *("the <image> tag", "what is <image>?")
    ]


@pytest.mark.parametrize("mark", ["-", "_"])
def test_beir_parquet_pages(tmp_path, mark):
    query, page = f"query{mark}id", f"corpus{mark}id"
    parts = {
        "corpus": [
            {page: 7, "image": {"bytes": png("red"), "path": None}},
            {page: 9, "image": {"bytes": png("blue"), "path": None}},
        ],
        "queries": [{query: 3, "query": "blue?"}],
        "qrels": [{query: 3, page: 9, "score": 1}],
    }
    for part, rows in parts.items():
        (tmp_path / part).mkdir()
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / part / "test-00000-of-00001.parquet")
    pool = load_beir(tmp_path)
    assert [item.images for item in pool.candidates] == [(png("red"),), (png("blue"),)]
    assert pool.relevance == [{1: 1.0}]


def write_questions(folder: Path, rows: list[tuple]) -> Path:
    """As ViDoRe's first version has them: a query or none, the colour of a page, its name."""
    (folder / "data").mkdir(exist_ok=True)
    keys = ("query", "image", "image_filename")
    records = [
        dict(zip(keys, (query, {"bytes": png(colour)}, name), strict=True))
        for query, colour, name in rows
    ]
    pq.write_table(pa.Table.from_pylist(records), folder / "data" / "test-00000-of-00001.parquet")
    return folder


def test_pages_with_their_questions(tmp_path):
    rows = [("red?", "red", "a.jpg"), (None, "blue", "b.jpg"), ("warm?", "red", "a.jpg")]
    rows += [("grey?", "grey", None), ("warm?", "yellow", "c.jpg"), (None, "grey", None)]
    pool = load_beir(write_questions(tmp_path, rows))
    pages = [page.images for page in pool.candidates]
    assert pages == [(png(colour),) for colour in ("red", "blue", "grey", "yellow")]
    assert [query.text for query in pool.queries] == ["red?", "warm?", "grey?"]
    assert pool.relevance == [{0: 1.0}, {0: 1.0, 3: 1.0}, {2: 1.0}]


def test_bad_pages_with_questions_are_named(tmp_path, caplog):
    rows = [("red?", "red", "a.jpg"), ("blue?", "blue", "a.jpg"), (" ", "grey", "b.jpg")]
    write_questions(tmp_path, rows)
    with pytest.raises(ValueError, match=r"row 1: image_filename 'a\.jpg' stands for two images"):
        load_beir(tmp_path)
    pool = load_beir(tmp_path, on_error="skip")
    assert len(pool.queries) == len(pool.candidates) == 1
    assert "data: skipped 2 of 3 records" in caplog.text
    write_questions(tmp_path, [(None, "red", "a.jpg")])
    with pytest.raises(ValueError, match="no query has a relevant document"):
        load_beir(tmp_path)
    write_jsonl(tmp_path / "data.jsonl", [{"text": "a", "image": "a.png"}])
    with pytest.raises(
        ValueError, match=r"expected a page in 'image' .* found \['image', 'text'\]"
    ):
        load_beir(tmp_path)
    write_jsonl(tmp_path / "corpus.jsonl", [{"_id": "x", "text": "a"}])
    with pytest.raises(FileNotFoundError, match=r"expected queries\.jsonl, .* or data alone"):
        load_beir(tmp_path)


def test_text_beside_the_image_of_a_page_is_counted(tmp_path, caplog):
    page = {"image": "a.png", "text": "What is read on it.", "markdown": "# As text"}
    rows = [
        page | {"_id": 1, "title": ""},
        page | {"_id": 2, "title": "A"},
        {"_id": 3, "text": "b"},
    ]
    write_jsonl(tmp_path / "corpus.jsonl", rows)
    write_jsonl(tmp_path / "queries.jsonl", [{"_id": "1", "text": "a"}])
    write_jsonl(tmp_path / "qrels.jsonl", [{"query-id": 1, "corpus-id": 3}])
    assert [item.text for item in load_beir(tmp_path).candidates] == [IMAGE_MARKER] * 2 + ["b"]
    assert caplog.messages == [
        f"{tmp_path}: corpus: the {field} beside {count} images is not read"
        for field, count in (("text", 2), ("markdown", 2), ("title", 1))
    ]


def test_beir_images_may_lie_elsewhere(tmp_path):
    write_jsonl(tmp_path / "corpus.jsonl", [{"_id": "x", "image": "a.png"}])
    write_jsonl(tmp_path / "queries.jsonl", [{"_id": "1", "text": "a"}])
    write_jsonl(tmp_path / "qrels.jsonl", [{"query-id": 1, "corpus-id": "x"}])
    [page] = load_beir(tmp_path).candidates
    [moved] = load_beir(tmp_path, image_root=tmp_path / "images").candidates
    assert page.images == (tmp_path / "a.png",)
    assert moved.images == (tmp_path / "images" / "a.png",)


def test_bad_beir_folders_are_named(tmp_path):
    write_jsonl(tmp_path / "corpus.jsonl", [{"_id": "x", "text": "a"}])
    write_jsonl(tmp_path / "queries.jsonl", [{"_id": "1", "text": "b"}])
    with pytest.raises(FileNotFoundError, match="qrels"):
        load_beir(tmp_path)
    write_jsonl(tmp_path / "qrels.jsonl", [{"query-id": "1", "corpus-id": "z", "score": 1}])
    with pytest.raises(ValueError, match=r"qrels\.jsonl line 1: document 'z'"):
        load_beir(tmp_path)
    write_jsonl(tmp_path / "corpus.jsonl", [{"_id": "x", "text": "a"}, {"_id": "x", "text": "b"}])
    with pytest.raises(ValueError, match=r"corpus\.jsonl line 2: id 'x' occurs twice"):
        load_beir(tmp_path)


def test_bad_beir_rows_are_skipped_and_counted(tmp_path, caplog):
    corpus = [{"_id": "x", "text": "a"}, {"_id": "y", "title": "", "text": " "}]
    corpus += [{"_id": "z", "title": 7, "text": "b"}, {"_id": "w", "image": "absent.png"}]
    write_jsonl(tmp_path / "corpus.jsonl", corpus)
    queries = [{"_id": "1", "text": "a"}, {"_id": "2", "text": ""}, {"_id": "3", "text": "c"}]
    write_jsonl(tmp_path / "queries.jsonl", queries)
    rows = ["query-id corpus-id score", "1 x 1", "1 x", "1 x 2", "1 x much", "2 x 1", "3 y 1"]
    (tmp_path / "qrels.tsv").write_text("\n".join(rows).replace(" ", "\t"))
    pool = load_beir(tmp_path, on_error="skip")
    assert [item.text for item in pool.candidates] == ["a"]
    assert [item.text for item in pool.queries] == ["a"] and pool.relevance == [{0: 1.0}]
    said = [record.getMessage().split(", most often")[0] for record in caplog.records]
    assert said == [
        f"{tmp_path}: corpus: skipped 3 of 4 records",
        f"{tmp_path}: queries: skipped 1 of 3 records",
        f"{tmp_path}: qrels: skipped 5 of 6 records",
    ]


@pytest.mark.parametrize(
    ("part", "row", "message"),
    [
        ("corpus.jsonl", {"_id": "y", "text": " "}, " line 2: the document is empty"),
        ("corpus.jsonl", {"_id": "y", "title": 7}, " line 2: title must be text, got 7"),
        ("queries.jsonl", {"_id": "2", "text": ""}, " line 2: expected a query"),
        ("qrels.tsv", "1\tx", r" line 3: expected 3 fields .*, got 2: \['1', 'x'\]"),
        ("qrels.tsv", "1\tx\tmuch", " line 3: score must be a number, got 'much'"),
        ("qrels.tsv", "1\tx\t2", " line 3: query '1' and document 'x' have two scores"),
    ],
)
def test_bad_beir_rows_are_named(tmp_path, part, row, message):
    write_jsonl(tmp_path / "corpus.jsonl", [{"_id": "x", "text": "a"}])
    write_jsonl(tmp_path / "queries.jsonl", [{"_id": "1", "text": "a"}])
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n1\tx\t1\n")
    with (tmp_path / part).open("a") as file:
        file.write(row if isinstance(row, str) else json.dumps(row))
    with pytest.raises(ValueError, match=part + message):
        load_beir(tmp_path)


def test_bad_mmeb_rows_are_skipped_and_counted(tmp_path, caplog):
    (tmp_path / "it.png").write_bytes(png("red"))
    bad = [{"qry_text": 3}, {"tgt_text": ["a cat", ""]}]
    path = write_jsonl(tmp_path / "Set.jsonl", [*MMEB_ROWS, *(MMEB_ROWS[0] | row for row in bad)])
    assert [item.query.text for item in load_mmeb(path, on_error="skip")] == [
        f"{IMAGE_MARKER}What is it?"  # the images of the second row are missing
    ]
    assert "Set.jsonl: skipped 3 of 4 records" in caplog.text
    with pytest.raises(ValueError, match=r"Set\.jsonl line 3: qry: expected a string, got int"):
        list(load_mmeb(path))
    with pytest.raises(ValueError, match="'raise' or 'skip', got 'ignore'"):
        list(load_mmeb(path, on_error="ignore"))
