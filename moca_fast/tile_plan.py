"""The tile plan of SpanMask.tiles, made on the accelerator: nothing waits for it.

The same tiles that csrc/attention/plan.h makes on the host, in another order: those with the most
keys first, so that a GPU ends with short ones and its last wave is even.

T rows (queries), N tiles that the plan has room for.
"""

import torch
from torch import Tensor


def device_tiles(start: Tensor, end: Tensor, rows: int, max_tiles: int) -> Tensor:
    """The plan of spans [start, end) in tiles of at most `rows` rows.

    Where a tile ends depends only on where it begins, so all such steps are made at once, and
    the tiles' first rows follow by doubling: knowing 2^k tiles and the step over 2^k tiles gives
    2^(k+1) of each.

    Args:
        start, end: (T,) int32.
        max_tiles: N.

    Returns:
        (N, 5) int32: row_begin, row_end, key_begin, key_end and masked; unused tiles last, all 0.
    """
    size = start.shape[0]
    if size == 0:
        return start.new_zeros(max_tiles, 5)
    step = _next_tile(start, end, rows)
    begin = step.new_zeros(1)
    while begin.shape[0] <= max_tiles:
        begin = torch.cat([begin, step[begin]])
        step = step[step]
    begin, stop = begin[:max_tiles], begin[1 : max_tiles + 1]
    first, last = begin.clamp(max=size - 1), stop - 1
    key_begin, key_end = start[first], end[last]
    masked = (key_begin != start[last]) | (key_end != end[first])
    used = begin < stop
    order = torch.where(used, key_end - key_begin, -1).argsort(descending=True, stable=True)
    tiles = torch.stack([begin, stop, key_begin, key_end, masked], dim=1)
    return torch.where(used[:, None], tiles, 0)[order].to(torch.int32)


def _next_tile(start: Tensor, end: Tensor, rows: int) -> Tensor:
    """(T + 1,) int64: for a tile that begins at a row, the row where the next one begins.

    Rows belong to one document as long as neighbours share a key. A document of more than `rows`
    rows is sliced; shorter ones are taken whole while they fit.
    """
    size = start.shape[0]
    row = torch.arange(size + 1, device=start.device)
    apart = (start[1:] >= end[:-1]) | (start[1:] >= end[1:])
    document = torch.cat([apart.new_zeros(1), apart]).cumsum(0)
    opens = torch.searchsorted(document, document)  # the first row of each row's document
    closes = torch.searchsorted(document, document, right=True)
    opens = torch.cat([opens, row[-1:]])
    ahead = (row + rows).clamp(max=size)
    sliced = torch.minimum(ahead[:-1], closes)
    # No document that is too long lies whole between a row and `ahead`, so this is not within one.
    whole = opens[ahead[:-1]]
    return torch.cat([torch.where(closes - opens[:-1] > rows, sliced, whole), row[-1:]])
