"""Documents and pairs: what every source is turned into, and the two published record schemas.

A document is a text in which each ``IMAGE_MARKER`` stands for one image. The schemas are those of
MoCa (arXiv 2506.23115): interleaved records (``text``, ``images``) for continual pre-training and
contrastive records (``qry``, ``pos_text``, ``neg_text`` and their image paths) for fine-tuning.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

IMAGE_MARKER = "<|vision_start|><|image_pad|><|vision_end|>"
ImageLike = bytes | str | os.PathLike | PIL.Image.Image
_ONE_IMAGE = (bytes, bytearray, memoryview, os.PathLike, Mapping, PIL.Image.Image)

_IMAGE_PAD = "<|image_pad|>"
_NUMBERED_MARKER = re.compile(r"<\|image_\d+\|>")
_PLAIN_MARKER = "<image>"
# A field -> what is taken for it by mistake, in small letters and without "_" and "-".
_DOCUMENT_MISTAKES = {
    "images": r"(img|image|pic|picture|photo)s?|(img|image)(path|file)s?|(img|image)list",
}
_PAIR_MISTAKES = {
    "qry": r"query|(qry|query)text",
    "qry_image_path": r"(qry|query)(img|image)s?(paths?)?",
    "pos_text": r"pos|positives?|positivetexts?",
    "pos_image_path": r"(pos|positive)(img|image)s?(paths?)?",
    "neg_text": r"(hard)?(neg|negative)s?(texts?)?",
    "neg_image_path": r"(hard)?(neg|negative)(img|image)s?(paths?)?",
}
_DOCUMENT_FIELDS = ("text", "image", "name", *_DOCUMENT_MISTAKES)


@dataclass(frozen=True)
class Document:
    """A text in which the i-th ``IMAGE_MARKER`` stands for ``images[i]``.

    Args:
        text: the text with its markers; may be empty only when read, never when encoded.
        images: encoded bytes, paths or PIL images, in the order of the markers.
        name: where the document came from, for error messages.
        opening: what of the text stands before its own words; all of it where it has none.
        closing: wording after the text, without images, that is kept where the text is cut.

    Raises:
        ValueError: the number of markers is not the number of images, or a lone surrogate in the
            text.
        TypeError: a text that is no string, or an image of another type.
    """

    text: str
    images: tuple[ImageLike, ...] = ()
    name: str = ""
    opening: str = ""
    closing: str = ""

    def __post_init__(self) -> None:
        where = self.name or "document"
        if not isinstance(self.text, str):
            raise TypeError(f"{where}: text must be a string, got {type(self.text).__name__}")
        if not isinstance(self.images, tuple):
            object.__setattr__(self, "images", tuple(self.images))
        for image in self.images:
            if not isinstance(image, (bytes, str, os.PathLike, PIL.Image.Image)):
                raise TypeError(
                    f"{where}: an image must be bytes, a path or a PIL image, "
                    f"got {type(image).__name__}"
                )
        try:
            self.text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where}: the text holds {self.text[error.start]!a} at character {error.start}, "
                "half of a surrogate pair and no character"
            ) from None
        markers = self.text.count(IMAGE_MARKER)
        if markers != len(self.images):
            raise ValueError(
                f"{where}: {markers} image marker(s) in the text ({_PLAIN_MARKER} in a record, "
                f"else {IMAGE_MARKER}) but {len(self.images)} image(s) given"
            )
        if self.text.count(_IMAGE_PAD) != markers:
            raise ValueError(
                f"{where}: {_IMAGE_PAD} stands outside a complete image marker {IMAGE_MARKER}"
            )

    @property
    def image_names(self) -> tuple[str, ...]:
        """Of each image, for error messages."""
        return tuple(f"{self.name or 'document'}: image {i}" for i in range(len(self.images)))

    @property
    def empty(self) -> bool:
        """True when there is neither an image nor any text but white space."""
        return not self.images and not self.text.strip()

    @classmethod
    def of(cls, item: Any, name: str = "") -> Document:
        """Make a document from what a caller has at hand.

        Args:
            item: a string (text), a PIL image, bytes or a path-like object (an image), a list or
                tuple of these (interleaved, in order), a mapping with ``text`` and/or ``image``
                (one or a list; a string is a path), or a document (returned as it is). The order of
                a mapping's keys is that of text and images, as in sentence-transformers, unless the
                text has its own markers.
            name: where it came from, for error messages.

        Raises:
            TypeError: another type.
        """
        if isinstance(item, Document):
            return item
        if isinstance(item, str):
            return cls(item, (), name)
        if isinstance(item, (bytes, os.PathLike, PIL.Image.Image)):
            return cls(IMAGE_MARKER, (item,), name)
        if isinstance(item, (list, tuple)):
            parts = [cls.of(part, name) for part in item]
            images = tuple(image for part in parts for image in part.images)
            return cls("".join(part.text for part in parts), images, name)
        if isinstance(item, Mapping):
            return _document_of_mapping(item, name)
        raise TypeError(
            f"{name or 'document'}: expected text, an image, a list of these or a mapping with "
            f"'text' and 'image', got {type(item).__name__}"
        )

    def key(self) -> bytes:
        """16 bytes, equal for equal text and equal images (by content, or by path)."""
        digest = hashlib.blake2b((self.text + self.closing).encode(), digest_size=16)
        for image in self.images:
            digest.update(b"\0image\0")
            digest.update(_image_identity(image))
        return digest.digest()


@dataclass(frozen=True)
class Pair:
    """A query, the document it should find, and documents it should not.

    Args:
        query: the query.
        positive: the document that answers it.
        negatives: hard negatives of this query only.
        task: batches are made of one task.
        name: where the pair came from, for error messages.
    """

    query: Document
    positive: Document
    negatives: tuple[Document, ...] = ()
    task: str = ""
    name: str = ""


def document_from_record(
    record: Mapping[str, Any], *, root: str | os.PathLike | None = None, name: str = ""
) -> Document:
    """Read an interleaved record: ``{"text": str, "images": [bytes | {"bytes", "path"} | path]}``.

    Args:
        record: the record. ``image`` is another name of ``images``, and one that is no list is a
            list of one. Images go first when the text has no marker (``<image>``, ``<|image_1|>``
            or `IMAGE_MARKER`); where ``images`` is an empty list, ``<image>`` is text. A string
            ``name`` names the document, in search results too. Other fields are not read;
            without ``text``, which may be empty or null, they may only hold numbers or nothing.
        root: folder against which relative image paths are taken.
        name: where the record came from, for error messages, and the name of one without.

    Raises:
        ValueError: a missing field or one of another type, a field that looks like a misspelt one,
            neither text nor image, or markers and images that differ in number.
    """
    where = name or "record"
    if not _missing(record.get("image")):
        if not _missing(record.get("images")):
            raise ValueError(f"{where}: expected 'images' or 'image', got both")
        record = {**record, "images": record["image"]}
    _check_names(record, _DOCUMENT_MISTAKES, where)
    unread = [key for key, value in record.items() if key not in _DOCUMENT_FIELDS and _tells(value)]
    if unread and "text" not in record and not _missing(record.get("images")):
        raise ValueError(
            f"{where}: field 'text' is missing; found {sorted(map(str, record))}; where "
            f"{sorted(map(str, unread))} shall not be read, give an empty 'text'"
        )
    document = _side(record, "text", "images", root, where)
    own = record.get("name")
    own = " ".join(own.split()) if isinstance(own, str) else ""
    return replace(document, name=own or name)


def pair_from_record(
    record: Mapping[str, Any],
    *,
    root: str | os.PathLike | None = None,
    task: str = "",
    name: str = "",
) -> Pair:
    """Read a contrastive record.

    Its fields are ``qry``, ``qry_image_path``, ``pos_text``, ``pos_image_path``, ``neg_text`` and
    ``neg_image_path``.

    An image path may be missing, null or empty (no image), a path, encoded bytes, ``{"bytes",
    "path"}`` or a list of these. A side with an image but no marker gets the image first; where the
    image path is given as empty, ``<image>`` is text. The ``neg_*`` fields are lists; a string that
    holds a JSON list is parsed as JSON, another string is one negative, and nothing is ever
    evaluated. Other fields are not read.

    Raises:
        ValueError: a missing field or one of another type, a field that looks like a misspelt one,
            an empty query or positive, markers and images that differ in number, negatives written
            as a Python list, or ``neg_text`` and ``neg_image_path`` of different lengths.
    """
    where = name or "record"
    _check_names(record, _PAIR_MISTAKES, where)
    query = _side(record, "qry", "qry_image_path", root, where)
    positive = _side(record, "pos_text", "pos_image_path", root, where)
    texts = _list_field(record, "neg_text", where)
    paths = _list_field(record, "neg_image_path", where)
    if texts and paths and len(texts) != len(paths):
        raise ValueError(
            f"{where}: neg_text has {len(texts)} entries but neg_image_path has {len(paths)}"
        )
    negatives = []
    for i in range(max(len(texts), len(paths))):
        text = texts[i] if texts else ""
        image = paths[i] if paths else record.get("neg_image_path")
        negative = _assemble(text, image, root, f"{where}: negative {i}")
        if not negative.empty:
            negatives.append(negative)
    return Pair(query, positive, tuple(negatives), task, name)


def _check_names(record: Mapping, mistakes: dict[str, str], where: str) -> None:
    """Refuse a field whose name is a mistake for that of one that is not there."""
    for key, value in record.items():
        for field, names in mistakes.items():
            if field not in record and _tells(value) and _mistaken(str(key), field, names):
                raise ValueError(
                    f"{where}: field {field!r} is missing; found {[key]}, which looks misspelt"
                )


@lru_cache(4096)
def _mistaken(key: str, field: str, names: str) -> bool:
    """Whether a key is one of the names (a pattern), or the field but for at most one letter."""
    key, field = (name.lower().replace("_", "").replace("-", "") for name in (key, field))
    same = len(os.path.commonprefix([key, field]))  # noqa: RUF071 - of letters
    rest, due = key[same:], field[same:]
    nearly = rest[1:] == due[1:] or rest[1:] == due or rest == due[1:]
    return nearly or re.fullmatch(names, key) is not None


def _tells(value: Any) -> bool:
    """Whether a field holds more than a number or nothing."""
    return not _missing(value) and not isinstance(value, (bool, int, float))


def _side(record: Mapping, text_key: str, image_key: str, root: Any, where: str) -> Document:
    """A document, or one side of a pair; its text may be empty when it has an image."""
    image, text = record.get(image_key), record.get(text_key)
    if _missing(image):
        text = _text_field(record, text_key, where)
    else:
        image = _list_field(record, image_key, where)
    side = where if text_key == "text" else f"{where}: {text_key}"
    document = _assemble(text, image, root, side)
    if document.empty:
        raise ValueError(f"{where}: field '{text_key}' is empty and '{image_key}' gives no image")
    return document


def _assemble(text: Any, image: Any, root: Any, where: str) -> Document:
    """Text and its image(s), with our markers; the images go first when the text has none."""
    text = "" if text is None else text
    if not isinstance(text, str):
        raise ValueError(f"{where}: expected a string, got {type(text).__name__}")
    values = [] if _missing(image) else image if isinstance(image, (list, tuple)) else [image]
    images = tuple(_image(value, root, where) for value in values if not _missing(value))
    text = _NUMBERED_MARKER.sub(IMAGE_MARKER, text)
    if images:
        text = text.replace(_PLAIN_MARKER, IMAGE_MARKER)
        if IMAGE_MARKER not in text:
            text = IMAGE_MARKER * len(images) + text
    elif image is None and _PLAIN_MARKER in text:
        raise ValueError(
            f"{where}: {_PLAIN_MARKER} in the text but no image; where it is plain text, "
            "the field of images must be given as empty"
        )
    return Document(text, images, where)


def _missing(value: Any) -> bool:
    return value is None or (
        isinstance(value, (str, bytes, list, tuple, np.ndarray)) and len(value) == 0
    )


def _text_field(record: Mapping, key: str, where: str) -> str:
    if key not in record:
        raise ValueError(f"{where}: field '{key}' is missing; found {sorted(map(str, record))}")
    value = record[key]
    if not isinstance(value, str):
        raise ValueError(f"{where}: field '{key}' must be a string, got {type(value).__name__}")
    return value


def _list_field(record: Mapping, key: str, where: str) -> list:
    """A list field; a string is a JSON list or, if it does not look like a list, one entry."""
    value = record.get(key)
    if _missing(value):
        return []
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, str):
        return _parse_list(value, key, where)
    if isinstance(value, _ONE_IMAGE) and key != "neg_text":
        return [value]
    raise ValueError(f"{where}: field '{key}' must be a list, got {type(value).__name__}")


def _parse_list(value: str, key: str, where: str) -> list:
    stripped = value.strip()
    if not (stripped.startswith("[") and stripped.endswith("]")):
        return [value]
    try:
        parsed = json.loads(stripped)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{where}: field '{key}' is a string that looks like a list but is no JSON list "
            f"({error}); it is never evaluated: store a real list or JSON. "
            f"It starts with {stripped[:60]!r}"
        ) from None
    return parsed


def _image(value: Any, root: Any, where: str) -> ImageLike:
    """An image of a record: bytes, ``{"bytes", "path"}``, a path (below root) or a PIL image."""
    if isinstance(value, Mapping):
        content, value = value.get("bytes"), value.get("path")
        if not _missing(content):
            if not isinstance(content, (bytes, bytearray, memoryview)):
                raise ValueError(
                    f"{where}: 'bytes' of an image must be bytes, got {type(content).__name__} "
                    "(JSON holds no bytes: give a 'path')"
                )
            return bytes(content)
        if _missing(value):
            raise ValueError(f"{where}: an image mapping needs 'bytes' or 'path'; both are empty")
    if isinstance(value, (bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, (bytes, PIL.Image.Image)):
        return value
    if isinstance(value, (str, os.PathLike)):
        remote = str(value).startswith(("http://", "https://"))
        return value if root is None or remote else Path(root) / value
    raise ValueError(
        f"{where}: an image must be bytes, a path or a PIL image, got {type(value).__name__}"
    )


def _image_identity(image: ImageLike) -> bytes:
    if isinstance(image, bytes):
        return hashlib.blake2b(image, digest_size=16).digest()
    if isinstance(image, PIL.Image.Image):
        content = f"{image.mode}{image.size}".encode() + image.tobytes()
        return hashlib.blake2b(content, digest_size=16).digest()
    return os.fsdecode(image).encode("utf-8", "surrogatepass")


def _document_of_mapping(item: Mapping, name: str) -> Document:
    unknown = set(item) - {"text", "image"}
    if unknown or not item:
        raise TypeError(
            f"{name or 'document'}: a mapping needs 'text' and/or 'image' and nothing else, "
            f"got {sorted(map(str, item))}"
        )
    text, image = item.get("text") or "", item.get("image")
    images = () if image is None else image if isinstance(image, (list, tuple)) else (image,)
    if images and IMAGE_MARKER not in text:
        markers = IMAGE_MARKER * len(images)
        text = text + markers if next(iter(item)) == "text" else markers + text
    return Document(text, tuple(images), name)
