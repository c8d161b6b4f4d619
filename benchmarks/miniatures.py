"""Models with random weights, and documents with the quickstart's mix of lengths: what the
end-to-end benchmarks run on. Nothing is fetched.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
from moca.data.records import IMAGE_MARKER, Document
from moca.model import MocaModel, build_model, tiny_config
from moca.quickstart.run import IMAGES, VOCABULARY
from moca.saving import build_tokenizer

IMAGE_TOKENS = 18  # of a picture: 16, and one on each side


class Kind(NamedTuple):
    """One kind of documents.

    Args:
        lengths: in tokens, at 0, 10, ... 100 % of them.
        share: of all documents.
        pictured: how many of them hold a picture.
    """

    lengths: tuple[int, ...]
    share: float
    pictured: float


# The quickstart's documents, measured: pieces of the manual, pictures with text, glosses. Then its
# queries, and what they look for: sections, pictures, glosses.
DOCUMENTS = (
    Kind((2, 22, 37, 61, 95, 126, 128, 128, 128, 128, 128), 0.16, 0.34),
    Kind((21, 22, 23, 24, 25, 25, 26, 27, 28, 29, 31), 0.15, 1.0),
    Kind((3, 10, 12, 14, 16, 18, 21, 24, 30, 39, 128), 0.69, 0.0),
)
QUERIES = (Kind((1, 2, 3, 3, 4, 5, 6, 8, 10, 14, 69), 1.0, 0.0),)
POSITIVES = (
    Kind((13, 19, 31, 51, 82, 109, 128, 128, 128, 128, 128), 0.26, 0.5),
    Kind((18,) * 11, 0.42, 1.0),
    Kind((3, 6, 7, 9, 11, 13, 15, 19, 24, 30, 56), 0.32, 0.0),
)


@dataclass(frozen=True)
class Size:
    """A model: widths, layers and heads of both towers, and its vocabulary."""

    name: str
    hidden: int
    layers: int
    heads: int
    vision_hidden: int
    vision_layers: int
    vision_heads: int
    vocabulary: int


QUICKSTART = Size("quickstart", 256, 3, 4, 192, 3, 6, VOCABULARY)
WIDE = Size("12 x 768", 768, 12, 12, 384, 6, 6, 32768)
TINY = Size("tiny", 32, 2, 2, 32, 2, 2, VOCABULARY)


def documents(count: int, kinds: Sequence[Kind], seed: int) -> list[Document]:
    """Documents of random words and pictures."""
    generator, words = random.Random(seed), vocabulary()
    result = []
    for _ in range(count):
        kind = generator.choices(kinds, [kind.share for kind in kinds])[0]
        place, part = divmod(generator.random() * 10, 1)
        low, high = kind.lengths[int(place)], kind.lengths[int(place) + 1]
        length = round(low + (high - low) * part)
        has_image = generator.random() < kind.pictured
        text = "".join(
            f" {generator.choice(words)}" for _ in range(length - IMAGE_TOKENS * has_image)
        )
        images = (picture(generator.randrange(1 << 32)),) if has_image else ()
        result.append(Document(text + IMAGE_MARKER * has_image, images))
    return result


def picture(seed: int) -> PIL.Image.Image:
    """Noise of 64 patches."""
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)
    return PIL.Image.fromarray(pixels)


@lru_cache
def vocabulary() -> list[str]:
    """Words that are one token each."""
    generator = random.Random(0)
    return ["".join(generator.choices("abcdefghijklmnopqrst", k=4)) for _ in range(1500)]


@lru_cache
def tokenizer() -> Any:
    return build_tokenizer([" ".join(["", *vocabulary()])] * 2, VOCABULARY)


def build(size: Size, attention: str) -> MocaModel:
    """The same weights for every attention implementation."""
    config = tiny_config(
        tokenizer(), hidden=size.hidden, layers=size.layers, heads=size.heads,
        vision_hidden=size.vision_hidden, vision_layers=size.vision_layers,
        vision_heads=size.vision_heads,
    )  # fmt: skip
    config.get_text_config().vocab_size = size.vocabulary
    return build_model(config, tokenizer(), IMAGES, attn_implementation=attention).train()
