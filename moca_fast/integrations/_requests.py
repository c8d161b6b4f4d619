"""What transformers asks for when it makes masks, and the layouts of padded and packed batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)

from moca_fast.integrations._spans import (
    PackedLayout,
    dense_intervals,
    documents_of_positions,
    intervals,
    pack_intervals,
    unmasked,
)

_PLAIN = (causal_mask_function, bidirectional_mask_function)
# The parts of transformers' mask functions that boundaries, causality and a window say as well.
_BIDIRECTIONAL = "bidirectional_mask_function"
_RESTARTING = "packed_sequence_mask_function.<locals>.inner_mask"  # positions tell documents apart
_PACKABLE = {
    "causal_mask_function",
    _BIDIRECTIONAL,
    "sliding_window_overlay.<locals>.inner_mask",
    "sliding_window_bidirectional_overlay.<locals>.inner_mask",
    "and_masks.<locals>.and_mask",
    "remap_positions_for_packed_sequence.<locals>.inner_mask",
    _RESTARTING,
}


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
    layouts: dict[tuple | str, PackedLayout] = field(default_factory=dict, repr=False)

    @property
    def ndim(self) -> int:
        """Of the mask it stands for: models that make the mask outside of their inner model ask."""
        return 4

    @property
    def shape(self) -> tuple[int, ...]:
        return self.batch_size, 1, self.q_length, self.kv_length

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
        if self.mask_function in _PLAIN:
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

    def packed(
        self, cu_seqlens: Tensor, window: int | None
    ) -> PackedLayout | tuple[bool, int | None]:
        """What it asks for in a packed batch: whether causal, and the window, where boundaries and
        these say it all; else the layout, from all pairs of tokens.

        Args:
            cu_seqlens: (B + 1,) int32.
            window: of the layer.

        Raises:
            ValueError: a mask of another kind, in which nothing tells the documents apart.
        """
        if torch.compiler.is_compiling():
            self._check_traced(window)
            return True, window
        parts = mask_parts(self.mask_function)
        if parts <= _PACKABLE:
            return _BIDIRECTIONAL not in parts, self.local_size
        if _RESTARTING not in parts or self.batch_size != 1:
            raise ValueError(
                f"moca_fast: the model's mask is made of {', '.join(sorted(parts - _PACKABLE))}, "
                "which cu_seq_lens_q says nothing of: expected one row (1, T), use_cache=False and "
                "position_ids that restart with each document beside it"
            )
        if "packed" not in self.layouts:
            device = cu_seqlens.device
            index = torch.arange(self.q_length, device=device)
            document = torch.searchsorted(cu_seqlens[1:], index, right=True)
            bounds = torch.cat([cu_seqlens, cu_seqlens[-1:]]).long()  # rows past the last see none
            begin, end = dense_intervals(self.dense().to(device))
            begin = torch.maximum(begin, bounds[document])
            end = torch.minimum(end, bounds[document + 1])
            self.layouts["packed"] = pack_intervals(begin, end, self.kv_length)
        return self.layouts["packed"]

    def _check_traced(self, window: int | None) -> None:
        """While torch.compile traces, only the outermost of the functions can be looked at."""
        plain = self.mask_function.__name__ in ("and_mask", *(f.__name__ for f in _PLAIN))
        if not plain or self.use_vmap or self.local_size != window:
            raise ValueError(
                "moca_fast: the model's mask is no plain one, and torch.compile does not show what "
                "it is made of: run the model without torch.compile"
            )

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
    attention_mask: Tensor | MaskRequest | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> MaskRequest | Tensor:
    """The mask interface: keeps what transformers asks for, for the attention function.

    Where it starts from a tensor it is the (B, 1, Q, K) mask: a static cache moves that tensor on
    before a layer asks. A model that was given what it returned asks again: it is returned again.
    """
    if isinstance(attention_mask, MaskRequest):
        return attention_mask
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


def mask_parts(function: Callable) -> set[str]:
    """The names of a mask function and of those that transformers made it of."""
    names = {getattr(function, "__qualname__", repr(function))}
    code = getattr(function, "__code__", None)
    cells = zip(code.co_freevars, function.__closure__ or (), strict=True) if code else ()
    for name, cell in cells:
        if name == "mask_function":
            names |= mask_parts(cell.cell_contents)
        elif name == "mask_functions":
            names.update(*map(mask_parts, cell.cell_contents))
    return names


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
    if isinstance(attention_mask, Tensor):
        _check_mask(attention_mask, batch, queries, keys)
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


def _check_mask(mask: Tensor, batch: int, queries: int, keys: int) -> None:
    shape = tuple(mask.shape)
    if mask.dim() == 4:  # static caches are wider than what is used of them
        fits = shape[0] in (1, batch) and shape[1:3] == (1, queries) and shape[3] >= keys
        fits = fits and (mask.dtype == torch.bool or mask.is_floating_point())
    else:
        fits = mask.dim() == 2 and shape[0] == batch and shape[1] >= keys
    if not fits:
        raise ValueError(
            f"moca_fast: expected an attention mask ({batch}, {keys}), or one for all heads "
            f"({batch}, 1, {queries}, {keys}) of bool or floats, got {shape} of {mask.dtype}"
        )


def _visible(mask: Tensor, batch: int, keys: int) -> Tensor:
    """(B, Q, K) bool from a (B, 1, Q, K) mask, boolean or added to the scores."""
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
