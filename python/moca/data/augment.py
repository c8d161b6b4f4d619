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
    document: Document, rng: np.random.Generator, flip: float, rotate: float
) -> Document:
    """Mirror each image with probability `flip` and turn it by up to `rotate` degrees."""
    if not document.images or (flip == 0 and rotate == 0):
        return document
    images = []
    for number, source in enumerate(document.images):
        image = decode(source, f"{document.name or 'document'}: image {number}")
        if rng.random() < flip:
            image = PIL.ImageOps.mirror(image)
        if rotate:
            angle = rng.uniform(-rotate, rotate)
            image = image.rotate(angle, PIL.Image.Resampling.BILINEAR, fillcolor=(255, 255, 255))
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
