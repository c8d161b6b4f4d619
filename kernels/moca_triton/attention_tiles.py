"""What the attention kernels share: walking the plan, the blocks of a tile, heads in two pieces.

A program takes tiles of the plan, and of each tile ROWS rows at a time. What these rows need of the
other side is cut into blocks of COLUMNS, of which only those at the edges of spans need a mask.

A head of D columns is D1 + D2: the largest power of two in D, and what remains, rounded up to one
(0 if nothing remains). So D = 80 is 64 + 16 and D = 96 is 64 + 32, where Triton, which knows only
powers of two, would compute 128 columns.
"""

import triton
import triton.language as tl

FIELDS = tl.constexpr(5)  # of a tile: moca_fast.span_mask.TILE_FIELDS; its rows come first
UNIT = tl.constexpr(8)  # strides are counted in units, so that Triton sees rows aligned for it
MIN_PIECE = 16  # columns: the least that tl.dot sums over


def pieces(dim: int) -> tuple[int, int]:
    """D1 and D2 of a head of `dim` columns."""
    first = 1 << (dim.bit_length() - 1)
    rest = dim - first
    return first, max(MIN_PIECE, triton.next_power_of_2(rest)) if rest else 0


@triton.jit
def tile_rows(tiles_ptr, tile, num_tiles):
    """Rows [begin, end) of a tile; none past the end of the plan."""
    record = tiles_ptr + tile * FIELDS
    begin = tl.load(record, mask=tile < num_tiles, other=0)
    end = tl.load(record + 1, mask=tile < num_tiles, other=0)
    return begin, end


@triton.jit
def next_rows(tiles_ptr, tile, first, last, programs, num_tiles):
    """Where a program goes on: row `first` of its tile or, past its `last`, its next tile."""
    if first >= last:
        tile += programs
        first, last = tile_rows(tiles_ptr, tile, num_tiles)
    return tile, first, last


@triton.jit
def place_of_queries(group, programs):
    """First tile, key head and query head of a program. Heads that share keys run side by side,
    then come the tiles of that key head, so that its keys stay in the second cache."""
    pid = tl.program_id(0)
    kv_head = pid // group // programs
    return pid // group % programs, kv_head, kv_head * group + pid % group


@triton.jit
def tile_blocks(start_ptr, end_ptr, first, last, size, COLUMNS: tl.constexpr):
    """The blocks that rows `first` to `last` need, of the `size` columns there are.

    Both ends of spans rise, so the rows need columns from the first one's start to the last one's
    end, and every row sees those from the last one's start to the first one's end.

    Returns the column where block 0 begins, the column where the last one stops, the number of
    blocks, and the first and last + 1 of those that every row sees whole.
    """
    begin = tl.maximum(tl.load(start_ptr + first), 0)
    stop = tl.minimum(tl.load(end_ptr + last), size)
    count = tl.cdiv(tl.maximum(stop - begin, 0), COLUMNS)
    whole_begin = tl.load(start_ptr + last) - begin
    whole_end = tl.minimum(tl.load(end_ptr + first), stop) - begin
    whole_from = tl.minimum(tl.cdiv(whole_begin, COLUMNS), count)
    whole_to = tl.maximum(whole_end // COLUMNS, whole_from)
    return begin, stop, count, whole_from, whole_to


@triton.jit
def load_piece(
    ptr, token, rows, seen, FROM: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Columns [FROM, FROM + WIDTH) of some rows of a head at `ptr`: (rows, WIDTH).

    0 past column D and, where MASKED, in the rows that are not `seen`.
    """
    columns = FROM + tl.arange(0, WIDTH)
    ptrs = ptr + rows[:, None] * token + columns[None, :]
    if FROM + WIDTH > D and MASKED:
        piece = tl.load(ptrs, mask=seen[:, None] & (columns < D)[None, :], other=0.0)
    elif FROM + WIDTH > D:
        piece = tl.load(ptrs, mask=(columns < D)[None, :], other=0.0)
    elif MASKED:
        piece = tl.load(ptrs, mask=seen[:, None], other=0.0)
    else:
        piece = tl.load(ptrs)
    return piece


@triton.jit
def load_rows(
    ptr, token, rows, seen, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Both pieces of some rows; where D2 is 0, the second stands for nothing and is not used."""
    first = load_piece(ptr, token, rows, seen, 0, D1, D, MASKED)
    second = first
    if D2 > 0:
        second = load_piece(ptr, token, rows, seen, D1, D2, D, MASKED)
    return first, second


@triton.jit
def store_rows(
    ptr, token, rows, kept, first, second, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr
):
    """Write both pieces of the rows that are `kept`, in the dtype of `ptr`."""
    columns = tl.arange(0, D1)
    ptrs = ptr + rows[:, None] * token + columns[None, :]
    tl.store(ptrs, first.to(ptr.dtype.element_ty), mask=kept[:, None])
    if D2 > 0:
        columns = D1 + tl.arange(0, D2)
        ptrs = ptr + rows[:, None] * token + columns[None, :]
        mask = kept[:, None] & (columns < D)[None, :]
        tl.store(ptrs, second.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def dot_rows(a1, a2, b1, b2, D2: tl.constexpr):
    """a @ b.T in float32 of two heads in pieces: (rows of a, rows of b)."""
    product = tl.dot(a1, tl.trans(b1), input_precision="ieee")
    if D2 > 0:
        product = tl.dot(a2, tl.trans(b2), product, input_precision="ieee")
    return product
