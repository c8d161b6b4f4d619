"""The baseline of the image tasks: a plain CNN and a bag of character n-grams, trained to match.

What a small model from scratch reaches without transformers, pre-training or kernels of ours; plain
torch. B pairs a batch, N images, S side in pixels, D dimensions of the embedding.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from moca.data.images import decode
from moca.data.records import Document, Pair
from moca.evaluate import DEFAULT_KS, Pool

_PADDING = 0


@dataclass(frozen=True)
class BaselineSettings:
    """What the baseline is and how long it learns.

    Args:
        steps: optimiser steps; the budget.
        batch: pairs a step, each with another image.
        dim: of the embedding.
        side: of the square every image is fitted into, in pixels.
        width: channels of the CNN's first layer, doubled twice.
        buckets: n-grams are hashed into as many rows.
        shift: images are moved by up to as many pixels while training.
        dropout: share of the text features left out while training.
        temperature: of the loss.
        learning_rate: peak, after a warm-up and before a cosine to zero.
        weight_decay: of AdamW.
        seed: of weights, batches and shifts.
    """

    steps: int = 400
    batch: int = 128
    dim: int = 128
    side: int = 64
    width: int = 24
    buckets: int = 2**15
    shift: int = 4
    dropout: float = 0.2
    temperature: float = 0.07
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "dim", "side", "width", "buckets"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class TextTower(nn.Module):
    """Mean of the vectors of hashed character n-grams, then a linear layer."""

    def __init__(self, settings: BaselineSettings):
        super().__init__()
        self.grams = nn.EmbeddingBag(
            settings.buckets, settings.dim, mode="mean", padding_idx=_PADDING
        )
        self.drop = nn.Dropout(settings.dropout)
        self.out = nn.Linear(settings.dim, settings.dim)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, n-grams) int64, padded with 0 -> (B, D) of length 1."""
        return F.normalize(self.out(self.drop(self.grams(ids))), dim=-1)


class ImageTower(nn.Module):
    """Five 3 x 3 convolutions that halve the side, mean over places, then a linear layer."""

    def __init__(self, settings: BaselineSettings):
        super().__init__()
        width = settings.width
        layers: list[nn.Module] = []
        before = 3
        for channels in (width, 2 * width, 4 * width, 4 * width, 4 * width):
            convolution = nn.Conv2d(before, channels, 3, stride=2, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(channels), nn.ReLU()]
            before = channels
        self.layers = nn.Sequential(*layers)
        self.out = nn.Linear(before, settings.dim)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 -> (B, D) of length 1."""
        # Most pixels are white: let that be 0.
        pixels = 1 - images.float() / 255
        # The layout that convolutions are fastest in.
        features = self.layers(pixels.contiguous(memory_format=torch.channels_last))
        return F.normalize(self.out(features.mean(dim=(2, 3))), dim=-1)


class Baseline(nn.Module):
    """The two towers; `fit` trains them and `embed` makes embeddings of texts and images."""

    def __init__(self, settings: BaselineSettings):
        super().__init__()
        self.settings = settings
        torch.manual_seed(settings.seed)
        self.text = TextTower(settings)
        self.image = ImageTower(settings)

    def fit(self, pairs: Sequence[Pair], *, progress: bool = True) -> None:
        """Train on text -> image pairs.

        Args:
            pairs: the query is a text, the positive one image.
            progress: show a progress bar.

        Raises:
            ValueError: no pairs, or a positive that is not one image.
        """
        settings = self.settings
        captions, images = _by_image(pairs)
        texts = [[gram_ids(text, settings.buckets) for text in names] for names in captions]
        pixels = torch.stack([load_square(image, settings.side) for image in images])
        optimizer = torch.optim.AdamW(
            self.parameters(),
            settings.learning_rate,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, settings.learning_rate, settings.steps, pct_start=0.1
        )
        random = np.random.default_rng(settings.seed)
        batches = _batches(len(images), settings.batch, settings.steps, random)
        self.train()
        bar = tqdm(batches, "baseline", settings.steps, disable=not progress, leave=False)
        for rows in bar:
            ids = _pad([_choose(texts[row], random) for row in rows])
            shown = _shift(pixels[rows], settings.shift, random)
            scores = self.text(ids) @ self.image(shown).T / settings.temperature
            target = torch.arange(len(rows))
            loss = (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
        self.eval()

    @torch.no_grad()
    def embed(self, documents: Sequence[Document]) -> Tensor:
        """(N, D) embeddings; a document is one image or a text."""
        settings = self.settings
        self.eval()
        parts = []
        for start in range(0, len(documents), settings.batch):
            part = documents[start : start + settings.batch]
            if part[0].images:
                pixels = torch.stack([load_square(item, settings.side) for item in part])
                parts.append(self.image(pixels))
            else:
                ids = _pad([gram_ids(item.text, settings.buckets) for item in part])
                parts.append(self.text(ids))
        return torch.cat(parts)


def run_baseline(
    train: Sequence[Pair],
    test: Sequence[Pair],
    settings: BaselineSettings | None = None,
    *,
    ks: Sequence[int] = DEFAULT_KS,
    progress: bool = True,
) -> dict[str, float]:
    """Train on some pairs and score on others: the metrics of `moca.evaluate.metrics`."""
    model = Baseline(settings or BaselineSettings())
    model.fit(train, progress=progress)
    return Pool.of_pairs(test).evaluate(model.embed, ks)


def gram_ids(text: str, buckets: int) -> np.ndarray:
    """Hashes of a text's words and of their character n-grams, n from 1 to 4.

    Returns:
        (number of n-grams) int64 from 1 to ``buckets - 1``; 0 is for padding.
    """
    grams = []
    for word in text.casefold().split():
        marked = f"<{word}>"
        grams.append(marked)
        grams += [
            marked[i : i + n] for n in range(1, 5) for i in range(max(0, len(marked) - n + 1))
        ]
    hashes = [zlib.crc32(gram.encode("utf-8", "surrogatepass")) for gram in grams]
    return np.array(hashes, np.int64) % max(1, buckets - 1) + 1


def load_square(document: Document, side: int) -> Tensor:
    """The image of a document, fitted into a white square: (3, S, S) uint8.

    Raises:
        ValueError: a document that is not one image, or an image that cannot be read.
    """
    if len(document.images) != 1:
        where = document.name or "document"
        raise ValueError(f"{where}: expected one image, got {len(document.images)}")
    image = decode(document.images[0], document.name)
    scale = side / max(image.size)
    size = [max(1, round(length * scale)) for length in image.size]
    image = image.resize((size[0], size[1]), PIL.Image.Resampling.BOX)
    square = PIL.Image.new("RGB", (side, side), "white")
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


def _by_image(pairs: Sequence[Pair]) -> tuple[list[list[str]], list[Document]]:
    """The captions of each distinct image, in order."""
    if not pairs:
        raise ValueError("expected at least one pair, got none")
    captions: dict[bytes, list[str]] = {}
    images: dict[bytes, Document] = {}
    for pair in pairs:
        key = pair.positive.key()
        images.setdefault(key, pair.positive)
        captions.setdefault(key, []).append(pair.query.text)
    return list(captions.values()), list(images.values())


def _batches(
    count: int, batch: int, steps: int, random: np.random.Generator
) -> Iterator[np.ndarray]:
    """Row numbers of each step: every image once before any comes again."""
    batch = min(batch, count)
    order = np.empty(0, np.int64)
    for _ in range(steps):
        if len(order) < batch:
            order = random.permutation(count)
        rows, order = order[:batch], order[batch:]
        yield rows


def _choose(captions: list[np.ndarray], random: np.random.Generator) -> np.ndarray:
    """The first caption, in the language of the test, half of the time; else any."""
    return captions[0 if random.random() < 0.5 else random.integers(len(captions))]


def _pad(ids: list[np.ndarray]) -> Tensor:
    padded = np.full((len(ids), max(1, *map(len, ids))), _PADDING, np.int64)
    for row, values in zip(padded, ids, strict=True):
        row[: len(values)] = values
    return torch.from_numpy(padded)


def _shift(images: Tensor, most: int, random: np.random.Generator) -> Tensor:
    """Move each image by up to ``most`` pixels; white comes in from the sides."""
    side = images.shape[-1]
    padded = F.pad(images, (most,) * 4, value=255)
    moves = random.integers(0, 2 * most + 1, (len(images), 2)).tolist()
    moved = [
        image[:, y : y + side, x : x + side] for image, (y, x) in zip(padded, moves, strict=True)
    ]
    return torch.stack(moved)
