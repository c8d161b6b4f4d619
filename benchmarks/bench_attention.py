"""attention over packed documents, against torch's scaled_dot_product_attention.

B documents of up to S tokens, T packed tokens, H / Hkv heads, D dim of a head.
"""

import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

import moca_fast
from benchmarks.harness import Call, Cost, Runner, Target, Work
from moca_fast import SpanMask
from moca_fast.ops.attention.op import TILE_ROWS, plan


@dataclass(frozen=True, kw_only=True)
class Attention(Work):
    """Bidirectional attention inside each document: `what` they are, and their lengths."""

    what: str
    lengths: tuple[int, ...]
    heads: int
    dim: int
    kv_heads: int | None = None  # as many as `heads`

    @property
    def title(self) -> str:
        heads = f"{self.heads}/{self.kv_heads}" if self.kv_heads else f"{self.heads}"
        return f"attention {self.what} H {heads} D {self.dim}"

    def cost(self) -> Cost:
        # Two products in the forward; backward makes the scores again and has four more.
        pairs = sum(length**2 for length in self.lengths) * self.heads
        queries = sum(self.lengths) * self.heads * self.dim * self.torch_dtype.itemsize
        keys = queries * (self.kv_heads or self.heads) // self.heads
        flops, traffic = 4 * pairs * self.dim, 2 * queries + 2 * keys  # reads q, k, v; writes out
        if self.backward:  # reads q, k, v, out and its gradient; writes those of q, k, v
            flops, traffic = flops * 7 // 2, traffic + 4 * queries + 4 * keys
        return Cost(flops, traffic)

    def leaves(self, device: str) -> tuple[Tensor, ...]:
        tokens = sum(self.lengths)
        heads = (self.heads, *[self.kv_heads or self.heads] * 2)
        return tuple(
            self.randn(tokens, count, self.dim, device=device, seed=seed)
            for seed, count in enumerate(heads)
        )

    def d_out(self, device: str) -> Tensor:
        return self.randn(sum(self.lengths), self.heads, self.dim, device=device, seed=3)

    def plain(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs, group = [], self.heads // k.shape[1]
        for parts in zip(*(x.split(self.lengths) for x in (q, k, v)), strict=True):
            queries, keys, values = (x.transpose(0, 1) for x in parts)
            keys, values = (x.repeat_interleave(group, 0) for x in (keys, values))
            scores = queries * self.dim**-0.5 @ keys.transpose(1, 2)
            outs.append((scores.softmax(-1) @ values).transpose(0, 1))
        return torch.cat(outs)


def moca(work: Attention, leaves: tuple[Tensor, ...], d_out: Tensor, backend: str) -> Call:
    """The mask and its plan are made once a batch and shared by all layers: outside the time."""
    cu_seqlens = torch.tensor([0, *work.lengths]).cumsum(0).int().to(d_out.device)
    began = time.perf_counter()
    mask = SpanMask.full(cu_seqlens, sum(work.lengths))
    plan(mask)
    info = {
        "plan_seconds": time.perf_counter() - began,
        "tile_efficiency": mask.tile_efficiency(TILE_ROWS[mask.device.type]),
    }

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return cast(Tensor, moca_fast.attention(q, k, v, mask, backend=backend))

    return Call(function, leaves, d_out, info=info)


def sdpa(work: Attention, leaves: tuple[Tensor, ...], d_out: Tensor) -> Call:
    """Documents as rows of a batch (B, H, S, D), padded and masked if their lengths differ."""
    longest = max(work.lengths)
    lengths = torch.tensor(work.lengths, device=d_out.device)
    real = torch.arange(longest, device=d_out.device) < lengths[:, None]  # (B, S)
    mask = None if real.all() else real[:, None, None]

    def pad(x: Tensor) -> Tensor:
        padded = x.new_zeros(*real.shape, *x.shape[1:])
        padded[real] = x
        return padded.transpose(1, 2).contiguous()

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = work.kv_heads is not None
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)

    padded = [pad(leaf) for leaf in leaves]
    return Call(function, padded, pad(d_out), undo=lambda x: x.transpose(1, 2)[real])


def mix(count: int, shortest: int, longest: int) -> tuple[int, ...]:
    """Lengths drawn evenly from shortest to longest."""
    generator = random.Random(0)
    return tuple(generator.randint(shortest, longest) for _ in range(count))


DENSE = Attention(what="S 2048", lengths=(2048,), heads=16, dim=128, dtype="bfloat16")
IMAGES = replace(DENSE, what="8 images of 1024", lengths=(1024,) * 8, dim=80)
SHORT = replace(DENSE, what="512 documents of 8-200", lengths=mix(512, 8, 200), dim=64)
QUICKSTART = (  # of a batch: pieces of the manual, glosses, and the vision tower's images
    replace(SHORT, what="128 documents of 20-128", lengths=mix(128, 20, 128), heads=4),
    replace(SHORT, what="256 documents of 3-30", lengths=mix(256, 3, 30), heads=4),
    replace(SHORT, what="128 images of 64", lengths=(64,) * 128, heads=6, dim=32),
)


def _full() -> Iterator[Attention]:
    for dim in (64, 128):
        for dtype, forward, both in (("bfloat16", 3.5, 2.5), ("float32", 1.9, 1.7)):
            dense = replace(DENSE, dim=dim, dtype=dtype)
            yield replace(dense, backward=False, target=Target(forward))
            yield replace(dense, target=Target(both))
    yield replace(IMAGES, backward=False, target=Target(3))
    yield IMAGES
    yield replace(DENSE, kv_heads=2, backward=False, target=Target(3.5))
    for backward in (False, True):
        yield replace(SHORT, backward=backward, target=Target(8))
        for work in QUICKSTART:
            yield replace(work, backward=backward)
    yield from _scaling()


def _scaling() -> Iterator[Attention]:
    """The points of the scaling plot: (what grows, its value, lengths, threads)."""
    points: list[tuple[str, int, tuple[int, ...], int | None]] = []
    points += [("tokens", 2**power, (2**power,), None) for power in range(7, 13)]
    points += [("documents", 4**power, (16384 // 4**power,) * 4**power, None) for power in range(6)]
    cores = len(os.sched_getaffinity(0))
    counts = sorted({min(2**power, cores) for power in range(cores.bit_length() + 1)})
    points += [("threads", count, (2048,), count) for count in counts]
    forward = replace(DENSE, heads=8, dim=64, backward=False)
    for axis, value, lengths, threads in points:
        what, place = f"{axis} {value}", (axis, value)
        yield replace(forward, what=what, lengths=lengths, threads=threads, axis=place)


PEERS = [Runner("torch", sdpa, yardstick=True)]
WORKS = {
    "tiny": [
        Attention(what="9 documents", lengths=mix(9, 1, 40), heads=4, kv_heads=2, dim=24),
        Attention(
            what="one", lengths=(70,), heads=2, dim=16, dtype="bfloat16", axis=("tokens", 70)
        ),
    ],
    "full": list(_full()),
}


def bench_attention(measured, work, runner):
    measured(work, runner)
