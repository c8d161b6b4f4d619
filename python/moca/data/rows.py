"""Rows of JSON Lines, JSON, Parquet, tables and hub data sets, and what becomes of bad ones.

No source runs code from the data: nothing is evaluated, unpickled or loaded with remote code.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args

from moca.config import OnError

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
# Where a row stands, and what reads it.
Row = tuple[str, Callable[[], Any]]

SUFFIXES = (".jsonl", ".json", ".parquet")  # of files of records
PAGES = (".html", ".htm", ".xhtml")  # of folders that are read as documents
_PACKED = (".gz", ".bz2", ".xz", ".zst")  # what is packed is told by the suffix before
_KINDS = 8  # of files, told by their names
# "name" or "owner/name", and then, where they are given, ":subset" and "@split".
_HUB_NAME = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?::([\w.-]+))?(?:@([\w.-]+(?:\[[\d:%-]+\])?))?")
# Arrow rows turned into Python objects at a time; a row may hold several images.
_ARROW_ROWS = 64
# Tells two faults of a kind apart: "(column 7)", "(line 2, column 7)", "(byte 9)".
_DETAIL = re.compile(r" \([^()]*\d[^()]*\)$")


class HubSplit(NamedTuple):
    """One split of a data set on the hub.

    Args:
        name: "owner/name".
        subset: its configuration; None for the only one.
        split: its part, such as "train" or "test[:100]".
        given: whether the source named the split.
    """

    name: str
    subset: str | None
    split: str
    given: bool

    def __str__(self) -> str:
        return f"{self.name}{f':{self.subset}' if self.subset else ''}@{self.split}"


def locate(source: str | os.PathLike, split: str) -> Path | HubSplit:
    """The path of a local source, or what the name of a hub data set stands for.

    Args:
        source: a path, or ``owner/name``, which ``:subset`` and ``@split`` may follow.
        split: of a hub data set whose name gives none.

    Raises:
        FileNotFoundError: no such file or folder, and no name that the hub could have.
    """
    path = Path(source)
    if path.exists():
        return path
    text = os.fspath(source)
    looks_local = path.suffix.lower() in SUFFIXES or text.startswith((".", "/", "~"))
    named = None if looks_local else _HUB_NAME.fullmatch(text)
    if named is None:
        raise FileNotFoundError(f"data source not found: {source}")
    name, subset, given = named.groups()
    return HubSplit(name, subset, given or split, given is not None)


def open_rows(place: Path | HubSplit) -> Callable[[], Iterator[tuple[Row, Path | None]]]:
    """A function that opens a source and yields its rows, each with the folder of its file.

    Raises:
        FileNotFoundError: a folder without files of records.
        ValueError: a file of another kind.
    """
    if isinstance(place, HubSplit):
        return partial(_hub_rows, place)
    files = [place]
    if place.is_dir():
        files = sorted(child for child in place.iterdir() if child.suffix.lower() in SUFFIXES)
        if not files:
            raise FileNotFoundError(
                f"{place}: expected {', '.join(SUFFIXES)} or HTML files in it, got "
                f"{kinds(visible_files(place)) or 'none'}"
            )
    for file in files:
        if file.suffix.lower() not in SUFFIXES:
            raise ValueError(f"{file}: expected one of {', '.join(SUFFIXES)} or a folder")
    return partial(_rows_of_files, files)


def visible_files(folder: Path) -> Iterator[Path]:
    """The files in and below a folder, but for hidden ones and those of hidden folders."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in names if not name.startswith("."))


def kinds(files: Iterable[Path]) -> str:
    """How many files there are of each kind: "12 .txt, 3 .pdf"."""
    counts = Counter(sorted(_kind(file) for file in files)).most_common()
    told = [f"{count} {kind}" for kind, count in counts[:_KINDS]]
    if others := sum(count for _, count in counts[_KINDS:]):
        told.append(f"{others} of other kinds")
    return ", ".join(told)


def _kind(file: Path) -> str:
    *_, before, suffix = ["", "", *file.suffixes]
    suffix = suffix.lower()
    return (before.lower() + suffix if suffix in _PACKED else suffix) or "without a suffix"


def file_rows(file: Path, place: str = "") -> Iterator[Row]:
    """The rows of a .jsonl, .json, .parquet or .tsv file, whose names begin with `place` (default:
    the name of the file).

    Raises:
        ValueError: a file that is none of its kind.
    """
    readers = {
        ".jsonl": _json_lines,
        ".json": _json_array,
        ".parquet": _parquet_rows,
        ".tsv": _table_rows,
    }
    return readers[file.suffix.lower()](file, place or file.name)


def read_rows(
    source: str,
    rows: Iterable[tuple[str, Callable[[], Item]]],
    on_error: OnError,
    skipped: Counter[str],
) -> Iterator[Item]:
    """What rows are made into, one after another.

    Args:
        source: what is read, for messages.
        rows: where each stands, and what makes an item of it or raises ValueError.
        on_error: "raise" stops at the first bad row; "skip" leaves it out, counts it and logs a
            summary.
        skipped: takes the reasons with their counts; without the row's name and the place in it, so
            that faults of a kind count together.

    Raises:
        ValueError: a bad row, or another on_error.
    """
    if on_error not in get_args(OnError):
        raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
    total = 0
    for name, make in rows:
        total += 1
        try:
            item = make()
        except ValueError as error:
            if on_error == "raise":
                raise
            skipped[_DETAIL.sub("", str(error).removeprefix(f"{name}: "))] += 1
            logger.debug("skipped %s", error)
        else:
            yield item
    if skipped:
        [(reason, _)] = skipped.most_common(1)
        count = skipped.total()
        logger.warning("%s: skipped %d of %d records, most often: %s", source, count, total, reason)


def fields(row: Any, name: str) -> Mapping[str, Any]:
    """A row that has named fields.

    Raises:
        ValueError: it has none; says where it stands.
    """
    if not isinstance(row, Mapping):
        kind = type(row).__name__
        raise ValueError(f"{name}: expected a record with named fields, got {kind}")
    return row


def given(value: Item) -> Item:
    """The value itself: what reads a row that has been read already."""
    return value


def _rows_of_files(files: Iterable[Path]) -> Iterator[tuple[Row, Path]]:
    for file in files:
        for row in file_rows(file):
            yield row, file.parent


def _json_lines(file: Path, place: str) -> Iterator[Row]:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                name = f"{place} line {number}"
                yield name, partial(_json, line, name)


def _json_array(file: Path, place: str) -> Iterator[Row]:
    content = _json(file.read_bytes(), str(file))
    if not isinstance(content, list):
        raise ValueError(f"{file}: expected a JSON list of records, got {type(content).__name__}")
    for number, record in enumerate(content):
        yield f"{place} record {number}", partial(given, record)


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


def _parquet_rows(file: Path, place: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            number = 0
            for batch in table.iter_batches(_ARROW_ROWS):
                for record in batch.to_pylist():
                    yield f"{place} row {number}", partial(given, record)
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file}: cannot read Parquet: {error}") from error


def _table_rows(file: Path, place: str) -> Iterator[Row]:
    """Rows under a line of field names, all parted by tabs."""
    with open(file, encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, delimiter="\t")
        try:
            header = next(reader, [])
            for values in filter(None, reader):
                name = f"{place} line {reader.line_num}"
                yield name, partial(_table_row, header, values, name)
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: no table after line {reader.line_num}: {error}") from error


def _table_row(header: list[str], values: list[str], name: str) -> dict[str, Any]:
    if len(values) != len(header):
        raise ValueError(
            f"{name}: expected {len(header)} fields parted by tabs ({', '.join(header)}), "
            f"got {len(values)}: {values}"
        )
    return dict(zip(header, values, strict=True))


def _hub_rows(place: HubSplit) -> Iterator[tuple[Row, None]]:
    import datasets

    if not place.given:
        other = place._replace(split="SPLIT")
        logger.warning("%s is read, for the source names no split; %s reads another", place, other)
    try:
        rows = datasets.load_dataset(place.name, place.subset, split=place.split)
    except Exception as error:
        raise ValueError(
            f"{place}: cannot load split {place.split!r} of this hub data set (and there is no "
            f"such local file): {error}"
        ) from error
    features = rows.features
    _leave_encoded(features)
    number = 0
    for batch in rows.with_format("arrow").iter(_ARROW_ROWS):  # as stored
        for record in batch.to_pylist():
            row = partial(given, features.decode_example(record))
            yield (f"{place} row {number}", row), None
            number += 1


def _leave_encoded(feature: Any) -> None:
    """Have images given as their bytes: decoded, they are many times as large."""
    import datasets

    if isinstance(feature, datasets.Image):
        feature.decode = False
    elif isinstance(feature, Mapping):
        for inner in feature.values():
            _leave_encoded(inner)
    elif isinstance(feature, (datasets.List, datasets.LargeList)):
        _leave_encoded(feature.feature)
