"""Small random changes to training documents. Everything random comes from the generator given."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import PIL.Image

from moca.data.encode import Encoded, Piece
from moca.data.images import ImageSettings, decode, resize
from moca.data.records import Document

Illustrated = TypeVar("Illustrated", Document, Piece)


@dataclass(frozen=True)
class ImageChanges:
    """How far training images may be changed.

    Args:
        flip: probability that an image is mirrored left to right.
        rotate: largest rotation, in degrees.
        shift: largest move, as a fraction of the sides.
        zoom: largest change of scale, as a fraction: 0.2 draws from 0.8 to 1.2.
    """

    flip: float = 0.0
    rotate: float = 0.0
    shift: float = 0.0
    zoom: float = 0.0

    def any(self) -> bool:
        return any(vars(self).values())


def augment_images(
    document: Illustrated, rng: np.random.Generator, changes: ImageChanges
) -> Illustrated:
    """Change every image at random; what comes into view is white."""
    if not document.images or not changes.any():
        return document
    images = [
        _augment(decode(image, name), rng, changes)
        for image, name in zip(document.images, document.image_names, strict=True)
    ]
    return replace(document, images=tuple(images))


def _augment(
    image: PIL.Image.Image, rng: np.random.Generator, changes: ImageChanges
) -> PIL.Image.Image:
    mirror = -1.0 if rng.random() < changes.flip else 1.0
    angle = math.radians(rng.uniform(-changes.rotate, changes.rotate))
    scale = 1.0 + rng.uniform(-changes.zoom, changes.zoom)
    x, y = (0.5 + rng.uniform(-changes.shift, changes.shift, 2)) * image.size
    # From where a pixel of the result is taken: turned and scaled about the moved middle.
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    across = (mirror * cos, mirror * sin)
    matrix = (
        *across, image.width / 2 - across[0] * x - across[1] * y,
        -sin, cos, image.height / 2 + sin * x - cos * y,
    )  # fmt: skip
    return image.transform(
        image.size,
        PIL.Image.Transform.AFFINE,
        matrix,
        PIL.Image.Resampling.BILINEAR,
        fillcolor=(255, 255, 255),
    )


def drop_tokens(
    encoded: Encoded, rng: np.random.Generator, probability: float, kept_ids: np.ndarray
) -> Encoded:
    """Leave out each token with a probability, but none of `kept_ids` (special tokens).

    A document that would lose all its tokens stays as it is.
    """
    if probability == 0:
        return encoded
    ids = encoded.input_ids
    keep = (rng.random(len(ids)) >= probability) | (ids[:, None] == kept_ids).any(axis=1)
    return replace(encoded, input_ids=ids[keep]) if keep.any() else encoded


def preload_images(document: Document, settings: ImageSettings) -> Document:
    """The document with its images decoded and resized, so that neither is done again."""
    images = (
        resize(decode(image, name), settings, name)
        for image, name in zip(document.images, document.image_names, strict=True)
    )
    return replace(document, images=tuple(images))
