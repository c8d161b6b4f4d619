"""info_nce: the cross entropy of each query's own document among all documents.

B queries, M documents, D dim.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import moca_fast
from benchmarks.harness import Call, Cost, Runner, Target, Work

TEMPERATURE = 0.05


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
        return F.cross_entropy(query @ document.T / TEMPERATURE, target)


def moca(work: InfoNCE, leaves: tuple[Tensor, ...], d_out: Tensor, backend: str) -> Call:
    def function(query: Tensor, document: Tensor) -> Tensor:
        return moca_fast.info_nce(query, document, temperature=TEMPERATURE, backend=backend)

    return Call(function, leaves, d_out)


def matmul_cross_entropy(work: InfoNCE, leaves: tuple[Tensor, ...], d_out: Tensor) -> Call:
    return Call(work.plain, leaves, d_out)


def sentence_transformers(work: InfoNCE, leaves: tuple[Tensor, ...], d_out: Tensor) -> Call:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    embedded: Any = torch.nn.Identity()  # the loss is given embeddings; it needs no model
    loss = MultipleNegativesRankingLoss(
        embedded,
        scale=1 / TEMPERATURE,
        similarity_fct=lambda a, b: a @ b.T,
    )

    labels = torch.empty(0)  # not read

    def function(query: Tensor, document: Tensor) -> Tensor:
        columns = document.split(len(query))  # the positives, then columns of hard negatives
        return loss.compute_loss_from_embeddings([query, *columns], labels)

    return Call(function, leaves, d_out)


PEERS = [
    Runner("torch", matmul_cross_entropy, yardstick=True),
    Runner("sentence-transformers", sentence_transformers, package="sentence_transformers"),
]
WORKS = {
    "tiny": [InfoNCE(queries=16, documents=32, dim=24)],
    "full": [
        InfoNCE(queries=4096, documents=8192, dim=1024, target=Target(1.4, memory=0.05)),
        InfoNCE(
            queries=4096,
            documents=8192,
            dim=1024,
            dtype="bfloat16",
            target=Target(1.2, memory=0.05),
        ),
        # A step of the quickstart.
        InfoNCE(queries=128, documents=128, dim=256),
        InfoNCE(queries=256, documents=256, dim=256),
    ],
}


def bench_info_nce(measured, work, runner):
    measured(work, runner)
