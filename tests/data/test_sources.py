"""Sources: every format gives the same records, and every fault is named with its place."""

import json
import logging
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from moca.data.records import IMAGE_MARKER, Document
from moca.data.sources import load_documents, load_pairs

RECORDS = [{"text": f"{IMAGE_MARKER} one", "images": ["a.png"]}, {"text": "two", "images": []}]
PAIRS = [
    {"qry": "q1", "qry_image_path": None, "pos_text": "p1", "neg_text": ["n1", "n2"]},
    {"qry": "<image> q2", "qry_image_path": "a.png", "pos_text": "p2", "neg_text": []},
]


def write(path, records):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(records))
    else:
        table = pyarrow.Table.from_pylist(records)
        pyarrow.parquet.write_table(table, path, row_group_size=1)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_every_file_format_gives_the_same(tmp_path, suffix, picture):
    (tmp_path / "a.png").write_bytes(picture())
    source = load_documents(write(tmp_path / f"docs{suffix}", RECORDS))
    documents = list(source)
    assert [document.text for document in documents] == [f"{IMAGE_MARKER} one", "two"]
    assert documents[0].images == (tmp_path / "a.png",)
    assert all(document.name.startswith(f"docs{suffix} ") for document in documents)
    assert list(source) == documents
    pairs = list(load_pairs(write(tmp_path / f"pairs{suffix}", PAIRS)))
    assert [pair.query.text for pair in pairs] == ["q1", f"{IMAGE_MARKER} q2"]
    assert [len(pair.negatives) for pair in pairs] == [2, 0]
    assert {pair.task for pair in pairs} == {"pairs"}


def test_image_bytes_in_parquet(tmp_path, picture):
    content = picture()
    records = [{"text": IMAGE_MARKER, "images": [{"bytes": content, "path": "x.png"}]}]
    [document] = load_documents(write(tmp_path / "d.parquet", records))
    assert document.images == (content,)


def test_image_root_and_tasks(tmp_path):
    path = write(tmp_path / "pairs.jsonl", [*PAIRS, PAIRS[0] | {"task": "own"}])
    pairs = list(load_pairs(path, image_root=tmp_path / "elsewhere"))
    assert pairs[1].query.images == (tmp_path / "elsewhere" / "a.png",)
    assert [pair.task for pair in pairs] == ["pairs", "pairs", "own"]
    assert {pair.task for pair in load_pairs(path, task="given")} == {"given"}
    write(path, [PAIRS[0] | {"task": 3}])
    with pytest.raises(ValueError, match=r"pairs\.jsonl line 1: field 'task'"):
        list(load_pairs(path))


def test_a_folder_of_files_is_read_in_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl"):
        write(tmp_path / name, [{"text": name}])
    (tmp_path / "notes.txt").write_text("not data")
    assert [document.text for document in load_documents(tmp_path)] == ["a.jsonl", "b.jsonl"]


def test_what_a_folder_of_files_does_not_read_is_told(tmp_path, picture, caplog):
    write(tmp_path / "a.jsonl", RECORDS)
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / ".hidden").write_text("")
    with caplog.at_level(logging.WARNING):
        assert len(list(load_documents(tmp_path))) == 2
    assert not caplog.records
    for name in ("sub/b.jsonl", "sub/c.html", "sub/d.png", "sub/notes.txt", "e.txt", "LICENSE"):
        (tmp_path / "sub").mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    with caplog.at_level(logging.WARNING):
        assert len(list(load_documents(tmp_path))) == 2
    assert caplog.messages == [
        f"{tmp_path}: read as a folder of record files, of its top alone; not read: "
        "2 .txt, 1 .html, 1 .jsonl, 1 without a suffix"
    ]


def test_what_lies_beside_pages_and_is_not_read_is_told(tmp_path, picture, caplog):
    folder = html_folder(tmp_path, picture)
    for name in ("a.pdf", "b.PDF", "images/c.txt", "p.html.gz", "style.css", ".d.txt", ".e/f.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("")
    with caplog.at_level(logging.WARNING):
        load_documents(folder)
    assert caplog.messages == [
        f"{folder}: read as a folder of HTML pages; not read: 2 .pdf, 1 .html.gz, 1 .json, 1 .txt",
        f"{folder}: left out 1 hidden folder",
    ]


def test_a_folder_of_nothing_that_is_read_is_told_by_what_it_holds(tmp_path, picture, caplog):
    for name in [f"{i}.x{i}" for i in range(9)] + ["b.png", "sub/a.png", "sub/.hidden/page.html"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture())
    (tmp_path / ".page.html").write_text("")
    kinds = r"got 2 \.png, (1 \.x\d, ){7}2 of other kinds$"
    for load in (load_documents, load_pairs):
        with pytest.raises(FileNotFoundError, match=kinds):
            load(tmp_path)
    assert not caplog.messages


@pytest.mark.parametrize("load", [load_documents, load_pairs])
def test_a_folder_of_pages_and_records_is_refused(tmp_path, picture, load, caplog):
    folder = html_folder(tmp_path, picture)
    (folder / "images" / "b.jsonl").write_text("{}")
    with caplog.at_level(logging.WARNING):
        load(folder)
    assert "HTML pages; not read: 1 .json, 1 .jsonl" in caplog.text
    write(folder / "a.jsonl", RECORDS)
    with pytest.raises(ValueError, match=r"got both \(\.html, \.json, \.jsonl\)"):
        load(folder)


def html_folder(folder, picture):
    (folder / "images").mkdir()
    (folder / "images" / "a.png").write_bytes(picture(40, 40))
    text = "Enough text to be found by the title of its section, surely."
    (folder / "page.html").write_text(
        f"<h1>Boats</h1><p>{text}</p>"
        "<figure><img src='images/a.png'><figcaption>A red boat</figcaption></figure>"
    )
    (folder / "manifest.json").write_text("{}")
    return folder


def test_html_folder(tmp_path, picture):
    folder = html_folder(tmp_path, picture)
    [document] = load_documents(folder)
    assert document.text.startswith("Boats\nEnough") and len(document.images) == 1
    assert [pair.task for pair in load_pairs(folder)] == ["title_section", "caption_figure"]
    [pair] = load_pairs(str(folder), task="caption_figure", on_error="skip")
    assert pair.query.text == "A red boat"
    [pair] = load_pairs(folder, task="title-section")
    assert (pair.query.text, pair.task) == ("Boats", "title-section")
    with pytest.raises(ValueError, match=r"pages must be one of .*'caption_figure'\], got 'other'"):
        load_pairs(folder, task="other")


def test_missing_sources(tmp_path):
    for source in (
        tmp_path / "no.jsonl",
        "no.parquet",
        "./no",
        str(tmp_path / "no"),
        "a b",
        "a/b/c",
    ):
        with pytest.raises(FileNotFoundError, match="data source not found"):
            load_documents(source)
    with pytest.raises(FileNotFoundError, match=r"\.parquet or HTML files in it, got none$"):
        load_pairs(tmp_path)
    (tmp_path / "data.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"data\.csv: expected one of"):
        load_pairs(tmp_path / "data.csv")
    with pytest.raises(ValueError, match="on_error"):
        list(load_pairs(write(tmp_path / "a.jsonl", PAIRS), on_error="ignore"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', r"line 2: bad JSON"),
        ("[1, 2]", r"line 2: expected a record with named fields, got list"),
        ('{"txt": "a"}', r"line 2: field 'text' is missing; found \['txt'\]"),
        ('{"text": 5}', r"line 2: field 'text' must be a string, got int"),
        ('{"text": ""}', r"line 2: field 'text' is empty and 'images' gives no image"),
        ('{"text": "a \\ud800"}', r"line 2: the text holds '\\ud800' at character 2"),
        ('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", r"line 2: bad JSON: .*recursion"),
        ('{"text": ' + "1" * 5000 + "}", r"line 2: bad JSON: .*digits"),
        (
            json.dumps({"text": IMAGE_MARKER * 3, "images": ["a", "b"]}),
            r"line 2: 3 image .* 2 image",
        ),
    ],
)
def test_bad_lines_name_their_place(tmp_path, line, message):
    path = tmp_path / "docs.jsonl"
    path.write_text(f'{{"text": "good"}}\n{line}\n{{"text": "last"}}\n')
    with pytest.raises(ValueError, match=rf"docs\.jsonl {message}"):
        list(load_documents(path))
    source = load_documents(path, on_error="skip")
    assert [document.text for document in source] == ["good", "last"]
    assert sum(source.skipped.values()) == 1


def test_bad_files(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": "a"},\n{"text": }]')
    with pytest.raises(ValueError, match=r"a\.json: bad JSON.*line 2"):
        list(load_documents(tmp_path / "a.json"))
    (tmp_path / "a.json").write_text('{"text": "a"}')
    with pytest.raises(ValueError, match=r"a\.json: expected a JSON list of records, got dict"):
        list(load_documents(tmp_path / "a.json"))
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "\xff\xfe"}')
    with pytest.raises(ValueError, match=r"b\.jsonl line 1: not UTF-8"):
        list(load_documents(tmp_path / "b.jsonl"))
    path = write(tmp_path / "c.parquet", RECORDS)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"c\.parquet: cannot read Parquet"):
        list(load_documents(path))


def test_bad_images_are_skipped_counted_and_reported(tmp_path, picture, caplog):
    (tmp_path / "good.png").write_bytes(picture())
    (tmp_path / "cut.png").write_bytes(picture(200, 200)[:-500])
    (tmp_path / "thin.png").write_bytes(picture(1, 5000))
    names = ["good.png", "cut.png", "thin.png", "absent.png", "good.png"]
    records = [{"qry": "q", "pos_text": "p", "pos_image_path": name} for name in names]
    path = write(tmp_path / "pairs.jsonl", records)
    source = load_pairs(path, on_error="skip")
    with caplog.at_level(logging.WARNING):
        assert len(list(source)) == 2
    assert "skipped 3 of 5 records" in caplog.text
    reasons = " | ".join(source.skipped)
    assert all(word in reasons for word in ("cut.png", "aspect ratio", "not found: "))
    assert sum(source.skipped.values()) == 3
    assert len(list(load_pairs(path))) == 5


def test_faults_of_a_kind_are_one_reason(tmp_path):
    lines = [b'{"text": "a"', b'{"text": "long"', b'{"text": "\xff"}', b'{"text": "a\xff"}']
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\n".join(lines))
    source = load_documents(path, on_error="skip")
    assert not list(source)
    assert source.skipped == {
        "bad JSON: Expecting ',' delimiter": 2,
        "not UTF-8: invalid start byte": 2,
    }
    records = [{"text": "<image>", "images": [image]} for image in (b"no", b"image")]
    named = [record | {"name": f"page {i}"} for i, record in enumerate(records)]
    source = load_documents(write(tmp_path / "d.parquet", records + named), on_error="skip")
    assert not list(source)
    assert source.skipped == {"cannot read image in memory: its format is unknown": 4}


def test_hub_data_sets_never_run_remote_code(monkeypatch, caplog):
    calls = []

    def load_dataset(*args, **options):
        calls.append((args, options))
        if args[0] == "owner/broken":
            raise ConnectionError("offline")
        if args[0] == "owner/pictures":
            return datasets.Dataset.from_list(PAIRS[1:])
        rows = [{"text": "one", "qry": None}, {"text": None, "qry": "q"}]
        return datasets.Dataset.from_list([row | {"pos_text": row["qry"]} for row in rows])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    document = next(iter(load_documents("owner/name", split="test")))
    assert document == Document("one", (), "owner/name@test row 0")
    with caplog.at_level(logging.WARNING):
        pairs = list(load_pairs("owner/name:subset", on_error="skip"))
    assert [pair.task for pair in pairs] == ["subset"]
    assert "owner/name:subset@train is read, for the source names no split" in caplog.text
    caplog.clear()
    pairs = load_pairs("owner/name@test[:50%]", image_root="root")
    with pytest.raises(ValueError, match=r"owner/name@test\[:50%\] row 0: field 'qry'"):
        list(pairs)
    assert "is read" not in caplog.text
    splits = [(None, "test"), ("subset", "train"), (None, "test[:50%]")]
    assert calls == [(("owner/name", subset), {"split": split}) for subset, split in splits]
    with pytest.raises(ValueError, match=r"owner/broken@train: cannot load split 'train'.*offline"):
        list(load_documents("owner/broken"))
    assert next(iter(load_pairs("owner/pictures@a", image_root="root"))).query.images == (
        Path("root/a.png"),
    )


def test_images_of_the_hub_stay_encoded(monkeypatch, picture):
    content = picture()
    image = {"bytes": content, "path": None}
    row = {"text": "<image>" * 2, "images": [image, image]}
    features = {"text": datasets.Value("string"), "images": datasets.List(datasets.Image())}
    rows = datasets.Dataset.from_list([row], features=datasets.Features(features))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    [document] = load_documents("owner/name@train")
    assert document.images == (content, content)
    row = {"qry": "q", "pos_text": "", "pos_image_path": image}
    features = {"qry": datasets.Value("string"), "pos_text": datasets.Value("string")}
    features["pos_image_path"] = datasets.Image()
    rows = datasets.Dataset.from_list([row], features=datasets.Features(features))
    [pair] = load_pairs("owner/name@train")
    assert pair.positive.images == (content,)


def test_negatives_that_are_python_code_are_refused(tmp_path):
    path = write(tmp_path / "p.jsonl", [PAIRS[0] | {"neg_text": "['a', open('x', 'w')]"}])
    with pytest.raises(ValueError, match=r"p\.jsonl line 1: field 'neg_text'.*never evaluated"):
        list(load_pairs(path))
