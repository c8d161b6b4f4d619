"""A step of stage 1 at the size of Qwen2.5-VL-3B, in tokens a second: random weights in bfloat16,
16k packed tokens of interleaved documents, activations made again in the backward.

The peer is the same model with torch's attention over padded rows and torch's losses. The oracle
takes every document alone, in the next wider type.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from moca.config import CptConfig
from moca.data.encode import Encoded
from moca.data.images import ImageSettings
from moca.data.packing import pack
from moca.model import MocaModel
from moca.pretrain import MaskedBatch, mask_batch
from moca.run import seeded
from torch import Tensor

from benchmarks import steps
from benchmarks.harness import Cost, Expected, Runner, Target, Work
from benchmarks.qwen import QWEN_3B, TINY, Shape, build, special_ids
from benchmarks.steps import Step, on_backend

IMAGES = ImageSettings()  # of Qwen2.5-VL
# What no text token is: special tokens have the first ids of the little tokenizer.
FIRST_WORD = 300


@dataclass(frozen=True, kw_only=True)
class CptStep(Work):
    """Documents of `shortest` to `longest` tokens, a third of them those of images of `side` by
    `side` patches, up to `tokens` in all."""

    shape: Shape
    tokens: int
    shortest: int
    longest: int
    side: int

    @property
    def title(self) -> str:
        return f"cpt {self.shape.name} T {self.tokens}"

    def leaves(self, device: str) -> tuple[Tensor, ...]:
        return ()

    def documents(self) -> Iterator[Encoded]:
        generator, numbers = random.Random(0), np.random.default_rng(0)
        room = self.tokens
        while room >= self.shortest:
            length = min(room, generator.randint(self.shortest, self.longest))
            if room - length < self.shortest:
                length = room
            room -= length
            yield self.document(length, numbers)

    def document(self, length: int, numbers: np.random.Generator) -> Encoded:
        """Words, with images in between that take a third of the length or what fits."""
        start, image, end = special_ids()
        size = self.side**2 // IMAGES.merge_size**2 + 2
        count = length // (3 * size)
        ids = numbers.integers(FIRST_WORD, self.shape.vocabulary, length)
        for place in range(count):
            first = place * (length // count)
            ids[first : first + size] = image
            ids[first], ids[first + size - 1] = start, end
        patches = numbers.standard_normal((count * self.side**2, IMAGES.patch_dim), np.float32)
        grids = np.tile(np.array([[1, self.side, self.side]]), (count, 1))
        return Encoded(ids, patches, grids)

    def masked_batch(self, model: MocaModel) -> MaskedBatch:
        config = self.config()
        return mask_batch(
            pack(list(self.documents()), IMAGES.merge_size, special_ids()[1]),
            special_ids=torch.arange(FIRST_WORD),
            mask_token_id=model.mask_token_id,
            merge_size=IMAGES.merge_size,
            mlm_probability=config.mlm_probability,
            mae_probability=config.mae_probability,
            generator=seeded(0),
        )

    def config(self) -> CptConfig:
        return CptConfig(model="-", output="-", documents=["-"])

    def cost(self) -> Cost:
        """Products and attention, forward once and backward twice; what checkpointing makes again
        does not count."""
        documents = list(self.documents())
        lengths = [len(document) for document in documents]
        images = sum(len(document.grids) for document in documents)
        config = self.config()
        words = self.tokens - images * (self.side**2 // IMAGES.merge_size**2 + 2)
        flops = self.shape.flops(
            lengths,
            [self.side**2] * images,
            counted=round(config.mlm_probability * words),
            hidden=round(config.mae_probability * images * self.side**2 / IMAGES.merge_size**2),
            patch_dim=IMAGES.patch_dim,
        )
        return Cost(flops, 0, self.tokens)

    def expected(self, device: str) -> list[Expected]:
        rough = partial(rows, self, (), torch.empty(0, device=device), chunks=None)
        # Exact enough, and at full size float64 would not fit.
        exact = partial(rough, dtype=torch.float64 if self.dtype == "float32" else torch.float32)
        return steps.expected(rough, exact, self.torch_dtype)


def moca(work: CptStep, leaves: tuple, d_out: Tensor, backend: str) -> Step:
    model = build(work.shape, "moca_fast", d_out.device, work.torch_dtype)
    step = steps.cpt(work, model, work.masked_batch(model), work.config())
    return on_backend(step, backend)


def rows(
    work: CptStep,
    leaves: tuple,
    d_out: Tensor,
    chunks: int | None,
    dtype: torch.dtype | None = None,
) -> Step:
    """Padded rows in `chunks` parts; None takes every document alone.

    Args:
        dtype: of the weights, which hold the same numbers in any; None for that of the work.
    """
    model = build(work.shape, "sdpa", d_out.device, work.torch_dtype)
    if dtype is not None:
        model.to(dtype)
    return steps.cpt_rows(work, model, work.masked_batch(model), work.config(), chunks)


PEERS: list[Any] = [
    Runner("torch", partial(rows, chunks=1), yardstick=True),
    Runner("torch sorted", partial(rows, chunks=4)),
]
_STEP = CptStep(
    shape=QWEN_3B,
    tokens=16384,
    shortest=200,
    longest=4000,
    side=32,
    dtype="bfloat16",
    targets=(Target(2),),
)
WORKS = {
    "tiny": [CptStep(shape=TINY, tokens=200, shortest=20, longest=90, side=4)],
    "gpu": [_STEP],
}


def bench_cpt_step(measured, work, runner):
    measured(work, runner)
