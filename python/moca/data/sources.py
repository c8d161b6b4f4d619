"""Documents and pairs of a source: record files, a hub data set, or a folder of HTML pages."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import PIL.Image

from moca.config import OnError
from moca.data.images import ImageSettings, decode, target_size
from moca.data.records import Document, Pair, document_from_record, pair_from_record
from moca.data.rows import (
    PAGES,
    SUFFIXES,
    HubSplit,
    fields,
    given,
    kinds,
    locate,
    open_rows,
    read_rows,
    visible_files,
)

logger = logging.getLogger(__name__)

Check = Callable[[Document], object]
Item = TypeVar("Item", Document, Pair)
Made = TypeVar("Made")

_HTML_TASKS = ("title_section", "caption_figure")
# Beside their pictures, what pages are shown with.
_PARTS_OF_PAGES = {".css", ".js", ".mjs", ".map", ".svg", ".woff", ".woff2", ".ttf", ".otf", ".eot"}


def check_images(document: Document) -> None:
    """Raise ValueError unless every image of a document can be decoded; names the record."""
    for image in document.images:
        opened = decode(image, document.name)
        target_size(opened.height, opened.width, ImageSettings(), document.name)


def once(make: Callable[[Document], Made]) -> Callable[[Document], Made]:
    """The same function, called once for all documents that are equal and do not make it fail."""
    known: dict[bytes, Made] = {}

    def remembered(document: Document) -> Made:
        key = document.key()
        if key not in known:
            known[key] = make(document)
        return known[key]

    return remembered


def picture_suffixes() -> set[str]:
    """How names of files end that hold an image which can be read."""
    known = PIL.Image.registered_extensions()
    return {suffix for suffix, kind in known.items() if kind in PIL.Image.OPEN}


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
        self.source, self.on_error, self.check = source, on_error, check
        self.skipped: Counter[str] = Counter()
        self._items: Callable[[], Iterator[tuple[str, Callable[[], Item]]]] = items

    def __iter__(self) -> Iterator[Item]:
        self.skipped = Counter()
        items = self._items()
        if self.on_error == "skip":
            items = ((name, partial(_checked, name, make, self.check)) for name, make in items)
        return read_rows(self.source, items, self.on_error, self.skipped)


def load_documents(
    source: str | os.PathLike,
    *,
    split: str = "train",
    image_root: str | os.PathLike | None = None,
    on_error: OnError = "raise",
    check: Check = check_images,
) -> Records[Document]:
    """Interleaved documents of a source.

    Args:
        source: a ``.jsonl``, ``.json`` or ``.parquet`` file, a folder of these or of HTML pages, or
            the name of a hub data set (``owner/name``, then ``:subset`` and ``@split`` if need be).
        split: of a hub data set whose name gives none; that it is read is logged.
        image_root: folder of relative image paths; default the folder of the file.
        on_error, check: what a bad record does, and what else makes one bad; see `Records`.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: bad JSON (with the line), a record that is not of the schema (names the record),
            or a folder of both pages and records.
    """
    place = locate(source, split)
    if isinstance(place, Path) and _is_html(place):
        from moca.data.html import read_html_folder  # needs lxml, which nothing else here does

        sections = (section.document for section in read_html_folder(place).sections)
        return _fixed(place, list(sections), on_error, check)
    rows = open_rows(place)

    def items() -> Iterator[tuple[str, Callable[[], Document]]]:
        for (name, get), folder in rows():
            root = image_root if image_root is not None else folder
            yield name, partial(_document, get, name, root)

    return Records(str(place), items, on_error, check)


def load_pairs(
    source: str | os.PathLike,
    *,
    split: str = "train",
    image_root: str | os.PathLike | None = None,
    task: str | None = None,
    on_error: OnError = "raise",
    check: Check = check_images,
) -> Records[Pair]:
    """Query and document pairs of a source.

    Args:
        source: as in `load_documents`.
        split: as in `load_documents`.
        image_root: folder of relative image paths; default the folder of the file.
        task: the task of the pairs; default the record's own ``task`` field, else the name of the
            file, folder or subset. Of an HTML folder: "title_section" or "caption_figure", also
            with a hyphen, reads only these, None reads both.
        on_error, check: what a bad record does, and what else makes one bad; see `Records`.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: bad JSON (with the line), a record that is not of the schema (names the record),
            a folder of both pages and records, or another task of an HTML folder.
    """
    place = locate(source, split)
    if isinstance(place, Path) and _is_html(place):
        if task is not None and task.replace("-", "_") not in _HTML_TASKS:
            raise ValueError(
                f"{place}: task of a folder of HTML pages must be one of {list(_HTML_TASKS)}, "
                f"got {task!r}"
            )
        return _fixed(place, _html_pairs(place, task), on_error, check)
    rows = open_rows(place)
    fallback = task_name(place)

    def items() -> Iterator[tuple[str, Callable[[], Pair]]]:
        for (name, get), folder in rows():
            root = image_root if image_root is not None else folder
            yield name, partial(_pair, get, name, root, task, fallback)

    return Records(str(place), items, on_error, check)


def task_name(place: Path | HubSplit) -> str:
    """The task of a source whose records name none: its file, folder, subset or data set."""
    if isinstance(place, Path):
        return place.stem
    return place.subset or place.name.rpartition("/")[2]


def _document(get: Callable[[], Any], name: str, root: str | os.PathLike | None) -> Document:
    return document_from_record(fields(get(), name), root=root, name=name)


def _pair(
    get: Callable[[], Any],
    name: str,
    root: str | os.PathLike | None,
    task: str | None,
    fallback: str,
) -> Pair:
    record = fields(get(), name)
    task = task or record.get("task") or fallback
    if not isinstance(task, str):
        raise ValueError(f"{name}: field 'task' must be a string, got {type(task).__name__}")
    return pair_from_record(record, root=root, task=task, name=name)


def _fixed(path: Path, items: list[Item], on_error: OnError, check: Check) -> Records[Item]:
    return Records(
        str(path), lambda: ((item.name, partial(given, item)) for item in items), on_error, check
    )


def _checked(name: str, make: Callable[[], Item], check: Check) -> Item:
    """An item none of whose documents fails the check; a fault is named by its row."""
    item = make()
    for document in _documents(item):
        try:
            check(document)
        except ValueError as error:
            raise ValueError(f"{name}: {str(error).removeprefix(f'{item.name}: ')}") from error
    return item


def _documents(item: Document | Pair) -> list[Document]:
    if isinstance(item, Document):
        return [item]
    return [item.query, item.positive, *item.negatives]


def _is_html(path: Path) -> bool:
    """Whether a folder is read as HTML: pages at its top, or below where it has no record files.

    Says how many files of which kinds will not be read. What is hidden does not count.

    Raises:
        ValueError: pages beside records; JSON alone may belong to the pages.
    """
    if not path.is_dir():
        return False
    files = list(visible_files(path))
    top = {file.suffix.lower() for file in files if file.parent == path}
    pages, records = top & set(PAGES), top & set(SUFFIXES)
    if pages and records - {".json"}:
        raise ValueError(
            f"{path}: expected HTML pages or record files, got both "
            f"({', '.join(sorted(pages | records))}); move one kind to a folder of its own"
        )
    html = bool(pages)
    if not pages and not records:
        html = any(file.suffix.lower() in PAGES for file in files)
    if html:
        read, of = "HTML pages", {*PAGES, *_PARTS_OF_PAGES}
        unread = [file for file in files if file.suffix.lower() not in of]
    elif records:
        read = "record files, of its top alone"
        unread = [f for f in files if f.parent != path or f.suffix.lower() not in SUFFIXES]
    else:
        return False
    pictures = picture_suffixes()  # they belong to the pages or records
    if unread := [file for file in unread if file.suffix.lower() not in pictures]:
        logger.warning("%s: read as a folder of %s; not read: %s", path, read, kinds(unread))
    return html


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
