"""Published evaluation sets: MMEB rows, folders in BEIR form, and those of ViDoRe's versions."""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from moca.config import OnError
from moca.data.records import IMAGE_MARKER, Document, Pair, document_from_record, pair_from_record
from moca.data.rows import Row, fields, file_rows, locate, open_rows, read_rows
from moca.data.sources import Check, Records, check_images, task_name
from moca.evaluate import Pool

logger = logging.getLogger(__name__)

_SUFFIXES = (".jsonl", ".parquet", ".tsv")
_PARTS = ("corpus", "queries", "qrels")
# Query -> document -> score.
Judged = dict[str, dict[str, float]]


def load_mmeb(
    source: str | os.PathLike,
    *,
    split: str = "test",
    image_root: str | os.PathLike | None = None,
    on_error: OnError = "raise",
    check: Check = check_images,
) -> Records[Pair]:
    """Read MMEB rows: ``qry_text``, ``qry_img_path``, ``tgt_text`` (list), ``tgt_img_path`` (list).

    The first target is the right one: it becomes the positive, the others the negatives, which is
    what `moca.evaluate.candidate_precision` takes. Rows of VLM2Vec v2 (arXiv 2507.04590) have their
    instructions apart, in ``qry_inst`` and ``tgt_inst``: they go before the query's text and before
    that of every target, with a space between.

    Args:
        source: a file, a folder of these, or the name of a hub data set, as in `load_pairs`.
        split: of a hub data set whose name gives none.
        image_root: folder of relative image paths; default the folder of the file, or the one above
            where the first image of a row lies there alone, as beside the tasks of MMEB-eval.
        on_error, check: what a bad row does, and what else makes one bad; see `Records`.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: a row of another form, an empty query or target; names file and row.
    """
    place = locate(source, split)
    rows = open_rows(place)

    def items() -> Iterator[tuple[str, Callable[[], Pair]]]:
        for (name, get), folder in rows():
            yield name, partial(_choice, get, name, image_root, folder, task_name(place))

    return Records(str(place), items, on_error, check)


def _choice(
    get: Callable[[], Any],
    name: str,
    root: str | os.PathLike | None,
    folder: Path | None,
    task: str,
) -> Pair:
    """An MMEB row as a query with its right candidate and the wrong ones."""
    row = fields(get(), name)
    texts, images = _targets(row, name)
    query_image = row.get("qry_img_path")
    if root is None and folder is not None:
        first = next(
            (path for path in (query_image, *images) if path and isinstance(path, str)), ""
        )
        # Not Path.exists, which refuses names that are too long for a file.
        above = not os.path.exists(folder / first) and os.path.exists(folder.parent / first)
        root = folder.parent if above else folder
    record = {
        "qry": _instructed(row, "qry", row.get("qry_text"), query_image, f"{name}: query"),
        "qry_image_path": query_image,
        "pos_text": texts[0],
        "pos_image_path": images[0],
        "neg_text": texts[1:],
        "neg_image_path": images[1:],
    }
    return pair_from_record(record, root=root, task=task, name=name)


def load_beir(
    folder: str | os.PathLike,
    *,
    split: str = "test",
    image_root: str | os.PathLike | None = None,
    on_error: OnError = "raise",
    check: Check = check_images,
) -> Pool:
    """Read a folder of ``corpus``, ``queries`` and ``qrels``, each a file or a folder of files; or
    of ``data`` alone, whose rows are a page and what is asked of it.

    Corpus rows have ``_id``, ``corpus-id`` or ``corpus_id`` and ``title``, ``text`` and/or
    ``image``; queries ``_id``, ``query-id`` or ``query_id`` and ``text`` or ``query``; qrels an id
    of a query, one of the corpus and ``score``. Queries without a relevant document are left out.
    Of a document with an image, that alone is taken; how many have a text beside it is logged.

    Rows of ``data``, as the first version of ViDoRe has them, have ``image``, ``image_filename`` (a
    page stands in several rows; without it the image itself tells pages apart) and ``query``: null
    where a page is only among those to be searched. Of a query that stands in several rows, the
    pages of all are relevant.

    Args:
        folder: the folder; files are ``.jsonl``, ``.parquet`` or (qrels) ``.tsv``.
        split: where a part has files of several splits, the one whose name starts with this.
        image_root: folder of relative image paths; default the folder itself.
        on_error, check: as in `load_mmeb`; judgements of what was skipped are bad rows too.

    Returns:
        The pool of all documents, to be scored by `Pool.evaluate` (nDCG@5 is customary for ViDoRe).

    Raises:
        FileNotFoundError: a part is missing.
        ValueError: a row of another form, an empty document, an id that occurs twice or is unknown;
            names file and row.
    """
    root = Path(folder)
    images = Path(image_root) if image_root is not None else root
    if _files(root, "data", split) and not any(_files(root, part, split) for part in _PARTS):
        corpus, queries, judged = _read_questions(root, split, images, on_error, check)
    else:
        corpus, queries, judged = _read_judged(root, split, images, on_error, check)
    numbers = {key: i for i, key in enumerate(corpus)}
    gains = {
        query: {numbers[key]: score for key, score in scores.items() if score > 0}
        for query, scores in judged.items()
    }
    gains = {query: relevant for query, relevant in gains.items() if relevant}
    if not gains:
        raise ValueError(f"{root}: no query has a relevant document")
    return Pool([queries[key] for key in gains], list(corpus.values()), list(gains.values()))


def _read_judged(
    root: Path, split: str, images: Path, on_error: OnError, check: Check
) -> tuple[dict[str, Document], dict[str, Document], Judged]:
    """The documents, queries and judgements of a corpus, queries and qrels."""
    unread = Counter[str]()
    page = partial(_corpus_document, images=images, unread=unread)
    corpus = _documents(root, "corpus", split, page, on_error, check)
    for field, count in unread.items():
        logger.warning("%s: corpus: the %s beside %d images is not read", root, field, count)
    queries = _documents(root, "queries", split, _query_document, on_error, check)
    judged: Judged = {}

    def judge(name: str, get: Callable[[], Any]) -> None:
        row = fields(get(), name)
        query = _id(row, name, "query-id", "query_id")
        document = _id(row, name, "corpus-id", "corpus_id")
        for key, known, what in ((query, queries, "query"), (document, corpus, "document")):
            if key not in known:
                raise ValueError(f"{name}: {what} {key!r} is not in the {what} list")
        score = _score(row.get("score", 1), name)
        if judged.setdefault(query, {}).setdefault(document, score) != score:
            raise ValueError(f"{name}: query {query!r} and document {document!r} have two scores")

    _take(root, "qrels", split, judge, on_error)
    return corpus, queries, judged


def _read_questions(
    root: Path, split: str, images: Path, on_error: OnError, check: Check
) -> tuple[dict[str, Document], dict[str, Document], Judged]:
    """The pages, queries and judgements of rows that each have a page and may have its query."""
    pages: dict[str, Document] = {}
    queries: dict[str, Document] = {}
    judged: Judged = {}

    def add(name: str, get: Callable[[], Any]) -> None:
        row = fields(get(), name)
        if not row.get("image") or "query" not in row:
            raise ValueError(
                f"{name}: expected a page in 'image' and a text or null in 'query', found "
                f"{sorted(key for key, value in row.items() if value is not None)}"
            )
        page = _corpus_document({"image": row["image"]}, name, images, Counter())
        query = None if row["query"] is None else _query_document({"query": row["query"]}, name)
        if on_error == "skip":
            check(page)
        key = str(row.get("image_filename") or page.key())
        if pages.setdefault(key, page).key() != page.key():
            raise ValueError(f"{name}: image_filename {key!r} stands for two images")
        if query is not None:
            queries.setdefault(query.text, query)
            judged.setdefault(query.text, {})[key] = 1.0

    _take(root, "data", split, add, on_error)
    return pages, queries, judged


def _take(
    root: Path,
    part: str,
    split: str,
    take: Callable[[str, Callable[[], Any]], None],
    on_error: OnError,
) -> None:
    """Hand the name and the reader of every row of a part to `take`."""
    rows = ((name, partial(take, name, get)) for name, get in _part(root, part, split))
    for _ in read_rows(f"{root}: {part}", rows, on_error, Counter()):
        pass


def _score(value: Any, name: str) -> float:
    try:
        score = float(value)
    except (ValueError, TypeError):
        score = math.nan
    if not math.isfinite(score):
        raise ValueError(f"{name}: score must be a number, got {value!r}")
    return score


def _targets(row: Mapping[str, Any], name: str) -> tuple[list, list]:
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
    texts = [
        _instructed(row, "tgt", text, image, f"{name}: target {i}")
        for i, (text, image) in enumerate(zip(texts, images, strict=True))
    ]
    return texts, images


def _instructed(row: Mapping[str, Any], side: str, text: Any, image: Any, where: str) -> Any:
    """The text of one side after the side's instruction; what else it may be is checked later."""
    instruction = row.get(f"{side}_inst") or ""
    if not isinstance(instruction, str):
        got = type(instruction).__name__
        raise ValueError(f"{where}: {side}_inst must be text, got {got}")
    text = text or ""
    if not isinstance(text, str):
        return text
    if not text.strip() and not any(image if isinstance(image, list) else [image]):
        raise ValueError(f"{where} is empty: no text and no image")
    return " ".join(filter(None, (instruction.strip(), text)))


def _documents(
    root: Path,
    part: str,
    split: str,
    make: Callable[..., Document],
    on_error: OnError,
    check: Check,
) -> dict[str, Document]:
    found: dict[str, Document] = {}

    def add(name: str, get: Callable[[], Any]) -> None:
        row = fields(get(), name)
        kind = {"corpus": "corpus", "queries": "query"}[part]
        key = _id(row, name, "_id", f"{kind}-id", f"{kind}_id")
        if key in found:
            raise ValueError(f"{name}: id {key!r} occurs twice")
        document = make(row, name)
        if on_error == "skip":
            check(document)
        found[key] = document

    _take(root, part, split, add, on_error)
    return found


def _corpus_document(
    row: Mapping[str, Any], name: str, images: Path, unread: Counter[str]
) -> Document:
    parts = {key: row[key] for key in ("title", "text") if row.get(key) is not None}
    for key, value in parts.items():
        if not isinstance(value, str):
            raise ValueError(f"{name}: {key} must be text, got {value!r}")
    image = row.get("image")
    if image:
        # A page is its picture; text beside it would give the answer of the OCR, not of the model.
        unread.update(key for key in (*parts, "markdown") if str(row.get(key) or "").strip())
        record = {"text": IMAGE_MARKER, "images": [image]}
        return document_from_record(record, root=images, name=name)
    text = "\n".join(filter(None, parts.values()))
    if not text.strip():
        raise ValueError(f"{name}: the document is empty: no title, no text and no image")
    return document_from_record({"text": text, "images": []}, name=name)


def _query_document(row: Mapping[str, Any], name: str) -> Document:
    text = row.get("text") or row.get("query")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{name}: expected a query in 'text' or 'query', found {sorted(row)}")
    return Document(text, (), name)


def _id(row: Mapping[str, Any], name: str, *keys: str) -> str:
    for key in keys:
        if row.get(key) is not None:
            return str(row[key])
    raise ValueError(f"{name}: expected a field {' or '.join(keys)}, found {sorted(row)}")


def _part(root: Path, part: str, split: str) -> Iterator[Row]:
    """The rows of corpus, queries, qrels or data."""
    files = _files(root, part, split)
    if not files:
        raise FileNotFoundError(
            f"{root}: expected {part}.jsonl, {part}.parquet or a folder {part} (of corpus, queries "
            "and qrels), or data alone"
        )
    for file in files:
        yield from file_rows(file, str(file.relative_to(root)))


def _files(root: Path, part: str, split: str) -> list[Path]:
    """The files of a part: one that is called so, or those of a folder that is."""
    named = [root / f"{part}{suffix}" for suffix in _SUFFIXES]
    files = [file for file in named if file.is_file()][:1]
    if not files and (root / part).is_dir():
        files = sorted(file for file in (root / part).iterdir() if file.suffix in _SUFFIXES)
        files = [file for file in files if file.name.startswith(split)] or files
    return files
