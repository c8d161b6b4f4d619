"""Forward kernel of attention: FlashAttention's recurrence (arXiv 2205.14135) over the tile plan.

T query tokens, K key tokens, H query heads, Hkv key-value heads, D = D1 + D2 columns of a head.
Scores are in base 2: `scale` is the softmax scale times log2(e), so that weights are exp2.
"""

import triton
import triton.language as tl

from moca_triton.attention_tiles import (
    UNIT,
    dot_rows,
    load_rows,
    next_rows,
    place_of_queries,
    store_rows,
    tile_blocks,
    tile_rows,
)

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def soften(
    q1, q2, sum1, sum2, peak, total, row_start, row_end,
    k_ptr, v_ptr, k_token, v_token, begin, stop, scale,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Fold the block of keys from `begin` into the rows' sums of weights and of weighted values."""
    offs = tl.arange(0, COLUMNS)
    keys = begin + offs
    here = begin.to(tl.int64)
    k1, k2 = load_rows(k_ptr + here * k_token, k_token, offs, keys < stop, D, D1, D2, MASKED)
    scores = dot_rows(q1, q2, k1, k2, D2)
    if MASKED:
        visible = (row_start[:, None] <= keys[None, :]) & (keys[None, :] < row_end[:, None])
        scores = tl.where(visible, scores * scale, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # nothing seen so far
        weights = tl.exp2(scores - shift[:, None])
    else:
        new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
        shift = new_peak
        weights = tl.exp2(scores * scale - shift[:, None])
    shrink = tl.exp2(peak - shift)
    total = total * shrink + tl.sum(weights, 1)
    v1, v2 = load_rows(v_ptr + here * v_token, v_token, offs, keys < stop, D, D1, D2, MASKED)
    weights = weights.to(v1.dtype)
    sum1 = tl.dot(weights, v1, sum1 * shrink[:, None], input_precision="ieee")
    if D2 > 0:
        sum2 = tl.dot(weights, v2, sum2 * shrink[:, None], input_precision="ieee")
    return sum1, sum2, new_peak, total


# Sizes that change with every batch would otherwise compile again where 16 divides them.
@triton.jit(do_not_specialize=["num_tiles", "programs", "num_keys"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, start_ptr, end_ptr, tiles_ptr, out_ptr, lse_ptr, rest_ptr,
    q_token, q_head, k_token, k_head, v_token, v_head, heads, group,
    num_tiles, programs, num_keys, scale,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One query head of every `programs`-th tile."""
    tile, kv_head, head = place_of_queries(group, programs)
    q_token *= UNIT
    k_token *= UNIT
    v_token *= UNIT
    q_ptr += head.to(tl.int64) * q_head * UNIT
    k_ptr += kv_head.to(tl.int64) * k_head * UNIT
    v_ptr += kv_head.to(tl.int64) * v_head * UNIT
    offs = tl.arange(0, ROWS)
    first, last = tile_rows(tiles_ptr, tile, num_tiles)
    while first < last:
        rows = first + offs
        real = rows < last
        row_start = tl.load(start_ptr + rows, mask=real, other=0)
        row_end = tl.load(end_ptr + rows, mask=real, other=0)
        here = first.to(tl.int64)
        q1, q2 = load_rows(q_ptr + here * q_token, q_token, offs, real, D, D1, D2, True)
        begin, stop, count, whole_from, whole_to = tile_blocks(
            start_ptr, end_ptr, first, tl.minimum(first + ROWS, last) - 1, num_keys, COLUMNS
        )
        peak = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        sum1 = tl.zeros([ROWS, D1], tl.float32)
        sum2 = tl.zeros([ROWS, D2 if D2 > 0 else 16], tl.float32)
        for i in range(count - (whole_to - whole_from)):
            block = tl.where(i < whole_from, i, i + (whole_to - whole_from))
            sum1, sum2, peak, total = soften(
                q1, q2, sum1, sum2, peak, total, row_start, row_end,
                k_ptr, v_ptr, k_token, v_token, begin + block * COLUMNS, stop, scale,
                D, D1, D2, COLUMNS, True,
            )  # fmt: skip
        for block in range(whole_from, whole_to):
            sum1, sum2, peak, total = soften(
                q1, q2, sum1, sum2, peak, total, row_start, row_end,
                k_ptr, v_ptr, k_token, v_token, begin + block * COLUMNS, stop, scale,
                D, D1, D2, COLUMNS, False,
            )  # fmt: skip
        empty = row_start >= row_end
        total = tl.where(empty, 1.0, total)
        share = 1.0 / total
        out = out_ptr + (here * heads + head) * D
        store_rows(out, heads * D, offs, real, sum1 * share[:, None], sum2 * share[:, None],
                   D, D1, D2)  # fmt: skip
        if q1.dtype == tl.float32:  # exact enough for the backward to find the same weights
            lse = (peak.to(tl.float64) + tl.log2(total.to(tl.float64))) * LN2
        else:
            lse = (peak + tl.log2(total)) * LN2
        rounded = lse.to(tl.float32)
        at = here * heads + head + offs * heads
        tl.store(lse_ptr + at, tl.where(empty, float("-inf"), rounded), mask=real)
        tl.store(rest_ptr + at, tl.where(empty, 0.0, lse - rounded), mask=real)
        tile, first, last = next_rows(tiles_ptr, tile, first + ROWS, last, programs, num_tiles)
