"""What a chunk of scores goes through between its products; launched by softmax_scores.py.

A program takes ROWS whole rows, COLS scores of each at a time. Scores are float32, `width` in a row
and `pitch` from row to row; the first `cols` columns are shared, the rest are a row's own. What
fills a row up to `pitch` is read and written too, though it means nothing: only masks that end at a
multiple of 16 let accesses be 16 bytes wide. Row 0 is the chunk's first. Pointers that are None
stand for what the problem does not have.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32: below every score, yet no infinity
UNDERFLOW = tl.constexpr(-87.0)  # exp of less is next to nothing, and no normal float32


@triton.jit
def _exp(x, EXACT: tl.constexpr):
    """exp(x) for x <= 0, to a unit in the last place if EXACT; else as the hardware does it, whose
    error of about 1e-6 shows beside float32 products but not beside those of bfloat16."""
    if not EXACT:
        return tl.exp(x)
    # 2^n exp(r), |r| <= ln(2) / 2; ln(2) in two parts, of which n times the first is exact.
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = tl.fma(n, -0.693359375, x)
    r = tl.fma(n, 2.12194440054690583e-4, r)
    # Taylor's series: its first term left out, r^8 / 8!, is below 6e-9.
    value = tl.fma(r, 1.0 / 5040, 1.0 / 720)
    value = tl.fma(value, r, 1.0 / 120)
    value = tl.fma(value, r, 1.0 / 24)
    value = tl.fma(value, r, 1.0 / 6)
    value = tl.fma(value, r, 0.5)
    value = tl.fma(value, r, 1.0)
    value = tl.fma(value, r, 1.0)
    power = ((tl.maximum(n, -126.0).to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x < UNDERFLOW, 0.0, value * power)


@triton.jit
def _inverse(value_ptr):
    """1 / value as the sum of two float32: scores are large where it is, so are their roundings."""
    value = tl.load(value_ptr).to(tl.float64)
    inverse = 1.0 / value
    high = inverse.to(tl.float32)
    return high, (inverse - high.to(tl.float64)).to(tl.float32)


@triton.jit
def _finished(scores, bias_ptr, offs_c, has_bias, temperature_ptr, scale, scale_rest):
    """The scores of products: bias added, over the temperature."""
    if bias_ptr is not None:
        scores += tl.load(bias_ptr + offs_c, has_bias, other=0.0).to(tl.float32)
    if temperature_ptr is not None:
        scores = tl.fma(scores, scale, scores * scale_rest)
    return scores


@triton.jit
def _scores(
    scores_ptr,
    bias_ptr,
    temperature_ptr,
    row_ids_ptr,
    col_ids_ptr,
    known,
    offs_c,
    rows,
    cols,
    width,
    pitch,
):
    """(ROWS, COLS) finished scores; -inf for those that do not exist or are left out."""
    offs_r, target, row_ids, _, scale, scale_rest = known
    in_memory = (offs_r < rows)[:, None] & (offs_c < pitch)[None, :]
    scores = tl.load(scores_ptr + offs_r[:, None] * pitch + offs_c[None, :], in_memory, other=0.0)
    exists = (offs_r < rows)[:, None] & (offs_c < width)[None, :]
    shared = (offs_c < cols)[None, :]
    scores = _finished(
        scores, bias_ptr, offs_c[None, :], shared, temperature_ptr, scale, scale_rest
    )
    if row_ids_ptr is not None:
        col_ids = tl.load(col_ids_ptr + offs_c, offs_c < cols, other=0)[None, :]
        same = (row_ids[:, None] == col_ids) & shared & (offs_c[None, :] != target[:, None])
        exists = exists & (same == 0)
    return tl.where(exists, scores, float("-inf"))


@triton.jit
def _rows(
    scores_ptr,
    target_ptr,
    bias_ptr,
    temperature_ptr,
    row_ids_ptr,
    rows,
    cols,
    pitch,
    ROWS: tl.constexpr,
):
    """What a program knows of its rows, each (ROWS,): their places, targets, ids (if there are
    any), and the scores of their targets, NaN for one that is no column. Then the inverse of the
    temperature."""
    offs_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    target = tl.load(target_ptr + offs_r, offs_r < rows, other=0)
    row_ids = target
    if row_ids_ptr is not None:
        row_ids = tl.load(row_ids_ptr + offs_r, offs_r < rows, other=0)
    scale, scale_rest = 1.0, 0.0
    if temperature_ptr is not None:
        scale, scale_rest = _inverse(temperature_ptr)
    mask = (offs_r < rows) & (target >= 0) & (target < cols)
    own = tl.load(scores_ptr + offs_r * pitch + target, mask, other=float("nan"))
    own = _finished(own, bias_ptr, target, mask, temperature_ptr, scale, scale_rest)
    return offs_r, target, row_ids, own, scale, scale_rest


@triton.jit
def statistics_kernel(
    scores_ptr,
    target_ptr,
    bias_ptr,
    temperature_ptr,
    row_ids_ptr,
    col_ids_ptr,
    loss_ptr,
    lse_ptr,
    rows,
    cols,
    width,
    pitch,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Loss and logsumexp of each row."""
    known = _rows(
        scores_ptr, target_ptr, bias_ptr, temperature_ptr, row_ids_ptr, rows, cols, pitch, ROWS
    )
    offs_r, _, _, own, _, _ = known
    in_rows = offs_r < rows
    # Each lane keeps a peak of its own, so that nothing is exchanged before the end of the row.
    peak = tl.full((ROWS, COLS), LOWEST, tl.float32)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, width, COLS):
        offs_c = start + tl.arange(0, COLS)
        scores = _scores(
            scores_ptr,
            bias_ptr,
            temperature_ptr,
            row_ids_ptr,
            col_ids_ptr,
            known,
            offs_c,
            rows,
            cols,
            width,
            pitch,
        )
        # Of exp(old peak - new peak) and exp(score - new peak) one is 1: one exponential serves.
        ratio = _exp(-tl.abs(scores - peak), EXACT)
        total = tl.where(scores > peak, total * ratio + 1.0, total + ratio)
        peak = tl.maximum(peak, scores)
    top = tl.max(peak, axis=1)
    total *= _exp(peak - top[:, None], EXACT)
    log_sum = tl.log(tl.sum(total.to(tl.float64), axis=1))
    # Not lse - own: nothing cancels where the target has the top score.
    loss = log_sum + (top.to(tl.float64) - own.to(tl.float64))
    tl.store(loss_ptr + offs_r, loss.to(tl.float32), in_rows)
    tl.store(lse_ptr + offs_r, top.to(tl.float64) + log_sum, in_rows)


@triton.jit
def gradient_kernel(
    scores_ptr,
    target_ptr,
    bias_ptr,
    temperature_ptr,
    row_ids_ptr,
    col_ids_ptr,
    d_loss_ptr,
    lse_ptr,
    d_scores_ptr,
    moment_ptr,
    rows,
    cols,
    width,
    pitch,
    d_pitch,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Gradients of the products, in place of the scores: the same bytes, if need be of a narrower
    dtype; and of each row the sum of d_score * score.

    Gradients of a row add up to 0, so that is the sum of their products with the distances from the
    target's score, which are few and small where the target stands out.
    """
    known = _rows(
        scores_ptr, target_ptr, bias_ptr, temperature_ptr, row_ids_ptr, rows, cols, pitch, ROWS
    )
    offs_r, target, _, own, scale, _ = known
    in_rows = offs_r < rows
    d_loss = tl.load(d_loss_ptr + offs_r, in_rows, other=0.0)[:, None]
    lse = tl.load(lse_ptr + offs_r, in_rows, other=0.0)
    lse_high = lse.to(tl.float32)
    lse_rest = (lse - lse_high.to(tl.float64)).to(tl.float32)[:, None]
    moment = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, width, COLS):
        offs_c = start + tl.arange(0, COLS)
        scores = _scores(
            scores_ptr,
            bias_ptr,
            temperature_ptr,
            row_ids_ptr,
            col_ids_ptr,
            known,
            offs_c,
            rows,
            cols,
            width,
            pitch,
        )
        d_scores = _exp((scores - lse_high[:, None]) - lse_rest, EXACT)
        d_scores = tl.where(offs_c[None, :] == target[:, None], d_scores - 1.0, d_scores) * d_loss
        if moment_ptr is not None:
            moment += tl.where(scores == float("-inf"), 0.0, d_scores * (scores - own[:, None]))
        if temperature_ptr is not None:
            d_scores *= scale
        # A narrower row ends before the scores that are still to be read, but for those of this
        # block: no warp may write before every warp has read.
        tl.debug_barrier()
        in_memory = in_rows[:, None] & (offs_c < pitch)[None, :]
        offs_d = offs_r[:, None] * d_pitch + offs_c[None, :]
        tl.store(d_scores_ptr + offs_d, d_scores.to(d_scores_ptr.dtype.element_ty), in_memory)
    if moment_ptr is not None:
        tl.store(moment_ptr + offs_r, tl.sum(moment.to(tl.float64), axis=1), in_rows)


@triton.jit
def own_scores_kernel(
    x_ptr, own_ptr, scores_ptr, count, cols, pitch, DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The product of one row of x with one of its own columns."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, DIM, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + row * DIM + offs_d, offs_d < DIM, other=0.0).to(tl.float32)
        own = tl.load(own_ptr + (row * count + column) * DIM + offs_d, offs_d < DIM, other=0.0)
        total += x * own.to(tl.float32)
    tl.store(scores_ptr + row * pitch + cols + column, tl.sum(total, axis=0))


@triton.jit
def own_gradients_kernel(
    x_ptr,
    own_ptr,
    d_scores_ptr,
    d_x_ptr,
    d_own_ptr,
    count,
    cols,
    d_pitch,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A row's own columns: their gradients, and what they add to the row's, (rows, D) float32."""
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_dim = offs_d < DIM
    x = tl.load(x_ptr + row * DIM + offs_d, in_dim, other=0.0).to(tl.float32)
    d_x = tl.zeros((BLOCK_D,), tl.float32)
    for column in range(count):
        d_score = tl.load(d_scores_ptr + row * d_pitch + cols + column).to(tl.float32)
        offs_own = (row * count + column) * DIM + offs_d
        if d_x_ptr is not None:
            d_x += d_score * tl.load(own_ptr + offs_own, in_dim, other=0.0).to(tl.float32)
        if d_own_ptr is not None:
            d_own = (d_score * x).to(d_own_ptr.dtype.element_ty)
            tl.store(d_own_ptr + offs_own, d_own, in_dim)
    if d_x_ptr is not None:
        d_x += tl.load(d_x_ptr + row * DIM + offs_d, in_dim, other=0.0)
        tl.store(d_x_ptr + row * DIM + offs_d, d_x, in_dim)
