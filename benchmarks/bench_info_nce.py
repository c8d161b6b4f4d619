"""info_nce: the cross entropy of each query's own document among all documents.

B queries, M documents, D dim.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import moca_fast
from benchmarks.harness import BEST, Call, Cost, Runner, Target, Work

TEMPERATURE = 0.05
ORACLE_ROWS = 2048  # at a time, made again in the backward: all scores would not fit


@dataclass(frozen=True, kw_only=True)
class InfoNCE(Work):
    queries: int
    documents: int
    dim: int

    @property
    def title(self) -> str:
        return f"info_nce B {self.queries} M {self.documents} D {self.dim}"

    def cost(self) -> Cost:
        # One product of queries and documents; backward has two, for the gradients of both.
        product = 2 * self.queries * self.documents * self.dim
        numbers = (self.queries + self.documents) * self.dim * self.torch_dtype.itemsize
        return Cost(3 * product, 3 * numbers) if self.backward else Cost(product, numbers)

    def avoided(self) -> int:
        return self.queries * self.documents * self.torch_dtype.itemsize

    def leaves(self, device: str) -> tuple[Tensor, ...]:
        rows = self.randn(self.queries + self.documents, self.dim, device=device)
        return F.normalize(rows, dim=1).split([self.queries, self.documents])

    def plain(self, query: Tensor, document: Tensor) -> Tensor:
        target = torch.arange(len(query), device=query.device)
        if len(query) <= ORACLE_ROWS:
            return _matmul(query, document, target) / len(query)
        # Gradients of documents add up in float32 or better, whatever the number of parts.
        wide = document.to(torch.promote_types(document.dtype, torch.float32))
        parts = zip(query.split(ORACLE_ROWS), target.split(ORACLE_ROWS), strict=True)
        sums = [checkpoint(_matmul, rows, wide, some, use_reentrant=False) for rows, some in parts]
        return torch.stack(sums).sum() / len(query)


def _matmul(query: Tensor, document: Tensor, target: Tensor) -> Tensor:
    """The sum of the losses, from all scores."""
    scores = query @ document.to(query.dtype).T / TEMPERATURE
    return F.cross_entropy(scores, target, reduction="sum")


def moca(work: InfoNCE, leaves: tuple[Tensor, ...], d_out: Tensor, backend: str) -> Call:
    def function(query: Tensor, document: Tensor) -> Tensor:
        return moca_fast.info_nce(query, document, temperature=TEMPERATURE, backend=backend)

    return Call(function, leaves, d_out)


def matmul_cross_entropy(work: InfoNCE, leaves: tuple[Tensor, ...], d_out: Tensor) -> Call:
    def function(query: Tensor, document: Tensor) -> Tensor:
        target = torch.arange(len(query), device=query.device)
        return F.cross_entropy(query @ document.T / TEMPERATURE, target)

    return Call(function, leaves, d_out)


def compiled(work: InfoNCE, leaves: tuple[Tensor, ...], d_out: Tensor) -> Call:
    call = matmul_cross_entropy(work, leaves, d_out)
    call.function = torch.compile(call.function, dynamic=False)
    return call


def sentence_transformers(work: InfoNCE, leaves: tuple[Tensor, ...], d_out: Tensor) -> Call:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    loss = MultipleNegativesRankingLoss(NO_MODEL, 1 / TEMPERATURE, _products)
    labels = torch.empty(0)  # not read

    def function(query: Tensor, document: Tensor) -> Tensor:
        columns = document.split(len(query))  # the positives, then columns of hard negatives
        return loss.compute_loss_from_embeddings([query, *columns], labels)

    return Call(function, leaves, d_out)


class CachedLoss(Call):
    """A loss that differentiates its parts itself, one after another."""

    def run(self) -> tuple[Tensor, ...]:
        leaves = [leaf.detach().requires_grad_(self.backward) for leaf in self.leaves]
        loss: Any = self.function(*leaves)
        return (loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None))


def cached_sentence_transformers(
    work: InfoNCE, leaves: tuple[Tensor, ...], d_out: Tensor
) -> CachedLoss:
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss,
    )

    rows = min(CACHED_ROWS, work.queries)
    loss = CachedMultipleNegativesRankingLoss(
        NO_MODEL, 1 / TEMPERATURE, _products, mini_batch_size=rows
    )

    def function(query: Tensor, document: Tensor) -> Tensor:
        columns = document.split(len(query))
        return loss.calculate_loss([[query], *([c] for c in columns)], with_backward=work.backward)

    return CachedLoss(function, leaves, d_out)


def inf_cl(work: InfoNCE, leaves: tuple[Tensor, ...], d_out: Tensor) -> Call:
    from inf_cl import cal_flash_loss

    def function(query: Tensor, document: Tensor) -> Tensor:
        return cal_flash_loss(query / TEMPERATURE, document).mean()

    return Call(function, leaves, d_out)


def _products(a: Tensor, b: Tensor) -> Tensor:
    return a @ b.T


# These losses are given embeddings; they need no model.
NO_MODEL: Any = torch.nn.Sequential(torch.nn.Identity())
CACHED_ROWS = 1024  # of the scores at a time, in the cached loss

PEERS = [
    Runner("torch", matmul_cross_entropy, yardstick=True),
    Runner("torch.compile", compiled, devices=("cuda",)),
    Runner("sentence-transformers", sentence_transformers, package="sentence_transformers"),
    Runner(
        "sentence-transformers cached",
        cached_sentence_transformers,
        package="sentence_transformers",
    ),
    Runner("Inf-CL", inf_cl, package="inf_cl", devices=("cuda",)),
]
WORKS = {
    "tiny": [InfoNCE(queries=16, documents=32, dim=24)],
    "full": [
        InfoNCE(queries=4096, documents=8192, dim=1024, targets=(Target(1.4, memory=0.05),)),
        InfoNCE(
            queries=4096,
            documents=8192,
            dim=1024,
            dtype="bfloat16",
            targets=(Target(1.2, memory=0.05),),
        ),
        # A step of the quickstart.
        InfoNCE(queries=128, documents=128, dim=256),
        InfoNCE(queries=256, documents=256, dim=256),
    ],
    "gpu": [
        InfoNCE(
            queries=65536,
            documents=65536,
            dim=1024,
            dtype="bfloat16",
            # No more than 2 GB beside 8.6 GB of scores that are never held.
            targets=(Target(1.5, memory=2e9 / (2 * 65536**2), limit=0.6, over=BEST),),
        ),
        InfoNCE(queries=8192, documents=16384, dim=2048, dtype="bfloat16"),
    ],
}


def bench_info_nce(measured, work, runner):
    measured(work, runner)
