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
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import moca_fast
from benchmarks import peers_attention
from benchmarks.harness import BEST, OURS, Call, Cost, Target, Work
from benchmarks.peers_attention import SDPA, SDPA_CUDNN, VARLEN
from moca_fast import SpanMask
from moca_fast.ops.attention.op import TILE_ROWS, plan

MOST_CHECKED = 2e12  # operations, of a work that is checked on all heads
ORACLE_SCORES = 1 << 28  # in float64 at a time, made again in the backward


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
        flops = traffic = 0
        if self.forward:  # reads q, k, v; writes out
            flops, traffic = 4 * pairs * self.dim, 2 * queries + 2 * keys
        if self.backward:  # reads q, k, v, out and its gradient; writes those of q, k, v
            flops, traffic = flops + 10 * pairs * self.dim, traffic + 4 * queries + 4 * keys
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

    def checked(self, leaf: int | None, tensor: Tensor) -> Tensor:
        """Where all would take too long, the first and the last head of the keys, with the queries
        that share them."""
        kv_heads = self.kv_heads or self.heads
        if self.cost().flops <= MOST_CHECKED or kv_heads <= 2:
            return tensor
        heads = torch.tensor([0, kv_heads - 1], device=tensor.device)
        if not leaf:  # the result and q
            group = self.heads // kv_heads
            heads = (heads[:, None] * group + torch.arange(group, device=tensor.device)).flatten()
        return tensor[:, heads]

    def plain(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs, group = [], q.shape[1] // k.shape[1]
        for parts in zip(*(x.split(self.lengths) for x in (q, k, v)), strict=True):
            queries, keys, values = (x.transpose(0, 1) for x in parts)
            keys, values = (x.repeat_interleave(group, 0) for x in (keys, values))
            rows = queries.shape[1]
            if q.dtype == torch.float64:
                rows = max(1, ORACLE_SCORES // keys.shape[:2].numel())
            if rows >= queries.shape[1]:
                out = _attend(queries, keys, values)
            else:
                out = torch.cat([
                    checkpoint(_attend, some, keys, values, use_reentrant=False)
                    for some in queries.split(rows, dim=1)
                ], dim=1)  # fmt: skip
            outs.append(out.transpose(0, 1))
        return torch.cat(outs)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(H, S, D) of one document."""
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(1, 2)
    return scores.softmax(-1) @ v


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
            yield replace(dense, backward=False, targets=(Target(forward),))
            yield replace(dense, targets=(Target(both),))
    yield replace(IMAGES, backward=False, targets=(Target(3),))
    yield IMAGES
    yield replace(DENSE, kv_heads=2, backward=False, targets=(Target(3.5),))
    for backward in (False, True):
        yield replace(SHORT, backward=backward, targets=(Target(8),))
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


def _gpu() -> Iterator[Attention]:
    # Two heads of 128 dims for the keys of 16: the text tower of Qwen2.5-VL-3B.
    text = replace(DENSE, kv_heads=2)
    cpt = replace(text, what="CPT mix, 16 documents of 200-4000", lengths=mix(16, 200, 4000))
    short = replace(text, what="2048 documents of 16-256", lengths=mix(2048, 16, 256))
    images = replace(IMAGES, what="64 images of 1024", lengths=(1024,) * 64)
    yield replace(cpt, targets=(Target(2, over=SDPA), Target(1.1, over=VARLEN)))
    yield replace(short, targets=(Target(1.5, over=BEST),))
    yield replace(images, targets=(Target(1.15, over=BEST),))
    for tokens in (4096, 8192, 16384):
        dense = replace(DENSE, what=f"S {tokens}", lengths=(tokens,), heads=64, kv_heads=8)
        yield replace(dense, backward=False, targets=_over_cudnn(0.75, 0.95))
        yield replace(dense, forward=False, targets=_over_cudnn(0.75, 0.9))


def _over_cudnn(triton: float, cuda: float) -> tuple[Target, ...]:
    return (
        Target(triton, over=SDPA_CUDNN, runner=f"{OURS}[triton]"),
        Target(cuda, over=SDPA_CUDNN, runner=f"{OURS}[cuda]"),
    )


PEERS = peers_attention.PEERS
WORKS = {
    "tiny": [
        Attention(what="9 documents", lengths=mix(9, 1, 40), heads=4, kv_heads=2, dim=24),
        Attention(
            what="one", lengths=(70,), heads=2, dim=16, dtype="bfloat16", axis=("tokens", 70)
        ),
    ],
    "full": list(_full()),
    "gpu": list(_gpu()),
}


def bench_attention(measured, work, runner):
    measured(work, runner)
