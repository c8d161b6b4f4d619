"""What the attention masks of transformers mean as spans of keys.

A padded batch of B rows, Q queries and K keys a row becomes one packed axis: padding is dropped,
and every query that is left sees one interval of the packed keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)

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


@dataclass
class MaskRequest:
    """The arguments of the mask interface, resolved by the first attention layer that needs them.

    transformers asks for a mask once a forward, before it says whether the batch is packed. So
    nothing is computed until a layer asks, and what it gets is kept for the other layers.
    """

    batch_size: int
    q_length: int
    kv_length: int
    q_offset: int | Tensor = 0  # a tensor for bidirectional masks of static caches only
    kv_offset: int = 0
    mask_function: Callable = causal_mask_function
    attention_mask: Tensor | None = None
    local_size: int | None = None
    exact: bool = True  # the mask function is the plain one, with nothing laid over it
    use_vmap: bool = False
    device: torch.device | str = "cpu"
    layouts: dict[tuple, PackedLayout] = field(default_factory=dict, repr=False)

    @property
    def padding(self) -> Tensor | None:
        """(B, K) bool, true for keys that are no padding; None if no mask was given."""
        if self.attention_mask is None:
            return None
        mask = self.attention_mask.bool()
        missing = self.kv_length + self.kv_offset - mask.shape[-1]
        mask = torch.nn.functional.pad(mask, (0, max(missing, 0)))
        return mask[:, self.kv_offset : self.kv_offset + self.kv_length]

    def plain(self, sliding_window: int | None) -> bool:
        """Whether spans follow from the arguments, without evaluating the mask function."""
        if self.mask_function in (causal_mask_function, bidirectional_mask_function):
            return self.local_size == sliding_window
        return self.exact and sliding_window is not None and self.local_size == sliding_window

    def dense(self) -> Tensor:
        """(B, Q, K) bool, true where a query sees a key: for masks that `plain` does not know."""
        mask: Any = sdpa_mask(
            batch_size=self.batch_size,
            q_length=self.q_length,
            kv_length=self.kv_length,
            q_offset=self.q_offset,  # type: ignore[arg-type]  # a tensor where it passes one
            kv_offset=self.kv_offset,
            mask_function=self.mask_function,
            attention_mask=self.attention_mask,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            use_vmap=self.use_vmap,
            device=self.device,
        )
        return mask[:, 0]

    def contiguous(self) -> Tensor:
        """(B, 1, Q, K) bool: `generate` calls it on the masks it makes ahead for static caches."""
        return self.dense()[:, None].contiguous()


def request_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> MaskRequest | Tensor:
    """The mask interface: keeps what transformers asks for, for the attention function.

    Where it starts from a tensor it is the (B, 1, Q, K) mask: a static cache moves that tensor on
    before a layer asks.
    """
    request = MaskRequest(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function,
        attention_mask,
        local_size,
        exact=(allow_is_causal_skip or allow_is_bidirectional_skip) and not use_vmap,
        use_vmap=use_vmap,
        device=device,
    )
    if isinstance(q_offset, Tensor) and mask_function is not bidirectional_mask_function:
        return request.dense()[:, None]
    return request


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


def padded_layout(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: MaskRequest | Tensor | None,
    causal: bool,
    window: int | None,
    position_ids: Tensor | None,
) -> PackedLayout:
    """The layout of a batch of rows, with or without padding.

    Args:
        query: (B, H, Q, D).
        key: (B, Hkv, K, D).
        attention_mask: what `request_mask` returned, or (B, K), or (B, 1, Q, K).
        causal, window: as the layer attends; see `intervals`.
        position_ids: (B, Q), which restart with each document where there is no mask.
    """
    batch, queries, keys, device = query.shape[0], query.shape[2], key.shape[2], query.device
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 4:
        return pack_intervals(*dense_intervals(_visible(attention_mask, batch, keys)), keys)
    if isinstance(attention_mask, Tensor):
        attention_mask = MaskRequest(
            batch, queries, keys, keys - queries, attention_mask=attention_mask, local_size=window,
            device=device,
        )  # fmt: skip
    packable = attention_mask is None or attention_mask.attention_mask is None
    if not packable or queries != keys or position_ids is None or position_ids.dim() != 2:
        position_ids = None
    inference = torch.is_inference_mode_enabled()
    if attention_mask is None:
        if position_ids is None:
            return unmasked(batch, queries, keys, causal, window, device, inference)
        attention_mask = MaskRequest(batch, queries, keys, local_size=window, device=device)
    name = (causal, window, device, inference)
    if name not in attention_mask.layouts:
        attention_mask.layouts[name] = _resolve(
            module, attention_mask, causal, window, position_ids, device
        )
    return attention_mask.layouts[name]


def _resolve(
    module: nn.Module,
    request: MaskRequest,
    causal: bool,
    window: int | None,
    position_ids: Tensor | None,
    device: torch.device,
) -> PackedLayout:
    queries, keys = request.q_length, request.kv_length
    offset = int(request.q_offset) - request.kv_offset
    padding = request.padding
    if padding is not None:
        padding = padding.to(device)
    if not request.plain(window):
        begin, end = dense_intervals(request.dense().to(device))
        return pack_intervals(begin, end, keys)
    causal = causal and "bidirectional" not in request.mask_function.__qualname__
    begin, end = intervals(queries, keys, offset, causal, window, device)
    begin, end = begin.expand(request.batch_size, -1), end.expand(request.batch_size, -1)
    if position_ids is not None:
        first, last = documents_of_positions(position_ids.expand(request.batch_size, -1))
        begin, end = torch.maximum(begin, first), torch.minimum(end, last)
    return pack_intervals(
        begin,
        end,
        keys,
        kept_keys=padding,
        kept_queries=padding if _attends_itself(module, queries, keys) else None,
    )


def _attends_itself(module: nn.Module, queries: int, keys: int) -> bool:
    """Whether the mask of the keys is that of the queries too."""
    config = getattr(module, "config", None)
    crosses = getattr(module, "is_cross_attention", False)
    return queries == keys and not crosses and not getattr(config, "is_encoder_decoder", False)


def _visible(mask: Tensor, batch: int, keys: int) -> Tensor:
    """(B, Q, K) bool from a (B, 1, Q, K) mask, boolean or added to the scores."""
    if mask.shape[1] != 1:
        raise ValueError(f"moca_fast: expected one mask for all heads, got {mask.shape[1]}")
    mask = mask[:, 0, :, :keys].expand(batch, -1, -1)
    if mask.dtype == torch.bool:
        return mask
    visible = mask == 0
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    if not bool((visible | hidden).all()):
        raise ValueError(
            "moca_fast: expected an attention mask of 0 and the lowest value, got a bias on the "
            "scores"
        )
    return visible
