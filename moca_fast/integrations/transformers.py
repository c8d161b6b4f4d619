"""`attn_implementation="moca_fast"` for transformers models, text and vision, padded or packed.

Importing this module registers the attention function and its mask interface. Packed batches name
their documents with the forward arguments of `packed_kwargs`; padded ones are unpadded here.
`make_bidirectional` turns a causal language model into a MoCa encoder (arXiv 2506.23115), and
`use_mrope` lets its layers turn queries and keys by `moca_fast.mrope`.

B rows of a batch, Q queries and K keys a row, T packed tokens, H / Hkv heads, D dim of a head.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from moca_fast.integrations._requests import MaskRequest, padded_layout, request_mask
from moca_fast.integrations._rotary import use_mrope
from moca_fast.integrations._selftest import check_bidirectional, check_isolated
from moca_fast.integrations._spans import PackedLayout
from moca_fast.ops.attention.op import attention
from moca_fast.span_mask import SpanMask

__all__ = [
    "attention_forward",
    "make_bidirectional",
    "pack_vision",
    "packed_kwargs",
    "use_mrope",
]

NAME = "moca_fast"
# Arguments of other attention functions that change the result and that the op does not have.
UNSUPPORTED = ("position_bias", "softcap", "s_aux", "head_mask", "cache")
VARLEN = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
# Masks of packed batches kept: full and windowed vision, and text, forward and checkpointed.
CACHED_MASKS = 8


def packed_kwargs(cu_seqlens: Tensor, max_length: int | None = None) -> dict[str, Any]:
    """The forward arguments that tell a transformers model where packed documents begin.

    The batch is one row: input_ids (1, T). Position ids must restart with each document, (1, T),
    or (4, 1, T) with a text row first for the multimodal rotary positions of Qwen-VL.

    Args:
        cu_seqlens: (B + 1,) int32, where documents begin, and T.
        max_length: tokens of the longest document; read from cu_seqlens if left out.
    """
    if max_length is None:
        max_length = int(cu_seqlens.diff().max()) if len(cu_seqlens) > 1 else 0
    return dict(zip(VARLEN, (cu_seqlens, cu_seqlens, max_length, max_length), strict=True))


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: MaskRequest | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    span_mask: SpanMask | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers models call.

    Args:
        module: the attention layer; causal unless it, its config or `is_causal` says otherwise.
        query: (B, H, Q, D).
        key, value: (B, Hkv, K, D).
        attention_mask: what `request_mask` returned, or (B, K) with true for tokens that are seen,
            or (B, 1, Q, K), true or 0 where a query sees a key.
        scaling: factor on the scores; default D ** -0.5.
        dropout: must be 0.
        is_causal: overrides the layer's own flag.
        sliding_window: tokens seen, as transformers counts them.
        span_mask: the mask of the packed batch, where the caller made it.
        kwargs: cu_seq_lens_q and cu_seq_lens_k (`packed_kwargs`); position_ids (B, Q), which
            restart with each document when a batch without a mask is packed.

    Returns:
        (B, Q, H, D), zero in padding rows, and None for the attention weights.

    Raises:
        ValueError: what the op cannot do (dropout, biases, masks with gaps), or arguments that
            contradict each other.
    """
    _refuse(module, dropout, kwargs)
    batch, heads, queries, dim = query.shape
    query, key, value = _autocast(query, key, value)
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    if cu_seqlens is None and kwargs.get("cu_seq_lens_k") is not None:
        raise ValueError("moca_fast: expected cu_seq_lens_q beside cu_seq_lens_k, got none")
    causal = _is_causal(module, is_causal)
    if span_mask is not None:
        layout = PackedLayout(span_mask)
    elif cu_seqlens is not None:
        _check_packed(module, query, key, attention_mask, kwargs)
        layout = _packed_layout(attention_mask, cu_seqlens, batch * queries, causal, sliding_window)
    else:
        positions = kwargs.get("position_ids")
        layout = padded_layout(
            module, query, key, attention_mask, causal, sliding_window, positions
        )
    rows = _rows(query, layout.queries), _rows(key, layout.keys), _rows(value, layout.keys)
    out = cast(Tensor, attention(*rows, layout.mask, softmax_scale=scaling))
    if layout.queries is not None:
        out = out.new_zeros(batch * queries, heads, dim).index_copy(0, layout.queries, out)
    return out.view(batch, queries, heads, dim), None


def _refuse(module: nn.Module, dropout: float, kwargs: Mapping[str, Any]) -> None:
    if dropout:
        raise ValueError(
            f"moca_fast: expected attention dropout 0, got {dropout}: set attention_dropout=0 in "
            "the config"
        )
    for name in UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"moca_fast: {type(module).__name__} uses {name}, which this attention does not "
                "have; load the model with attn_implementation='eager'"
            )
    if kwargs.get("output_attentions"):
        raise ValueError(
            "moca_fast: attention weights are never formed, so output_attentions needs "
            "attn_implementation='eager'"
        )


def _autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast rotary positions leave q and k in float32 beside v in half precision."""
    device = query.device.type
    if not torch.is_autocast_enabled(device):
        return query, key, value
    dtype = torch.get_autocast_dtype(device)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _rows(x: Tensor, rows: Tensor | None) -> Tensor:
    """(B, H, L, D) to the packed (T, H, D)."""
    x = x.transpose(1, 2).flatten(0, 1)
    return x if rows is None else x.index_select(0, rows)


def _is_causal(module: nn.Module, is_causal: bool | None) -> bool:
    flag = getattr(module, "is_causal", True) if is_causal is None else is_causal
    return bool(flag) and getattr(getattr(module, "config", None), "is_causal", True) is not False


def _check_packed(
    module: nn.Module, query: Tensor, key: Tensor, attention_mask: object, kwargs: Mapping[str, Any]
) -> None:
    cu_q, cu_k = kwargs["cu_seq_lens_q"], kwargs.get("cu_seq_lens_k")
    if cu_k is not None and cu_k is not cu_q and not torch.equal(cu_q, cu_k):
        raise ValueError("moca_fast: expected cu_seq_lens_q and cu_seq_lens_k to be equal")
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"moca_fast: a packed batch cannot use a cache: expected {query.shape[2]} keys, got "
            f"{key.shape[2]}; pass use_cache=False"
        )
    if isinstance(attention_mask, MaskRequest):
        attention_mask = attention_mask.attention_mask
    if attention_mask is not None:
        raise ValueError("moca_fast: expected cu_seq_lens_q or an attention mask, got both")
    # Up to transformers 5.19 or so the text's cu_seq_lens reach the vision tower as well.
    if hasattr(getattr(module, "config", None), "spatial_merge_size"):
        raise ValueError(
            "moca_fast: the cu_seq_lens of the text reached the vision tower; call "
            "moca_fast.integrations.transformers.pack_vision(model) once after loading"
        )


def _packed_layout(
    request: object, cu_seqlens: Tensor, total: int, causal: bool, window: int | None
) -> PackedLayout:
    """The layout of a packed batch. Where transformers made a mask, that says what is seen: a layer
    may count its window as other attention functions do."""
    if isinstance(request, MaskRequest):
        found = request.packed(cu_seqlens, window)
        if isinstance(found, PackedLayout):
            return found
        causal, window = causal and found[0], found[1]
    return PackedLayout(_packed_mask(cu_seqlens, total, causal, window))


# The tensor, held so that its id cannot become another's; the values it had; their mask.
_masks: OrderedDict[tuple, tuple[Tensor, Tensor, SpanMask]] = OrderedDict()


def _packed_mask(cu_seqlens: Tensor, total: int, causal: bool, window: int | None) -> SpanMask:
    """The mask of a packed batch, made once for all layers that are given the same tensor.

    A buffer may be written to between batches. On the CPU its values are compared, which finds
    every write; elsewhere that would wait, and versions count writes, but not to inference tensors.
    """
    on_cpu = cu_seqlens.device.type == "cpu"
    if torch.compiler.is_compiling() or (cu_seqlens.is_inference() and not on_cpu):
        return _make_mask(cu_seqlens, total, causal, window)
    version = None if on_cpu else cu_seqlens._version
    inference = torch.is_inference_mode_enabled()
    name = (id(cu_seqlens), version, inference, total, causal, window)
    kept = _masks.get(name)
    if kept is None or (on_cpu and not torch.equal(kept[1], cu_seqlens)):
        values = cu_seqlens.clone() if on_cpu else cu_seqlens
        kept = _masks[name] = (cu_seqlens, values, _make_mask(values, total, causal, window))
        while len(_masks) > CACHED_MASKS:
            _masks.popitem(last=False)
    return kept[2]


def _make_mask(cu_seqlens: Tensor, total: int, causal: bool, window: int | None) -> SpanMask:
    if window is None:
        return (SpanMask.causal if causal else SpanMask.full)(cu_seqlens, total)
    # transformers counts the token itself in a causal window, and not in a bidirectional one.
    left, right = (window - 1, 0) if causal else (window, window)
    return SpanMask.window(cu_seqlens, left, right, total)


def pack_vision(model: nn.Module) -> int:
    """Make the vision tower of a Qwen-VL model attend all its windows in one call.

    Without it the tower calls the attention function once a window: right, but slow. The hooks act
    only while the tower's attention implementation is "moca_fast". Calling it twice is harmless.

    Returns:
        The number of attention layers it was installed on; 0 for a model without such a tower.
    """
    count = 0
    for module in model.modules():
        parameters = list(inspect.signature(type(module).forward).parameters)
        if "cu_seqlens" not in parameters or not hasattr(module, "is_causal"):
            continue
        module.register_forward_pre_hook(_pack_windows, with_kwargs=True)
        count += 1
    return count


def _pack_windows(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    config: Any = module.config
    if config._attn_implementation != NAME or "span_mask" in kwargs:
        return None
    bound = _named(module, args, kwargs)
    total = bound["hidden_states"].shape[0]
    cu_seqlens = bound["cu_seqlens"]
    for name in VARLEN:
        bound.pop(name, None)
    bound["span_mask"] = _packed_mask(cu_seqlens, total, False, None)
    # On the host, where the layer reads it to split its input: one chunk, all of it.
    bound["cu_seqlens"] = torch.tensor([0, total], dtype=torch.int32)
    return (), bound


def _named(module: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """All arguments of a forward by name."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return dict(zip(names, args, strict=False)) | kwargs


def _keep_documents_apart(module: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
    """Positions that restart without a text row of their own would be read as one document."""
    config: Any = module.config
    bound = _named(module, args, kwargs)
    positions = bound.get("position_ids")
    told = bound.get("attention_mask") is not None or bound.get("cu_seq_lens_q") is not None
    if config._attn_implementation != NAME or positions is None or told:
        return None
    if positions.dim() == 2:
        bound["position_ids"] = positions.expand(4, -1, -1)
        return (), bound
    # Videos move time back at their end; only a new document moves all three.
    looks = positions.shape[0] == 3 and not torch.compiler.is_compiling()
    if looks and bool((positions.diff(dim=-1) < 0).all(dim=0).any()):
        raise ValueError(
            "moca_fast: position_ids (3, B, T) restart, so several documents are packed, but "
            "nothing says where they begin: pass packed_kwargs(cu_seqlens) or positions "
            "(4, B, T) with a text row first"
        )
    return None


def make_bidirectional(model: PreTrainedModel, *, check: bool = True) -> PreTrainedModel:
    """Let every token of a language model see its whole document, and show that it does.

    Works for attention implementations "moca_fast", "sdpa" and "eager", text-only or Qwen-VL. The
    switch is saved with the config: a reload by plain transformers is bidirectional too.

    Args:
        model: a transformers model with causal attention; changed in place.
        check: run the self-test, a forward of a few random tokens without gradients.

    Returns:
        The same model.

    Raises:
        RuntimeError: the model is still causal, or documents of one pack see each other.
    """
    model.config.get_text_config().is_causal = False
    for module in model.modules():
        if getattr(module, "is_causal", None) is True:
            module.is_causal = False  # type: ignore[assignment]
            config = getattr(module, "config", None)
            if config is not None:
                config.is_causal = False
        if hasattr(getattr(module, "rotary_emb", None), "mrope_section"):
            module.register_forward_pre_hook(_keep_documents_apart, with_kwargs=True)
    pack_vision(model)
    if check:
        check_bidirectional(model)
        if model.config.get_text_config()._attn_implementation == NAME:
            check_isolated(model, packed_kwargs)
    return model


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, request_mask)
