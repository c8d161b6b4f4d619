"""mrope: the multimodal rotary embedding of q and k, against transformers' function.

T tokens, H / Hkv heads, D dim of a head.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb

import moca_fast
from benchmarks.harness import BEST, Call, Cost, Runner, Target, Work

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Mrope(Work):
    tokens: int
    heads: int
    kv_heads: int
    dim: int

    @property
    def title(self) -> str:
        return f"mrope T {self.tokens} H {self.heads}/{self.kv_heads} D {self.dim}"

    def cost(self) -> Cost:
        # Each pass reads and writes q and k, and reads both tables: 3 operations an element.
        numbers = self.tokens * (self.heads + self.kv_heads) * self.dim
        passes = 2 if self.backward else 1
        moved = 2 * numbers + 2 * self.tokens * self.dim
        return Cost(3 * numbers * passes, moved * passes * self.torch_dtype.itemsize)

    def _pair(self, device: str, seed: int) -> Pair:
        q, k = (
            self.randn(self.tokens, heads, self.dim, device=device, seed=seed + place)
            for place, heads in enumerate((self.heads, self.kv_heads))
        )
        return q, k

    def leaves(self, device: str) -> Pair:
        return self._pair(device, seed=0)

    def d_out(self, device: str) -> Pair:
        return self._pair(device, seed=2)

    def tables(self, device: str) -> Pair:
        """cos and sin (T, D), merged, as the rotary modules of transformers make them."""
        frequency = 1e6 ** (-torch.arange(0, self.dim, 2, device=device) / self.dim)
        angle = torch.arange(self.tokens, device=device)[:, None] * frequency
        angle = torch.cat([angle, angle], dim=1)
        return angle.cos().to(self.torch_dtype), angle.sin().to(self.torch_dtype)

    def plain(self, q: Tensor, k: Tensor) -> Pair:
        cos, sin = (x.to(q.dtype)[:, None] for x in self.tables(q.device.type))

        def turned(x: Tensor) -> Tensor:
            first, second = x.chunk(2, dim=-1)
            return x * cos + torch.cat([-second, first], dim=-1) * sin

        return turned(q), turned(k)


def moca(work: Mrope, leaves: tuple[Tensor, ...], d_out: Pair, backend: str) -> Call:
    cos, sin = work.tables(leaves[0].device.type)
    return Call(lambda q, k: moca_fast.mrope(q, k, cos, sin, backend=backend), leaves, d_out)


def transformers(work: Mrope, leaves: tuple[Tensor, ...], d_out: Pair) -> Call:
    """As the models call it, on one row whose heads come before its tokens."""
    cos, sin = (table[None] for table in work.tables(leaves[0].device.type))

    def function(q: Tensor, k: Tensor) -> Pair:
        rows = (x.transpose(0, 1)[None] for x in (q, k))
        q, k = apply_rotary_pos_emb(*rows, cos, sin)
        return q[0].transpose(0, 1), k[0].transpose(0, 1)

    return Call(function, leaves, d_out)


def compiled(work: Mrope, leaves: tuple[Tensor, ...], d_out: Pair) -> Call:
    eager = transformers(work, leaves, d_out)
    return Call(torch.compile(eager.function, fullgraph=True), leaves, d_out)


PEERS = [
    Runner("transformers", transformers, yardstick=True),
    Runner("torch.compile", compiled, devices=("cuda",)),
]
# The text tower of Qwen2.5-VL-7B.
SEVEN_B = Mrope(tokens=32768, heads=28, kv_heads=4, dim=128, dtype="bfloat16")
WORKS = {
    "tiny": [Mrope(tokens=50, heads=3, kv_heads=1, dim=16)],
    "full": [
        replace(SEVEN_B, tokens=8192, dtype="float32", targets=(Target(1),)),
        replace(SEVEN_B, targets=(Target(1),)),
    ],
    "gpu": [
        replace(SEVEN_B, backward=backward, targets=(Target(1, limit=0.85, over=BEST),))
        for backward in (False, True)
    ],
}


def bench_mrope(measured, work, runner):
    measured(work, runner)
