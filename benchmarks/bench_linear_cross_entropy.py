"""linear_cross_entropy: the head of masked language modelling and its loss, on counted rows.

T tokens, D dim, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import moca_fast
from benchmarks.harness import BEST, Call, Cost, Runner, Target, Work

IGNORED = -100
COUNTED = 0.4  # of the tokens: how many MoCa masks
ORACLE_ROWS = 128  # in float64 at a time, made again in the backward: all logits would not fit


@dataclass(frozen=True, kw_only=True)
class LinearCrossEntropy(Work):
    tokens: int
    dim: int
    vocabulary: int

    @property
    def title(self) -> str:
        return f"linear_cross_entropy T {self.tokens} D {self.dim} V {self.vocabulary}"

    def cost(self) -> Cost:
        # The product on counted rows; backward has two, for the gradients of states and weight.
        product = 2 * self.counted * self.dim * self.vocabulary
        numbers = (self.counted + self.vocabulary) * self.dim * self.torch_dtype.itemsize
        return Cost(3 * product, 3 * numbers) if self.backward else Cost(product, numbers)

    def avoided(self) -> int:
        return self.counted * self.vocabulary * self.torch_dtype.itemsize

    @property
    def counted(self) -> int:
        return round(COUNTED * self.tokens)

    def leaves(self, device: str) -> tuple[Tensor, ...]:
        hidden = self.randn(self.tokens, self.dim, device=device)
        weight = self.randn(self.vocabulary, self.dim, device=device, seed=1)
        return hidden, weight.mul_(self.dim**-0.5)

    def labels(self, device: str) -> Tensor:
        generator = torch.Generator().manual_seed(2)
        labels = torch.randint(self.vocabulary, (self.tokens,), generator=generator)
        labels[torch.randperm(self.tokens, generator=generator)[self.counted :]] = IGNORED
        return labels.to(device)

    def plain(self, hidden: Tensor, weight: Tensor) -> Tensor:
        labels = self.labels(hidden.device.type)
        keep = labels != IGNORED
        if hidden.dtype != torch.float64:
            return F.cross_entropy(F.linear(hidden[keep], weight), labels[keep])

        def total(rows: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(F.linear(rows, weight), labels, reduction="sum")

        parts = zip(hidden[keep].split(ORACLE_ROWS), labels[keep].split(ORACLE_ROWS), strict=True)
        sums = [checkpoint(total, rows, weight, some, use_reentrant=False) for rows, some in parts]
        return torch.stack(sums).sum() / self.counted


def moca(work: LinearCrossEntropy, leaves: tuple[Tensor, ...], d_out: Tensor, backend: str) -> Call:
    labels = work.labels(d_out.device.type)

    def function(hidden: Tensor, weight: Tensor) -> Tensor:
        return moca_fast.linear_cross_entropy(hidden, weight, labels, backend=backend)

    return Call(function, leaves, d_out)


def counted_rows(work: LinearCrossEntropy, leaves: tuple[Tensor, ...], d_out: Tensor) -> Call:
    labels = work.labels(d_out.device.type)

    def function(hidden: Tensor, weight: Tensor) -> Tensor:
        keep = labels != IGNORED
        return F.cross_entropy(F.linear(hidden[keep], weight), labels[keep])

    return Call(function, leaves, d_out)


def liger(work: LinearCrossEntropy, leaves: tuple[Tensor, ...], d_out: Tensor) -> Call:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    labels, loss = work.labels(d_out.device.type), LigerFusedLinearCrossEntropyLoss()
    return Call(lambda hidden, weight: loss(weight, hidden, labels), leaves, d_out)


def cut_cross_entropy(work: LinearCrossEntropy, leaves: tuple[Tensor, ...], d_out: Tensor) -> Call:
    import cut_cross_entropy

    labels = work.labels(d_out.device.type)
    impl = "cce" if d_out.is_cuda else "torch_compile"

    def function(hidden: Tensor, weight: Tensor) -> Tensor:
        return cut_cross_entropy.linear_cross_entropy(hidden, weight, labels, impl=impl)

    return Call(function, leaves, d_out)


PEERS = [
    Runner("torch", counted_rows, yardstick=True),
    Runner("liger-kernel", liger, package="liger_kernel", devices=("cuda",)),
    Runner("cut-cross-entropy", cut_cross_entropy, package="cut_cross_entropy"),
]
WORKS = {
    "tiny": [LinearCrossEntropy(tokens=40, dim=24, vocabulary=301)],
    "full": [
        LinearCrossEntropy(
            tokens=2048, dim=1024, vocabulary=151936, targets=(Target(1.3, memory=0.1),)
        ),
        LinearCrossEntropy(
            tokens=2048,
            dim=1024,
            vocabulary=151936,
            dtype="bfloat16",
            targets=(Target(1, memory=0.1),),
        ),
        # A step of the quickstart.
        LinearCrossEntropy(tokens=4096, dim=256, vocabulary=8192, dtype="bfloat16"),
    ],
    "gpu": [
        LinearCrossEntropy(
            tokens=8192,
            dim=dim,
            vocabulary=151936,
            dtype="bfloat16",
            # The three products of the counted rows at the rate of torch's GEMM are the limit.
            targets=(Target(1, limit=0.8, over=BEST),),
        )
        for dim in (2048, 4096)
    ],
}


def bench_linear_cross_entropy(measured, work, runner):
    measured(work, runner)
