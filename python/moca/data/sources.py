"""Where records come from: JSON Lines, JSON, Parquet, a hub data set, or a folder of HTML pages.

No source runs code from the data: nothing is evaluated, unpickled or loaded with remote code.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import PIL.Image

from moca.data.images import ImageSettings, decode, target_size
from moca.data.records import Document, Pair, document_from_record, pair_from_record

logger = logging.getLogger(__name__)

OnError = Literal["raise", "skip"]
Check = Callable[[Document], None]
Item = TypeVar("Item", Document, Pair)

_SUFFIXES = (".jsonl", ".json", ".parquet")
_PAGES = (".html", ".htm", ".xhtml")
# "name", "owner/name" or either with ":subset".
_HUB_NAME = re.compile(r"[\w.-]+(?:/[\w.-]+)?(?::[\w.-]+)?")
# Parquet rows turned into Python objects at a time; a row may hold several images.
_PARQUET_ROWS = 64
_HTML_TASKS = ("title_section", "caption_figure")
# Tells two faults of a kind apart: "(column 7)", "(line 2, column 7)", "(byte 9)".
_DETAIL = re.compile(r" \([^()]*\d[^()]*\)$")


def check_images(document: Document) -> None:
    """Raise ValueError unless every image of a document can be decoded; names the record."""
    for image in document.images:
        opened = decode(image, document.name)
        target_size(opened.height, opened.width, ImageSettings(), document.name)


class Records(Generic[Item]):
    """Documents or pairs of one source, read anew each time it is iterated.

    Args:
        source: what is read, for messages.
        items: opens the source and yields ``(name, make)``; ``make()`` gives the item or raises.
        on_error: "raise" stops at the first bad record; "skip" leaves it out, counts it and logs a
            summary.
        check: to skip, is called with every document here, so that none can fail later; raises
            ValueError for a bad one. The default decodes its images.

    Attributes:
        skipped: reasons of the records left out in the last iteration, with their counts; without
            the record's name and the place in it, so that faults of a kind count together.
    """

    def __init__(
        self,
        source: str,
        items: Callable[[], Iterator[tuple[str, Callable[[], Item]]]],
        on_error: OnError,
        check: Check = check_images,
    ) -> None:
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
        self.source, self.on_error, self.check = source, on_error, check
        self.skipped: Counter[str] = Counter()
        self._items: Callable[[], Iterator[tuple[str, Callable[[], Item]]]] = items

    def __iter__(self) -> Iterator[Item]:
        self.skipped = Counter()
        total = 0
        for name, make in self._items():
            total += 1
            if self.on_error == "raise":
                yield make()
                continue
            try:
                item = make()
                name = item.name  # its own, where it has one
                for document in _documents(item):
                    self.check(document)
            except ValueError as error:
                self.skipped[_DETAIL.sub("", str(error).removeprefix(f"{name}: "))] += 1
                logger.debug("skipped %s", error)
            else:
                yield item
        if self.skipped:
            count = sum(self.skipped.values())
            reason, _ = self.skipped.most_common(1)[0]
            logger.warning(
                "%s: skipped %d of %d records, most often: %s", self.source, count, total, reason
            )


def load_documents(
    source: str | os.PathLike,
    *,
    split: str = "train",
    image_root: str | os.PathLike | None = None,
    on_error: OnError = "raise",
    check: Check = check_images,
    streaming: bool = False,
) -> Records[Document]:
    """Interleaved documents of a source.

    Args:
        source: a ``.jsonl``, ``.json`` or ``.parquet`` file, a folder of these or of HTML pages, or
            the name of a hub data set (``owner/name`` or ``owner/name:subset``).
        split: split of a hub data set.
        image_root: folder of relative image paths; default the folder of the file.
        on_error, check: what a bad record does, and what else makes one bad; see `Records`.
        streaming: read a hub data set as it downloads.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: bad JSON (with the line), a record that is not of the schema (names the record),
            or a folder of both pages and records.
    """
    path = _local(source)
    if path is not None and _is_html(path):
        from moca.data.html import read_html_folder  # needs lxml, which nothing else here does

        sections = (section.document for section in read_html_folder(path).sections)
        return _fixed(path, list(sections), on_error, check)
    rows = _rows(source, path, split, streaming)

    def items() -> Iterator[tuple[str, Callable[[], Document]]]:
        for name, get, folder in rows():
            root = image_root if image_root is not None else folder
            yield name, partial(_document, get, name, root)

    return Records(str(source), items, on_error, check)


def load_pairs(
    source: str | os.PathLike,
    *,
    split: str = "train",
    image_root: str | os.PathLike | None = None,
    task: str | None = None,
    on_error: OnError = "raise",
    check: Check = check_images,
    streaming: bool = False,
) -> Records[Pair]:
    """Query and document pairs of a source.

    Args:
        source: as in `load_documents`.
        split: split of a hub data set.
        image_root: folder of relative image paths; default the folder of the file.
        task: the task of the pairs; default the record's own ``task`` field, else the name of the
            file, folder or subset. Of an HTML folder: "title_section" or "caption_figure", also
            with a hyphen, reads only these, None reads both.
        on_error, check: what a bad record does, and what else makes one bad; see `Records`.
        streaming: read a hub data set as it downloads.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: bad JSON (with the line), a record that is not of the schema (names the record),
            a folder of both pages and records, or another task of an HTML folder.
    """
    path = _local(source)
    if path is not None and _is_html(path):
        if task is not None and task.replace("-", "_") not in _HTML_TASKS:
            raise ValueError(
                f"{path}: task of a folder of HTML pages must be one of {list(_HTML_TASKS)}, "
                f"got {task!r}"
            )
        return _fixed(path, _html_pairs(path, task), on_error, check)
    rows = _rows(source, path, split, streaming)
    fallback = path.stem if path is not None else re.split("[/:]", str(source))[-1]

    def items() -> Iterator[tuple[str, Callable[[], Pair]]]:
        for name, get, folder in rows():
            root = image_root if image_root is not None else folder
            yield name, partial(_pair, get, name, root, task, fallback)

    return Records(str(source), items, on_error, check)


def _document(get: Callable[[], Any], name: str, root: str | os.PathLike | None) -> Document:
    return document_from_record(_mapping(get(), name), root=root, name=name)


def _pair(
    get: Callable[[], Any],
    name: str,
    root: str | os.PathLike | None,
    task: str | None,
    fallback: str,
) -> Pair:
    record = _mapping(get(), name)
    task = task or record.get("task") or fallback
    if not isinstance(task, str):
        raise ValueError(f"{name}: field 'task' must be a string, got {type(task).__name__}")
    return pair_from_record(record, root=root, task=task, name=name)


def _mapping(record: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(record, Mapping):
        kind = type(record).__name__
        raise ValueError(f"{name}: expected a record with named fields, got {kind}")
    return record


def _fixed(path: Path, items: list[Item], on_error: OnError, check: Check) -> Records[Item]:
    return Records(
        str(path), lambda: ((item.name, partial(_given, item)) for item in items), on_error, check
    )


def _documents(item: Document | Pair) -> list[Document]:
    if isinstance(item, Document):
        return [item]
    return [item.query, item.positive, *item.negatives]


def _local(source: str | os.PathLike) -> Path | None:
    """The path of a local source, or None for the name of a hub data set."""
    path = Path(source)
    if path.exists():
        return path
    text = os.fspath(source)
    looks_local = path.suffix.lower() in _SUFFIXES or text.startswith((".", "/", "~"))
    if looks_local or not isinstance(text, str) or not _HUB_NAME.fullmatch(text):
        raise FileNotFoundError(f"data source not found: {source}")
    return None


def _is_html(path: Path) -> bool:
    """Whether a folder is read as HTML: pages at its top, or below where it has no record files.

    Says which files will not be read.

    Raises:
        ValueError: pages beside records; JSON alone may belong to the pages.
    """
    if not path.is_dir():
        return False
    top = {child.suffix.lower() for child in path.iterdir() if child.is_file()}
    pages, records = top & set(_PAGES), top & set(_SUFFIXES)
    if pages and records - {".json"}:
        raise ValueError(
            f"{path}: expected HTML pages or record files, got both "
            f"({', '.join(sorted(pages | records))}); move one kind to a folder of its own"
        )
    html = bool(pages)
    if not pages and not records:
        html = any(child.suffix.lower() in _PAGES for child in path.rglob("*"))
    if unread := _unread(path, html):
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(unread.items()))
        read = "HTML pages" if html else "record files, of its top alone"
        logger.warning("%s: read as a folder of %s; not read: %s", path, read, kinds)
    return html


def _unread(path: Path, html: bool) -> Counter[str]:
    """How many files of a folder look like data but are not read, by suffix."""
    opened = PIL.Image.registered_extensions()
    images = {suffix for suffix, kind in opened.items() if kind in PIL.Image.OPEN}
    unread: Counter[str] = Counter()
    for folder, _, names in os.walk(path):
        below = folder != str(path)
        for name in names:
            suffix = Path(name).suffix.lower()
            if html or below:
                data = suffix in _SUFFIXES or (not html and suffix in _PAGES)
            else:
                data = not (suffix in _SUFFIXES or suffix in images or name.startswith("."))
            if data:
                unread[f"{suffix or name}{' in sub-folders' if below else ''}"] += 1
    return unread


def _html_pairs(path: Path, task: str | None) -> list[Pair]:
    """The pairs of one task, or of all, of a folder of HTML pages."""
    from moca.data import html

    makers = dict(
        zip(_HTML_TASKS, (html.title_section_pairs, html.caption_figure_pairs), strict=True)
    )
    corpus = html.read_html_folder(path)
    if task is None:
        return [pair for pairs in makers.values() for pair in pairs(corpus)]
    return [replace(pair, task=task) for pair in makers[task.replace("-", "_")](corpus)]


# The name of a record, what reads it, and the folder of its relative paths.
Row = tuple[str, Callable[[], Any], "Path | None"]


def _rows(
    source: str | os.PathLike, path: Path | None, split: str, streaming: bool
) -> Callable[[], Iterator[Row]]:
    """A function that opens the source and yields its rows."""
    if path is None:
        return partial(_hub_rows, str(source), split, streaming)
    files = [path]
    if path.is_dir():
        files = sorted(child for child in path.iterdir() if child.suffix.lower() in _SUFFIXES)
        if not files:
            raise FileNotFoundError(f"no {', '.join(_SUFFIXES)} or HTML file in {path}")
    for file in files:
        if file.suffix.lower() not in _SUFFIXES:
            raise ValueError(f"{file}: expected one of {', '.join(_SUFFIXES)} or a folder")
    return partial(_file_rows, files)


def _file_rows(files: Iterable[Path]) -> Iterator[Row]:
    readers = {".jsonl": _json_lines, ".json": _json_array, ".parquet": parquet_rows}
    for file in files:
        for name, get in readers[file.suffix.lower()](file):
            yield name, get, file.parent


def _json_lines(file: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                name = f"{file.name} line {number}"
                yield name, partial(_json, line, name)


def _json_array(file: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    content = _json(file.read_bytes(), str(file))
    if not isinstance(content, list):
        raise ValueError(f"{file}: expected a JSON list of records, got {type(content).__name__}")
    for number, record in enumerate(content):
        yield f"{file.name} record {number}", partial(_given, record)


def _given(value: Any) -> Any:
    return value


def _json(content: bytes, place: str) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        within = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"{place}: bad JSON: {error.msg} ({within}column {error.colno})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8: {error.reason} (byte {error.start})") from None
    except (ValueError, RecursionError) as error:  # a number of too many digits, or deep nesting
        raise ValueError(f"{place}: bad JSON: {error}") from None


def parquet_rows(file: Path, place: str = "") -> Iterator[tuple[str, Callable[[], Any]]]:
    """Each row's name, which begins with `place` (default: the name of the file), and reader."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            number = 0
            for batch in table.iter_batches(_PARQUET_ROWS):
                for record in batch.to_pylist():
                    yield f"{place or file.name} row {number}", partial(_given, record)
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file}: cannot read Parquet: {error}") from error


def _hub_rows(source: str, split: str, streaming: bool) -> Iterator[Row]:
    import datasets

    name, _, subset = source.partition(":")
    try:
        rows = datasets.load_dataset(name, subset or None, split=split, streaming=streaming)
    except Exception as error:
        raise ValueError(
            f"{source}: cannot load split {split!r} of this hub data set (and there is no such "
            f"local file): {error}"
        ) from error
    for number, record in enumerate(rows):
        yield f"{source} row {number}", partial(_given, record), None
