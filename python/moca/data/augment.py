"""Small random changes to training documents. Everything random comes from the generator given."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import PIL.Image
import PIL.ImageOps

from moca.data.encode import Encoded
from moca.data.images import ImageSettings, decode, resize
from moca.data.records import Document


def augment_images(
    document: Document, rng: np.random.Generator, *, flip: float, rotate: float, shift: float
) -> Document:
    """Mirror each image with probability `flip`, turn it by up to `rotate` degrees and move it by
    up to `shift` of its sides; what comes into view is white."""
    if not document.images or not (flip or rotate or shift):
        return document
    images = []
    for number, source in enumerate(document.images):
        image = decode(source, f"{document.name or 'document'}: image {number}")
        if rng.random() < flip:
            image = PIL.ImageOps.mirror(image)
        if rotate or shift:
            dx, dy = rng.uniform(-shift, shift, 2)
            image = image.rotate(
                rng.uniform(-rotate, rotate),
                PIL.Image.Resampling.BILINEAR,
                translate=(round(dx * image.width), round(dy * image.height)),
                fillcolor=(255, 255, 255),
            )
        images.append(image)
    return replace(document, images=tuple(images))


def drop_tokens(
    encoded: Encoded, rng: np.random.Generator, probability: float, kept_ids: np.ndarray
) -> Encoded:
    """Leave out each token with a probability, but none of `kept_ids` (special tokens).

    A document that would lose all its tokens stays as it is.
    """
    if probability == 0:
        return encoded
    ids = encoded.input_ids
    keep = (rng.random(len(ids)) >= probability) | np.isin(ids, kept_ids)
    return replace(encoded, input_ids=ids[keep]) if keep.any() else encoded


def preload_images(document: Document, settings: ImageSettings) -> Document:
    """The document with its images decoded and resized, so that neither is done again."""
    images = (
        resize(decode(image, document.name), settings, document.name) for image in document.images
    )
    return replace(document, images=tuple(images))
