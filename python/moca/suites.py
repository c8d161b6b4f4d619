"""Published evaluation sets: MMEB rows and folders in BEIR form, such as those of ViDoRe."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moca.data.records import IMAGE_MARKER, Document, Pair, document_from_record, pair_from_record
from moca.evaluate import Pool

_SUFFIXES = (".jsonl", ".parquet", ".tsv")
_PARQUET_ROWS = 64


def load_mmeb(path: str | os.PathLike, image_root: str | os.PathLike | None = None) -> list[Pair]:
    """Read MMEB rows: ``qry_text``, ``qry_img_path``, ``tgt_text`` (list), ``tgt_img_path`` (list).

    The first target is the right one: it becomes the positive, the others the negatives, which is
    what `moca.evaluate.candidate_precision` takes.

    Args:
        path: a ``.jsonl`` or ``.parquet`` file.
        image_root: folder of relative image paths; default the folder of the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a row of another form; names file and row.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"MMEB file not found: {file}")
    root = Path(image_root) if image_root is not None else file.parent
    pairs = []
    for name, row in _rows(file):
        texts, images = _targets(row, name)
        record = {
            "qry": row.get("qry_text") or "",
            "qry_image_path": row.get("qry_img_path"),
            "pos_text": texts[0],
            "pos_image_path": images[0],
            "neg_text": texts[1:],
            "neg_image_path": images[1:],
        }
        pairs.append(pair_from_record(record, root=root, task=file.stem, name=name))
    return pairs


def load_beir(folder: str | os.PathLike, split: str = "test") -> Pool:
    """Read a folder of ``corpus``, ``queries`` and ``qrels``, each a file or a folder of files.

    Corpus rows have ``_id`` or ``corpus-id`` and ``title``, ``text`` and/or ``image``; queries
    ``_id`` or ``query-id`` and ``text`` or ``query``; qrels ``query-id``, ``corpus-id`` and
    ``score``. Queries without a relevant document are left out.

    Args:
        folder: the folder; files are ``.jsonl``, ``.parquet`` or (qrels) ``.tsv``.
        split: where a part has files of several splits, the one whose name starts with this.

    Returns:
        The pool of all documents, to be scored by `Pool.evaluate` (nDCG@5 is customary for ViDoRe).

    Raises:
        FileNotFoundError: a part is missing.
        ValueError: a row of another form, an id that occurs twice or is unknown; names file and
            row.
    """
    root = Path(folder)
    corpus = _documents(root, "corpus", split, _corpus_document)
    queries = _documents(root, "queries", split, _query_document)
    numbers = {key: i for i, key in enumerate(corpus)}
    gains: dict[str, dict[int, float]] = {}
    for name, row in _part(root, "qrels", split):
        query, document = _id(row, name, "query-id"), _id(row, name, "corpus-id")
        for key, known, what in ((query, queries, "query"), (document, corpus, "document")):
            if key not in known:
                raise ValueError(f"{name}: {what} {key!r} is not in the {what} list")
        score = float(row.get("score", 1))
        if score > 0:
            gains.setdefault(query, {})[numbers[document]] = score
    if not gains:
        raise ValueError(f"{root}: no query has a relevant document")
    return Pool([queries[key] for key in gains], list(corpus.values()), list(gains.values()))


def _targets(row: dict[str, Any], name: str) -> tuple[list, list]:
    """Texts and images of the targets, lists of one length."""
    texts, images = row.get("tgt_text"), row.get("tgt_img_path")
    for key, values in (("tgt_text", texts), ("tgt_img_path", images)):
        if values is not None and not isinstance(values, list):
            raise ValueError(f"{name}: {key} must be a list, got {type(values).__name__}")
    count = len(texts or images or ())
    if not count:
        raise ValueError(f"{name}: tgt_text and tgt_img_path are both empty")
    texts, images = texts or [""] * count, images or [""] * count
    if len(texts) != len(images):
        raise ValueError(f"{name}: {len(texts)} tgt_text but {len(images)} tgt_img_path")
    return texts, images


def _documents(root: Path, part: str, split: str, make: Any) -> dict[str, Document]:
    found: dict[str, Document] = {}
    for name, row in _part(root, part, split):
        key = _id(row, name, "_id", "corpus-id" if part == "corpus" else "query-id")
        if key in found:
            raise ValueError(f"{name}: id {key!r} occurs twice")
        found[key] = make(row, root, name)
    return found


def _corpus_document(row: dict[str, Any], root: Path, name: str) -> Document:
    text = "\n".join(part for part in (row.get("title"), row.get("text")) if part)
    image = row.get("image")
    if not image:
        return document_from_record({"text": text}, name=name)
    # A page is its picture; text beside it would give the answer of the OCR, not of the model.
    return document_from_record({"text": IMAGE_MARKER, "images": [image]}, root=root, name=name)


def _query_document(row: dict[str, Any], root: Path, name: str) -> Document:
    text = row.get("text") or row.get("query")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{name}: expected a query in 'text' or 'query', found {sorted(row)}")
    return Document(text, (), name)


def _id(row: dict[str, Any], name: str, *keys: str) -> str:
    for key in keys:
        if row.get(key) is not None:
            return str(row[key])
    raise ValueError(f"{name}: expected a field {' or '.join(keys)}, found {sorted(row)}")


def _part(root: Path, part: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of corpus, queries or qrels."""
    named = [root / f"{part}{suffix}" for suffix in _SUFFIXES]
    files = [file for file in named if file.is_file()][:1]
    if not files and (root / part).is_dir():
        files = sorted(file for file in (root / part).iterdir() if file.suffix in _SUFFIXES)
        files = [file for file in files if file.name.startswith(split)] or files
    if not files:
        raise FileNotFoundError(f"{root}: expected {part}.jsonl, {part}.parquet or a folder {part}")
    for file in files:
        yield from _rows(file)


def _rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of a .jsonl, .parquet or .tsv file."""
    if file.suffix == ".parquet":
        import pyarrow.parquet as pq

        number = 0
        for batch in pq.ParquetFile(file).iter_batches(_PARQUET_ROWS):
            for row in batch.to_pylist():
                yield f"{file}: row {number}", row
                number += 1
        return
    with open(file, encoding="utf-8", newline="") as lines:
        if file.suffix == ".tsv":
            for number, row in enumerate(csv.DictReader(lines, delimiter="\t"), 2):
                yield f"{file}:{number}", row
            return
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"{file}:{number}", _json_row(line, f"{file}:{number}")


def _json_row(line: str, name: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}: no JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{name}: expected an object, got {type(row).__name__}")
    return row
