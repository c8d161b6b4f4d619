"""Backward kernels of attention: terms of each row, then d_q over the tiles of queries, and d_k and
d_v over the tiles of keys. No two programs write one number, so every run gives the same bits.

With weights p = softmax(scores) and d_p = d_out @ v.T, d_scores = p * (d_p - delta), where a row's
delta = sum(out * d_out) - d_lse. A row with a single key has p = 1 and d_p = sum(out * d_out) in
exact arithmetic: both are left out, so that it learns nothing from rounding. Its lse in base 2 is
inf to tell it by.
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

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["size"])
def rows_kernel(
    out_ptr, d_out_ptr, lse_ptr, rest_ptr, d_lse_ptr, start_ptr, end_ptr, lse2_ptr, delta_ptr,
    size, heads,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """lse in base 2 and delta of ROWS rows of one head, each (H, T).

    lse is inf for a row with a single key, and else as exact as its pointer's dtype: float64 for
    float32 tensors, whose weights would feel its rounding otherwise.
    """
    head = tl.program_id(1)
    first = tl.program_id(0) * ROWS
    offs = tl.arange(0, ROWS)
    rows = first + offs
    real = rows < size
    here = (first.to(tl.int64) * heads + head) * D
    out1, out2 = load_rows(out_ptr + here, heads * D, offs, real, D, D1, D2, True)
    d_out1, d_out2 = load_rows(d_out_ptr + here, heads * D, offs, real, D, D1, D2, True)
    delta = tl.sum(out1.to(tl.float32) * d_out1.to(tl.float32), 1)
    if D2 > 0:
        delta += tl.sum(out2.to(tl.float32) * d_out2.to(tl.float32), 1)
    keys = tl.load(end_ptr + rows, mask=real, other=0) - tl.load(
        start_ptr + rows, mask=real, other=0
    )
    at = first.to(tl.int64) * heads + head + offs * heads
    d_lse = tl.load(d_lse_ptr + at, mask=real, other=0.0)
    lse = tl.load(lse_ptr + at, mask=real, other=0.0).to(tl.float64)
    lse += tl.load(rest_ptr + at, mask=real, other=0.0)
    to = head.to(tl.int64) * size + rows
    tl.store(delta_ptr + to, tl.where(keys == 1, 0.0, delta) - d_lse, mask=real)
    tl.store(lse2_ptr + to, tl.where(keys == 1, float("inf"), lse * LOG2_E), mask=real)


@triton.jit
def add_to_queries(
    q1, q2, d_out1, d_out2, sum1, sum2, lse2, delta, row_start, row_end,
    k_ptr, v_ptr, k_token, v_token, begin, stop, scale,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Add d_scores @ k of the block of keys from `begin`."""
    offs = tl.arange(0, COLUMNS)
    keys = begin + offs
    here = begin.to(tl.int64)
    k1, k2 = load_rows(k_ptr + here * k_token, k_token, offs, keys < stop, D, D1, D2, MASKED)
    v1, v2 = load_rows(v_ptr + here * v_token, v_token, offs, keys < stop, D, D1, D2, MASKED)
    weights = tl.exp2((dot_rows(q1, q2, k1, k2, D2) * scale - lse2[:, None]).to(tl.float32))
    d_weights = dot_rows(d_out1, d_out2, v1, v2, D2)
    if MASKED:
        visible = (row_start[:, None] <= keys[None, :]) & (keys[None, :] < row_end[:, None])
        single = (lse2 == float("inf"))[:, None]
        weights = tl.where(single, 1.0, weights)
        d_weights = tl.where(single, 0.0, d_weights)
        d_scores = tl.where(visible, weights * (d_weights - delta[:, None]), 0.0)
    else:
        d_scores = weights * (d_weights - delta[:, None])
    d_scores = d_scores.to(k1.dtype)
    sum1 = tl.dot(d_scores, k1, sum1, input_precision="ieee")
    if D2 > 0:
        sum2 = tl.dot(d_scores, k2, sum2, input_precision="ieee")
    return sum1, sum2


@triton.jit(do_not_specialize=["num_tiles", "programs", "num_keys", "num_queries"])
def queries_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, lse2_ptr, delta_ptr, start_ptr, end_ptr, tiles_ptr, d_q_ptr,
    q_token, q_head, k_token, k_head, v_token, v_head, heads, group,
    num_tiles, programs, num_queries, num_keys, scale, softmax_scale,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """d_q of one head of every `programs`-th tile of queries; programs stand as in the forward."""
    tile, kv_head, head = place_of_queries(group, programs)
    q_token *= UNIT
    k_token *= UNIT
    v_token *= UNIT
    q_ptr += head.to(tl.int64) * q_head * UNIT
    k_ptr += kv_head.to(tl.int64) * k_head * UNIT
    v_ptr += kv_head.to(tl.int64) * v_head * UNIT
    lse2_ptr += head.to(tl.int64) * num_queries
    delta_ptr += head.to(tl.int64) * num_queries
    offs = tl.arange(0, ROWS)
    first, last = tile_rows(tiles_ptr, tile, num_tiles)
    while first < last:
        rows = first + offs
        real = rows < last
        row_start = tl.load(start_ptr + rows, mask=real, other=0)
        row_end = tl.load(end_ptr + rows, mask=real, other=0)
        here = first.to(tl.int64)
        q1, q2 = load_rows(q_ptr + here * q_token, q_token, offs, real, D, D1, D2, True)
        at = (here * heads + head) * D
        d_out1, d_out2 = load_rows(d_out_ptr + at, heads * D, offs, real, D, D1, D2, True)
        lse2 = tl.load(lse2_ptr + rows, mask=real, other=0.0)
        delta = tl.load(delta_ptr + rows, mask=real, other=0.0)
        begin, stop, count, whole_from, whole_to = tile_blocks(
            start_ptr, end_ptr, first, tl.minimum(first + ROWS, last) - 1, num_keys, COLUMNS
        )
        sum1 = tl.zeros([ROWS, D1], tl.float32)
        sum2 = tl.zeros([ROWS, D2 if D2 > 0 else 16], tl.float32)
        for i in range(count - (whole_to - whole_from)):
            block = tl.where(i < whole_from, i, i + (whole_to - whole_from))
            sum1, sum2 = add_to_queries(
                q1, q2, d_out1, d_out2, sum1, sum2, lse2, delta, row_start, row_end,
                k_ptr, v_ptr, k_token, v_token, begin + block * COLUMNS, stop, scale,
                D, D1, D2, COLUMNS, True,
            )  # fmt: skip
        for block in range(whole_from, whole_to):
            sum1, sum2 = add_to_queries(
                q1, q2, d_out1, d_out2, sum1, sum2, lse2, delta, row_start, row_end,
                k_ptr, v_ptr, k_token, v_token, begin + block * COLUMNS, stop, scale,
                D, D1, D2, COLUMNS, False,
            )  # fmt: skip
        store_rows(d_q_ptr + at, heads * D, offs, real, sum1 * softmax_scale, sum2 * softmax_scale,
                   D, D1, D2)  # fmt: skip
        tile, first, last = next_rows(tiles_ptr, tile, first + ROWS, last, programs, num_tiles)


@triton.jit
def add_to_keys(
    k1, k2, v1, v2, d_k1, d_k2, d_v1, d_v2, row_start, row_end,
    q_ptr, d_out_ptr, lse2_ptr, delta_ptr, q_token, d_out_token,
    begin, stop, scale,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Add d_scores.T @ q and weights.T @ d_out of the block of queries from `begin`."""
    offs = tl.arange(0, COLUMNS)
    queries = begin + offs
    inside = queries < stop
    here = begin.to(tl.int64)
    if MASKED:
        lse2 = tl.load(lse2_ptr + queries, mask=inside, other=0.0)
        delta = tl.load(delta_ptr + queries, mask=inside, other=0.0)
    else:
        lse2 = tl.load(lse2_ptr + queries)
        delta = tl.load(delta_ptr + queries)
    q1, q2 = load_rows(q_ptr + here * q_token, q_token, offs, inside, D, D1, D2, MASKED)
    d_out1, d_out2 = load_rows(
        d_out_ptr + here * d_out_token, d_out_token, offs, inside, D, D1, D2, MASKED
    )
    weights = tl.exp2((dot_rows(k1, k2, q1, q2, D2) * scale - lse2[None, :]).to(tl.float32))
    d_weights = dot_rows(v1, v2, d_out1, d_out2, D2)
    if MASKED:
        visible = (row_start[:, None] <= queries[None, :]) & (queries[None, :] < row_end[:, None])
        single = (lse2 == float("inf"))[None, :]
        weights = tl.where(single, 1.0, weights)
        d_weights = tl.where(single, 0.0, d_weights)
        d_scores = tl.where(visible, weights * (d_weights - delta[None, :]), 0.0).to(q1.dtype)
        weights = tl.where(visible, weights, 0.0).to(q1.dtype)
    else:
        d_scores = (weights * (d_weights - delta[None, :])).to(q1.dtype)
        weights = weights.to(q1.dtype)
    d_v1 = tl.dot(weights, d_out1, d_v1, input_precision="ieee")
    d_k1 = tl.dot(d_scores, q1, d_k1, input_precision="ieee")
    if D2 > 0:
        d_v2 = tl.dot(weights, d_out2, d_v2, input_precision="ieee")
        d_k2 = tl.dot(d_scores, q2, d_k2, input_precision="ieee")
    return d_k1, d_k2, d_v1, d_v2


@triton.jit
def add_heads_to_keys(
    k1, k2, v1, v2, d_k1, d_k2, d_v1, d_v2, row_start, row_end,
    q_ptr, d_out_ptr, lse2_ptr, delta_ptr, q_token, q_head, heads, group, num_queries,
    begin, stop, count, gap_from, gap, scale,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Add `count` blocks of every query head of the group; `gap` blocks from `gap_from` are left
    out. One loop over heads and blocks, so that loads run ahead from head to head."""
    for i in range(count * group):
        head = (i // count).to(tl.int64)
        block = i % count
        block = tl.where(block < gap_from, block, block + gap)
        d_k1, d_k2, d_v1, d_v2 = add_to_keys(
            k1, k2, v1, v2, d_k1, d_k2, d_v1, d_v2, row_start, row_end,
            q_ptr + head * q_head * UNIT, d_out_ptr + head * D,
            lse2_ptr + head * num_queries, delta_ptr + head * num_queries,
            q_token, heads * D, begin + block * COLUMNS, stop, scale,
            D, D1, D2, COLUMNS, MASKED,
        )  # fmt: skip
    return d_k1, d_k2, d_v1, d_v2


@triton.jit(do_not_specialize=["num_tiles", "programs", "num_queries"])
def keys_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, lse2_ptr, delta_ptr, start_ptr, end_ptr, tiles_ptr,
    d_k_ptr, d_v_ptr,
    q_token, q_head, k_token, k_head, v_token, v_head, heads, group,
    num_tiles, programs, num_queries, scale, softmax_scale,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """d_k and d_v of one key head of every `programs`-th tile of keys, from all its query heads."""
    pid = tl.program_id(0)
    tile = pid % programs
    kv_head = pid // programs
    first_head = (kv_head * group).to(tl.int64)
    kv_heads = heads // group
    q_token *= UNIT
    k_token *= UNIT
    v_token *= UNIT
    q_ptr += first_head * q_head * UNIT
    k_ptr += kv_head.to(tl.int64) * k_head * UNIT
    v_ptr += kv_head.to(tl.int64) * v_head * UNIT
    d_out_ptr += first_head * D
    lse2_ptr += first_head * num_queries
    delta_ptr += first_head * num_queries
    offs = tl.arange(0, ROWS)
    first, last = tile_rows(tiles_ptr, tile, num_tiles)
    while first < last:
        rows = first + offs
        real = rows < last
        row_start = tl.load(start_ptr + rows, mask=real, other=0)
        row_end = tl.load(end_ptr + rows, mask=real, other=0)
        here = first.to(tl.int64)
        k1, k2 = load_rows(k_ptr + here * k_token, k_token, offs, real, D, D1, D2, True)
        v1, v2 = load_rows(v_ptr + here * v_token, v_token, offs, real, D, D1, D2, True)
        final = tl.minimum(first + ROWS, last) - 1
        begin, stop, count, whole_from, whole_to = tile_blocks(
            start_ptr, end_ptr, first, final, num_queries, COLUMNS
        )
        if final == first:  # queries that see this key alone need the masked step
            whole_to = whole_from
        d_k1 = tl.zeros([ROWS, D1], tl.float32)
        d_k2 = tl.zeros([ROWS, D2 if D2 > 0 else 16], tl.float32)
        d_v1 = tl.zeros([ROWS, D1], tl.float32)
        d_v2 = tl.zeros([ROWS, D2 if D2 > 0 else 16], tl.float32)
        whole = whole_to - whole_from
        d_k1, d_k2, d_v1, d_v2 = add_heads_to_keys(
            k1, k2, v1, v2, d_k1, d_k2, d_v1, d_v2, row_start, row_end,
            q_ptr, d_out_ptr, lse2_ptr, delta_ptr, q_token, q_head, heads, group, num_queries,
            begin, stop, count - whole, whole_from, whole, scale, D, D1, D2, COLUMNS, True,
        )  # fmt: skip
        d_k1, d_k2, d_v1, d_v2 = add_heads_to_keys(
            k1, k2, v1, v2, d_k1, d_k2, d_v1, d_v2, row_start, row_end,
            q_ptr, d_out_ptr, lse2_ptr, delta_ptr, q_token, q_head, heads, group, num_queries,
            begin, stop, whole, 0, whole_from, scale, D, D1, D2, COLUMNS, False,
        )  # fmt: skip
        at = (here * kv_heads + kv_head) * D
        store_rows(d_k_ptr + at, kv_heads * D, offs, real, d_k1 * softmax_scale,
                   d_k2 * softmax_scale, D, D1, D2)  # fmt: skip
        store_rows(d_v_ptr + at, kv_heads * D, offs, real, d_v1, d_v2, D, D1, D2)
        tile, first, last = next_rows(tiles_ptr, tile, first + ROWS, last, programs, num_tiles)
