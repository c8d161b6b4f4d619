"""attention in Triton: FlashAttention (arXiv 2205.14135) over one interval of keys for each query.

`forward` is one kernel, `backward` three: terms of each row, d_q, then d_k and d_v. All follow the
tile plan of the mask, which holds the longest tiles first.

Weights are 0, not absent, where a document shares a block of keys or queries with another: NaN or
infinity in one reaches the other's rows there, as 0 * NaN is NaN; in the forward from v alone.

T query tokens, K key tokens, H query heads, Hkv key-value heads, D dim of a head.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.runtime import driver

from moca_triton.attention_backward import keys_kernel, queries_kernel, rows_kernel
from moca_triton.attention_forward import forward_kernel
from moca_triton.attention_tiles import UNIT, pieces
from moca_triton.device import INTERPRETED, unsupported_tensors

TERM_ROWS = 64  # rows of a program that makes the terms of each row


@dataclass(frozen=True)
class Blocks:
    """How a kernel cuts its work: rows of a tile taken at a time, columns of the other side, warps
    of a program, and how many blocks of columns are loaded at once."""

    rows: int
    columns: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Launch:
    """The blocks of the three kernels that walk tiles."""

    forward: Blocks
    queries: Blocks
    keys: Blocks


def launch(arch: int, dim: int, itemsize: int) -> Launch:
    """What suits a GPU of compute capability arch / 10, heads of `dim` and numbers of `itemsize`.

    Chosen by shared memory (227 KB a program from 9.0, 163 KB on 8.0, else 99 KB) and so that sums
    stay in the 255 registers of a thread; no measurement stands behind it yet.
    """
    if itemsize == 4:  # multiplied outside the matrix units, from registers that hold whole rows
        side = 32 if dim <= 96 else 16
        return Launch(*[Blocks(side, side, 4, 1)] * 3)
    wide = dim > 128
    if 90 <= arch < 120:
        if wide:
            return Launch(Blocks(128, 64, 8, 2), Blocks(64, 64, 8, 1), Blocks(64, 32, 8, 1))
        return Launch(Blocks(128, 128, 8, 2), Blocks(128, 64, 8, 2), Blocks(128, 64, 8, 2))
    if arch == 80:
        if wide:
            return Launch(Blocks(64, 32, 8, 2), Blocks(64, 32, 8, 1), Blocks(64, 32, 8, 1))
        return Launch(Blocks(128, 64, 8, 2), Blocks(64, 64, 8, 2), Blocks(64, 64, 8, 2))
    if wide:
        return Launch(Blocks(64, 32, 8, 1), Blocks(64, 16, 8, 1), Blocks(32, 16, 8, 1))
    return Launch(Blocks(64, 32, 4, 2), Blocks(64, 32, 4, 1), Blocks(64, 32, 8, 1))


def unsupported(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    return unsupported_tensors(q, k, v)


def forward(
    q: Tensor, k: Tensor, v: Tensor, plan: list[Tensor], softmax_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    q, softmax_scale = _rising(q, softmax_scale)
    q, k, v = _rows(q), _rows(k), _rows(v)
    start, end, tiles = plan[:3]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    lse_rest = torch.empty_like(lse)
    programs, shape = _programs(tiles), _shape(q, k)
    forward_kernel[(programs * q.shape[1],)](
        q, k, v, start, end, tiles, out, lse, lse_rest, *_strides(q, k, v), **shape,
        num_tiles=tiles.shape[0], programs=programs, num_keys=k.shape[0],
        scale=softmax_scale * math.log2(math.e), **_tuning(_launch(q).forward),
    )  # fmt: skip
    return out, lse, lse_rest


def backward(
    d_out: Tensor,
    d_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lse_rest: Tensor,
    plan: list[Tensor],
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    # Every number is summed by one program in a fixed order.
    given_scale = softmax_scale
    q, softmax_scale = _rising(q, softmax_scale)
    q, k, v, d_out = _rows(q), _rows(k), _rows(v), d_out.contiguous()
    d_lse = d_lse.to(torch.float32).contiguous()
    start, end, tiles, key_start, key_end, key_tiles = plan
    d_q, d_k, d_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    queries, heads, _ = q.shape
    precise = torch.float64 if q.dtype == torch.float32 else torch.float32
    lse2 = torch.empty(heads, queries, dtype=precise, device=q.device)
    delta = torch.empty(heads, queries, dtype=torch.float32, device=q.device)
    strides, shape = _strides(q, k, v), _shape(q, k)
    scales = {"scale": softmax_scale * math.log2(math.e), "softmax_scale": softmax_scale}
    blocks = _launch(q)
    first, second = pieces(q.shape[2])
    rows_kernel[(-(-queries // TERM_ROWS), heads)](
        out, d_out, lse, lse_rest, d_lse, start, end, lse2, delta,
        size=queries, heads=heads, D=q.shape[2], D1=first, D2=second, ROWS=TERM_ROWS,
    )  # fmt: skip
    programs = _programs(tiles)
    queries_kernel[(programs * heads,)](
        q, k, v, d_out, lse2, delta, start, end, tiles, d_q, *strides, **shape,
        num_tiles=tiles.shape[0], programs=programs, num_queries=queries,
        num_keys=k.shape[0], **scales, **_tuning(blocks.queries),
    )  # fmt: skip
    programs = _programs(key_tiles)
    keys_kernel[(programs * k.shape[1],)](
        q, k, v, d_out, lse2, delta, key_start, key_end, key_tiles, d_k, d_v,
        *strides, **shape, num_tiles=key_tiles.shape[0], programs=programs,
        num_queries=queries, **scales, **_tuning(blocks.keys),
    )  # fmt: skip
    return (-d_q if given_scale < 0 else d_q), d_k, d_v


def _rising(q: Tensor, softmax_scale: float) -> tuple[Tensor, float]:
    """The same scores by a scale of 0 or more, which the kernels need: they scale the largest."""
    return (-q, -softmax_scale) if softmax_scale < 0 else (q, softmax_scale)


def _rows(x: Tensor) -> Tensor:
    """The kernels take strides of tokens and heads that keep rows of D whole and 16-byte aligned.

    Strides of dims of size 1 mean nothing, and are left to the copy too where they do not fit.
    """
    whole = x.stride(2) == 1 and x.stride(0) % UNIT.value == 0 and x.stride(1) % UNIT.value == 0
    return x if whole and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def _strides(q: Tensor, k: Tensor, v: Tensor) -> list[int]:
    """Of tokens and heads of all three, in units."""
    return [x.stride(axis) // UNIT.value for x in (q, k, v) for axis in (0, 1)]


def _programs(tiles: Tensor) -> int:
    """Programs of a head, as many as there are tiles where all are full.

    A plan has room for three times as many, and only the device knows how many it uses. A program
    goes on to the next tile that nobody else takes, among the short ones at the plan's end.
    """
    return tiles.shape[0] // 3 + 1


def _shape(q: Tensor, k: Tensor) -> dict[str, int]:
    first, second = pieces(q.shape[2])
    group = q.shape[1] // k.shape[1]
    return {"heads": q.shape[1], "group": group, "D": q.shape[2], "D1": first, "D2": second}


def _tuning(blocks: Blocks) -> dict[str, int]:
    return {
        "ROWS": blocks.rows,
        "COLUMNS": blocks.columns,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }


def _launch(q: Tensor) -> Launch:
    if INTERPRETED:  # small blocks, so that small tests have many
        return Launch(*[Blocks(32, 32, 1, 1)] * 3)
    return launch(driver.active.get_current_target().arch, q.shape[2], q.element_size())
