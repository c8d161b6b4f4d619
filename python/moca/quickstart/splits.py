"""Training apart from test: a stable order, what counts as the same, and the leak check."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import PIL.Image

from moca.data.images import decode
from moca.data.records import IMAGE_MARKER, Document, ImageLike, Pair

# Two files show the same picture when their proportions agree and their thumbnails differ by at
# most this many grey levels (of 255) on average. Copies at half the size differ by about 2; what a
# mild filter leaves of a photograph counts as the same too, which is the safe side.
SAME_PICTURE = 2.5
SAME_ASPECT = 0.04
_THUMBNAIL = 32


def rank(name: str) -> bytes:
    """A key that puts names into an order that looks random and is the same on every machine."""
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def text_key(text: str) -> str:
    """What two texts have in common when they are the same but for case, blanks and images."""
    return " ".join(text.replace(IMAGE_MARKER, " ").casefold().split())


class Pictures:
    """Gives every image the number of the picture it shows.

    Images with the same decoded pixels have the same number; resized and recompressed copies have
    their own, and `near` finds them. Each file is decoded once.
    """

    def __init__(self) -> None:
        self._number: dict[bytes, int] = {}
        self._known: dict[object, int] = {}
        self._thumbnails: list[np.ndarray] = []
        self._aspects: list[float] = []
        self._stacked: tuple[np.ndarray, np.ndarray] | None = None

    def __call__(self, image: ImageLike) -> int:
        """The number of the picture an image shows.

        Raises:
            ValueError: an image that cannot be read.
        """
        key: bytes | str | None = image if isinstance(image, bytes) else None
        if isinstance(image, (str, os.PathLike)):
            key = os.fsdecode(image)
        if key is None or key not in self._known:
            number = self._look(decode(image))
            if key is None:
                return number
            self._known[key] = number
        return self._known[key]

    def near(self, pictures: Iterable[int]) -> set[int]:
        """These pictures and all that look the same, with other pixels."""
        found = set(pictures)
        if not found:
            return found
        if self._stacked is None or len(self._stacked[0]) < len(self._thumbnails):
            aspects = np.log(np.array(self._aspects))
            self._stacked = np.stack(self._thumbnails), aspects
        thumbnails, aspects = self._stacked
        for number in list(found):
            others = np.flatnonzero(np.abs(aspects - aspects[number]) <= SAME_ASPECT)
            gaps = np.abs(thumbnails[others] - thumbnails[number]).mean(axis=1)
            found.update(others[gaps <= SAME_PICTURE].tolist())
        return found

    def _look(self, image: PIL.Image.Image) -> int:
        content = f"{image.size}".encode() + image.tobytes()
        digest = hashlib.blake2b(content, digest_size=16).digest()
        if digest not in self._number:
            self._number[digest] = len(self._number)
            small = image.resize((_THUMBNAIL, _THUMBNAIL), PIL.Image.Resampling.BOX)
            self._thumbnails.append(np.asarray(small, np.int16).ravel())
            self._aspects.append(image.width / image.height)
        return self._number[digest]


def pictures_of(documents: Iterable[Document], pictures: Pictures) -> set[int]:
    """The numbers of all images of some documents."""
    return {pictures(image) for document in documents for image in document.images}


def unique_items(
    pairs: list[Pair], pictures: Pictures, *, near: bool = False
) -> tuple[list[Pair], Counter[str]]:
    """Keep the first of test items that share a query or an answer, which would be ambiguous.

    Args:
        pairs: test items.
        pictures: the register of images.
        near: answers that are images which look the same count as the same.

    Returns:
        The items kept, and how many were left out by reason.
    """
    kept: list[Pair] = []
    dropped: Counter[str] = Counter()
    queries: set[str] = set()
    texts: set[str] = set()
    taken: set[int] = set()
    for pair in pairs:
        query, text = text_key(pair.query.text), text_key(pair.positive.text)
        shown = set() if text else pictures_of([pair.positive], pictures)
        if query in queries:
            dropped["test item whose query is another's"] += 1
        elif text in texts or taken & (pictures.near(shown) if near else shown):
            dropped["test item whose answer is another's"] += 1
        else:
            queries.add(query)
            taken |= shown
            texts |= {text} - {""}
            kept.append(pair)
    return kept, dropped


def keep_images(document: Document, keep: Callable[[ImageLike], bool]) -> Document:
    """The document with the images that are to be kept; the same object when these are all."""
    kept = [keep(image) for image in document.images]
    if all(kept):
        return document
    first, *rest = document.text.split(IMAGE_MARKER)
    text = first + "".join(
        (IMAGE_MARKER if keeps else "") + part for keeps, part in zip(kept, rest, strict=True)
    )
    images = tuple(image for keeps, image in zip(kept, document.images, strict=True) if keeps)
    return replace(document, text=text, images=images)


def without_pictures(document: Document, hidden: set[int], pictures: Pictures) -> Document:
    """The document without the images that show one of the hidden pictures."""
    return keep_images(document, lambda image: pictures(image) not in hidden)


def without_leaks(
    train: list[Pair], test: list[Pair], hidden: set[int], pictures: Pictures
) -> tuple[list[Pair], Counter[str]]:
    """Training pairs that share no text and no picture with the test.

    A pair goes when its query or its answer has the text of a test query or test answer, or when
    all it shows is hidden pictures. A longer text loses its hidden pictures and stays.

    Args:
        train: training pairs of one task.
        test: test items whose texts must not occur.
        hidden: pictures that no training document may show.
        pictures: the register of images.

    Returns:
        The pairs kept, and how many were left out or changed by reason.
    """
    texts = {text_key(side.text) for pair in test for side in (pair.query, pair.positive)} - {""}
    kept: list[Pair] = []
    dropped: Counter[str] = Counter()
    for pair in train:
        if text_key(pair.query.text) in texts or text_key(pair.positive.text) in texts:
            dropped["training pair with a test text"] += 1
            continue
        positive = without_pictures(pair.positive, hidden, pictures)
        if not text_key(positive.text) and not positive.images:
            dropped["training pair with a test image"] += 1
            continue
        if positive is not pair.positive:
            dropped["training text that lost a test image"] += 1
            pair = replace(pair, positive=positive)
        kept.append(pair)
    return kept, dropped
