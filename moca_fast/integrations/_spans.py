"""What the attention masks of transformers mean as spans of keys.

A padded batch of B rows, Q queries and K keys a row becomes one packed axis: padding is dropped,
and every query that is left sees one interval of the packed keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from moca_fast.span_mask import SpanMask


@dataclass(frozen=True)
class PackedLayout:
    """How a padded batch is packed.

    Args:
        mask: the packed queries' spans of packed keys.
        queries: (T,) int64, rows of the B * Q flattened queries that are computed; None for all.
        keys: (K',) int64, rows of the B * K flattened keys that are kept; None for all.
    """

    mask: SpanMask
    queries: Tensor | None = None
    keys: Tensor | None = None


@lru_cache(maxsize=16)
def unmasked(
    batch: int,
    queries: int,
    keys: int,
    causal: bool,
    window: int | None,
    device: torch.device,
    inference: bool,
) -> PackedLayout:
    """The layout of a batch without padding; the last query stands at the last key.

    Args:
        inference: whether inference mode is on: no backward can save what is made in it, so a
            layout is kept for each.
    """
    begin, end = intervals(queries, keys, keys - queries, causal, window, device)
    return pack_intervals(begin.expand(batch, -1), end.expand(batch, -1), keys)


def intervals(
    queries: int,
    keys: int,
    offset: int,
    causal: bool,
    window: int | None,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """The keys [begin, end) each query of a row sees: (1, Q) int64 each.

    Args:
        offset: position of the first query among the keys.
        window: sees `window` tokens with itself if causal, else `window` to each side of itself,
            as transformers defines it; None for no limit.
    """
    position = torch.arange(queries, device=device)[None] + offset
    begin, end = torch.zeros_like(position), torch.full_like(position, keys)
    if window is not None:
        begin = position - window + (1 if causal else 0)
        end = position + window + 1
    if causal:
        end = position + 1
    return begin.clamp(0, keys), end.clamp(0, keys)


def documents_of_positions(position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Where the document of each token begins and ends: (B, Q) int64 each.

    As transformers reads it: a position that is not its predecessor's plus one begins a document.

    Args:
        position_ids: (B, Q) int.
    """
    index = torch.arange(position_ids.shape[1], device=position_ids.device).expand_as(position_ids)
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    begin = torch.where(starts, index, 0).cummax(dim=1).values
    last = torch.ones_like(starts)
    last[:, :-1] = starts[:, 1:]
    end = torch.where(last, index + 1, index.shape[1]).flip(1).cummin(dim=1).values.flip(1)
    return begin, end


def dense_intervals(visible: Tensor) -> tuple[Tensor, Tensor]:
    """The one interval of keys each query sees: (B, Q) int64 each.

    Args:
        visible: (B, Q, K) bool.

    Raises:
        ValueError: a query whose keys are not contiguous.
    """
    count = visible.sum(dim=-1)
    begin = visible.int().argmax(dim=-1)
    end = begin + count
    reversed_begin = visible.flip(-1).int().argmax(dim=-1)
    last = torch.where(count > 0, visible.shape[-1] - reversed_begin, end)
    if (last != end).any():
        batch, query = (last != end).nonzero()[0].tolist()
        raise ValueError(
            "moca_fast: expected every query to see one contiguous interval of keys, but the "
            f"attention mask of row {batch} has gaps at query {query}"
        )
    return begin, end


def pack_intervals(
    begin: Tensor,
    end: Tensor,
    keys: int,
    *,
    kept_keys: Tensor | None = None,
    kept_queries: Tensor | None = None,
) -> PackedLayout:
    """Drop padding and put the rows of a batch one after another.

    Args:
        begin, end: (B, Q) int64, the keys of its own row that each query sees.
        keys: K.
        kept_keys: (B, K) bool, false for padding; None for no padding.
        kept_queries: (B, Q) bool, false for queries whose output is to be zero; None for none.

    Raises:
        ValueError: intervals that are not non-decreasing along a row.
    """
    batch, device = begin.shape[0], begin.device
    end = torch.maximum(begin, end)
    base = torch.arange(batch, device=device)[:, None] * keys
    begin, end = begin + base, end + base
    total, key_rows = batch * keys, None
    if kept_keys is not None:
        kept = kept_keys.reshape(-1)
        before = torch.nn.functional.pad(kept.cumsum(0), (1, 0))
        begin, end = before[begin], before[end]
        key_rows = kept.nonzero().squeeze(1)
        total = key_rows.shape[0]
    computed = begin < end
    if kept_queries is not None:
        computed &= kept_queries
    query_rows = None
    if kept_keys is not None or not bool(computed.all()):
        query_rows = computed.reshape(-1).nonzero().squeeze(1)
    start, stop = (x.reshape(-1).to(torch.int32) for x in (begin, end))
    if query_rows is not None:
        start, stop = start[query_rows], stop[query_rows]
    if bool((start[1:] < start[:-1]).any() | (stop[1:] < stop[:-1]).any()):
        raise ValueError(
            "moca_fast: expected an attention mask whose intervals of keys never move back from "
            "one query to the next"
        )
    mask = SpanMask(start, stop, num_keys=total, validate=False)
    return PackedLayout(mask, query_rows, key_rows)
