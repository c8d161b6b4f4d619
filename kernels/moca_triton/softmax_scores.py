"""Softmax cross entropy over scores x . w^T: the common part of linear_cross_entropy and info_nce.

Rows are taken in chunks. torch.mm (cuBLAS) writes the scores of a chunk, whole rows, into a buffer
of float32 that is bounded and used again; one kernel folds each row into its statistics; another
turns scores into their gradients where they lie, in the dtype of the inputs, as plain torch does;
torch.mm multiplies those with w and with x. The three products run at the library's rate, and a
score costs 14 more bytes of memory traffic than its products need. Sums, scores and probabilities
are float32 (products of float32 follow torch.set_float32_matmul_precision); every sum has a fixed
order, as long as cuBLAS keeps to it: CUBLAS_WORKSPACE_CONFIG for several streams.

N rows, C columns, D dim, K columns that only their own row has.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from moca_triton import softmax_kernels as kernels

ALIGN = 64  # rows of scores begin at multiples of it, so that odd C suits the tensor cores too
TILE_ROWS = 128  # rows of a tile of the products; chunks are whole tiles where they can be


@dataclass(frozen=True)
class Scores:
    """score(i, j) = (x[i] . w[j] + bias[j]) / temperature, or -inf where the ids of row and column
    agree and j is not the row's target. Columns C to C + K - 1 of a row are x[i] . own[i] /
    temperature.

    Args:
        x, w: (N, D), (C, D) float32, bfloat16 or float16, contiguous.
        target: (N,) int64, the column of each row. Outside of 0 to C - 1 the loss is NaN.
        chunk_bytes: of the buffer of scores.
        bias: (C,) of the dtype of x, or None.
        own: (N, K, D) of the dtype of x, or None.
        temperature: () float32 or None.
        row_ids, col_ids: (N,), (C,) int64, or both None.
    """

    x: Tensor
    w: Tensor
    target: Tensor
    chunk_bytes: int
    bias: Tensor | None = None
    own: Tensor | None = None
    temperature: Tensor | None = None
    row_ids: Tensor | None = None
    col_ids: Tensor | None = None

    @property
    def width(self) -> int:
        """Columns of a row, its own ones counted."""
        return self.w.shape[0] + (0 if self.own is None else self.own.shape[1])


class Needs(NamedTuple):
    """Which gradients are needed."""

    x: bool
    w: bool
    bias: bool = False
    own: bool = False
    temperature: bool = False


class Gradients(NamedTuple):
    """Gradients of the inputs of the same names; None where not needed."""

    x: Tensor | None
    w: Tensor | None
    bias: Tensor | None
    own: Tensor | None
    temperature: Tensor | None


class Chunk(NamedTuple):
    """Some rows, and their scores as torch.mm left them: (rows, pitch) float32."""

    rows: slice
    scores: Tensor


def forward(s: Scores) -> tuple[Tensor, Tensor]:
    """The loss (N,) float32 of each row, and the logsumexp of its scores (N,) float64."""
    loss, lse = _empty_statistics(s)
    for chunk in _chunks(s):
        _statistics(s, chunk, loss, lse)
    return loss, lse


def backward(s: Scores, d_loss: Tensor, lse: Tensor, needs: Needs) -> Gradients:
    """Gradients of the sum over rows of d_loss (N,) float32 times the loss."""
    sums = _Sums(s, needs)
    for chunk in _chunks(s):
        sums.add(chunk, d_loss, lse)
    return sums.gradients()


def forward_with_gradients(s: Scores, needs: Needs, mean: bool) -> tuple[Tensor, Gradients]:
    """The mean or sum of the rows' losses () and its gradients, of scores that are made once."""
    loss, lse = _empty_statistics(s)
    count = max(s.x.shape[0], 1) if mean else 1
    d_loss, sums = torch.full_like(loss, 1 / count), _Sums(s, needs)
    for chunk in _chunks(s):
        _statistics(s, chunk, loss, lse)
        sums.add(chunk, d_loss, lse)
    return loss.sum() / count, sums.gradients()


class _Sums:
    """Gradients while chunks are added to them."""

    def __init__(self, s: Scores, needs: Needs) -> None:
        rows = s.x.shape[0]
        # Sums of several chunks are kept in float32; those of one are rounded once anyway.
        dtype = s.w.dtype if rows <= _chunk_rows(s) else torch.float32
        self.s = s
        self.x = torch.empty_like(s.x) if needs.x else None
        blank = torch.empty_like if rows > 0 else torch.zeros_like  # the first chunk fills it
        self.w = blank(s.w, dtype=dtype) if needs.w else None
        self.bias = s.x.new_zeros(s.w.shape[0], dtype=torch.float32) if needs.bias else None
        self.own = torch.empty_like(s.own) if needs.own and s.own is not None else None
        self.moment = s.x.new_empty(rows, dtype=torch.float64) if needs.temperature else None

    def add(self, chunk: Chunk, d_loss: Tensor, lse: Tensor) -> None:
        s, d_scores = self.s, _gradient(self.s, chunk, d_loss, lse, self.moment)
        shared, d_x = d_scores[:, : s.w.shape[0]], None
        if self.x is not None:
            d_x = torch.empty_like(self.x[chunk.rows], dtype=torch.float32)
            _multiply(shared, s.w, d_x)
        if s.own is not None and (d_x is not None or self.own is not None):
            _own_gradients(s, chunk, d_scores, d_x, self.own)
        if self.x is not None and d_x is not None:
            self.x[chunk.rows] = d_x
        if self.w is not None:
            _multiply(shared.mT, s.x[chunk.rows], self.w, add=chunk.rows.start > 0)
        if self.bias is not None:
            self.bias += shared.sum(dim=0, dtype=torch.float32)

    def gradients(self) -> Gradients:
        dtype = self.s.x.dtype
        w, bias = (None if g is None else g.to(dtype) for g in (self.w, self.bias))
        temperature = self.s.temperature
        if self.moment is None or temperature is None:
            return Gradients(self.x, w, bias, self.own, None)
        d_temperature = (-self.moment.sum() / temperature).to(temperature.dtype)
        return Gradients(self.x, w, bias, self.own, d_temperature)


def _chunks(s: Scores) -> Iterator[Chunk]:
    """Chunks of rows and their scores, which are good until the next chunk is asked for."""
    rows, cols = s.x.shape[0], s.w.shape[0]
    if rows == 0:
        return
    step = _chunk_rows(s)
    buffer = s.x.new_empty(step, _pitch(s), dtype=torch.float32)
    for first in range(0, rows, step):
        chunk = slice(first, min(first + step, rows))
        scores = buffer[: chunk.stop - first]
        _multiply(s.x[chunk], s.w.mT, scores[:, :cols])
        if s.own is not None:
            _own_scores(s, chunk, s.own, scores)
        yield Chunk(chunk, scores)


def _pitch(s: Scores) -> int:
    """Scores from row to row."""
    return triton.cdiv(s.width, ALIGN) * ALIGN


def _chunk_rows(s: Scores) -> int:
    """Rows of all chunks but the last, which is about as long."""
    rows, most = s.x.shape[0], max(1, s.chunk_bytes // (4 * max(1, _pitch(s))))
    each = triton.cdiv(rows, max(1, triton.cdiv(rows, most)))
    return min(most, rows, triton.cdiv(each, TILE_ROWS) * TILE_ROWS)


def _multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """out = a @ b, or out += a @ b; out of their dtype or float32, in which all sums are made."""
    options: dict[str, Any] = {"out": out}
    if a.dtype != out.dtype and a.is_cuda:
        options["out_dtype"] = out.dtype
    elif a.dtype != out.dtype:  # interpreted: torch multiplies into a wider dtype on GPUs only
        a, b = a.to(out.dtype), b.to(out.dtype)
    if add:
        torch.addmm(out, a, b, **options)
    else:
        torch.mm(a, b, **options)


def _empty_statistics(s: Scores) -> tuple[Tensor, Tensor]:
    loss = s.x.new_empty(s.x.shape[0], dtype=torch.float32)
    return loss, torch.empty_like(loss, dtype=torch.float64)


def _tile(s: Scores) -> dict[str, int]:
    """How exact a program is, and the rows and columns that it takes at a time. Ids are twice as
    wide as scores, so several rows share the reading of them."""
    rows, cols = (1, 4096) if s.row_ids is None else (8, 512)
    return {"EXACT": s.x.dtype == torch.float32, "ROWS": rows, "COLS": cols, "num_warps": 8}


def _read(s: Scores, chunk: Chunk) -> tuple[Tensor | None, ...]:
    """What both kernels of a chunk read, in their order."""
    row_ids = None if s.row_ids is None else s.row_ids[chunk.rows]
    return chunk.scores, s.target[chunk.rows], s.bias, s.temperature, row_ids, s.col_ids


def _statistics(s: Scores, chunk: Chunk, loss: Tensor, lse: Tensor) -> None:
    tile, rows = _tile(s), chunk.scores.shape[0]
    kernels.statistics_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
        *_read(s, chunk),
        loss[chunk.rows],
        lse[chunk.rows],
        rows,
        s.w.shape[0],
        s.width,
        chunk.scores.stride(0),
        **tile,
    )


def _gradient(
    s: Scores, chunk: Chunk, d_loss: Tensor, lse: Tensor, moment: Tensor | None
) -> Tensor:
    """(rows, width) gradients of the products, in the chunk's own memory."""
    tile, rows = _tile(s), chunk.scores.shape[0]
    d_scores = chunk.scores.view(s.x.dtype)
    kernels.gradient_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
        *_read(s, chunk),
        d_loss[chunk.rows],
        lse[chunk.rows],
        d_scores,
        None if moment is None else moment[chunk.rows],
        rows,
        s.w.shape[0],
        s.width,
        chunk.scores.stride(0),
        d_scores.stride(0),
        **tile,
    )
    return d_scores[:, : s.width]


def _own_scores(s: Scores, rows: slice, own: Tensor, scores: Tensor) -> None:
    """Scores of the columns that only their own row has, beside the others."""
    count, dim = own.shape[1:]
    if count == 0:
        return
    kernels.own_scores_kernel[(scores.shape[0], count)](
        s.x[rows],
        own[rows],
        scores,
        count,
        s.w.shape[0],
        scores.stride(0),
        DIM=dim,
        BLOCK_D=_block_d(dim),
    )


def _own_gradients(
    s: Scores, chunk: Chunk, d_scores: Tensor, d_x: Tensor | None, d_own: Tensor | None
) -> None:
    """Gradients of those columns into d_own; what they add to the rows', into d_x."""
    assert s.own is not None
    count, dim = s.own.shape[1:]
    block = _block_d(dim)
    kernels.own_gradients_kernel[(d_scores.shape[0], triton.cdiv(dim, block))](
        s.x[chunk.rows],
        s.own[chunk.rows],
        d_scores,
        d_x,
        None if d_own is None else d_own[chunk.rows],
        count,
        s.w.shape[0],
        d_scores.stride(0),
        DIM=dim,
        BLOCK_D=block,
    )


def _block_d(dim: int) -> int:
    return min(1024, max(32, triton.next_power_of_2(dim)))
