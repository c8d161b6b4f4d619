"""pool: the mean of each document's token states, brought to unit length.

T packed tokens, D dim, B documents.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import moca_fast
from benchmarks.harness import Call, Cost, Runner, Target, Work


@dataclass(frozen=True, kw_only=True)
class Pool(Work):
    tokens: int
    dim: int
    documents: int

    @property
    def title(self) -> str:
        return f"pool T {self.tokens} D {self.dim} B {self.documents}"

    def cost(self) -> Cost:
        # The states are read and their gradient is written; the vectors are small beside them.
        numbers = self.tokens * self.dim
        passes = 2 if self.backward else 1
        return Cost(numbers * passes, numbers * passes * self.torch_dtype.itemsize)

    def leaves(self, device: str) -> tuple[Tensor, ...]:
        return (self.randn(self.tokens, self.dim, device=device),)

    def d_out(self, device: str) -> Tensor:
        return self.randn(self.documents, self.dim, device=device, seed=1)

    def cu_seqlens(self, device: str) -> Tensor:
        """Documents of random lengths of at least one token."""
        generator = torch.Generator().manual_seed(2)
        cuts = torch.randperm(self.tokens - 1, generator=generator)[: self.documents - 1] + 1
        bounds = torch.cat([torch.tensor([0]), cuts.sort().values, torch.tensor([self.tokens])])
        return bounds.to(device, torch.int32)

    def plain(self, hidden: Tensor) -> Tensor:
        lengths = self.cu_seqlens("cpu").diff().tolist()
        means = torch.stack([document.mean(dim=0) for document in hidden.split(lengths)])
        return F.normalize(means, dim=1)


def moca(work: Pool, leaves: tuple[Tensor, ...], d_out: Tensor, backend: str) -> Call:
    cu_seqlens = work.cu_seqlens(d_out.device.type)
    return Call(lambda hidden: moca_fast.pool(hidden, cu_seqlens, backend=backend), leaves, d_out)


def segment_mean(work: Pool, leaves: tuple[Tensor, ...], d_out: Tensor) -> Call:
    lengths = work.cu_seqlens(d_out.device.type).diff().long()

    def function(hidden: Tensor) -> Tensor:
        return F.normalize(torch.segment_reduce(hidden, "mean", lengths=lengths), dim=1)

    return Call(function, leaves, d_out)


def index_add(work: Pool, leaves: tuple[Tensor, ...], d_out: Tensor) -> Call:
    lengths = work.cu_seqlens(d_out.device.type).diff().long()
    document = torch.repeat_interleave(lengths)

    def function(hidden: Tensor) -> Tensor:
        total = hidden.new_zeros(work.documents, work.dim).index_add(0, document, hidden)
        return F.normalize(total / lengths[:, None], dim=1)

    return Call(function, leaves, d_out)


def compiled(work: Pool, leaves: tuple[Tensor, ...], d_out: Tensor) -> Call:
    call = index_add(work, leaves, d_out)
    call.function = torch.compile(call.function, dynamic=False)
    return call


PEERS = [
    Runner("torch", segment_mean, yardstick=True),
    Runner("torch index_add", index_add),
    Runner("torch.compile", compiled, devices=("cuda",)),
]
WORKS = {
    "tiny": [Pool(tokens=200, dim=24, documents=9)],
    "full": [
        Pool(tokens=65536, dim=2048, documents=1024, dtype=dtype, targets=(Target(3),))
        for dtype in ("float32", "bfloat16")
    ],
    "gpu": [
        Pool(
            tokens=32768,
            dim=3584,
            documents=256,
            dtype="bfloat16",
            backward=backward,
            targets=(Target(limit=0.85),),
        )
        for backward in (False, True)
    ],
}


def bench_pool(measured, work, runner):
    measured(work, runner)
