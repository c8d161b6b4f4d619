"""The packed entry point of the flash-attn package (Dao-AILab/flash-attention), on our attention.

B documents, T query tokens, K key tokens, H query heads, Hkv key-value heads, D dim of a head.
"""

import torch
from torch import Tensor

from moca_fast._checks import check_int, check_real, check_tensor
from moca_fast.ops.attention.op import attention
from moca_fast.span_mask import SpanMask, check_cu_seqlens

OP = "flash_attn_varlen_func"


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Attention of packed documents, called as flash_attn.flash_attn_varlen_func is.

    Query i of a document with n queries and m keys sees its keys j with
    i + m - n - left <= j <= i + m - n + right, where (left, right) = window_size, -1 is no limit,
    and `causal` makes right 0: the last query is aligned with the last key.

    Args:
        q: (T, H, D). k, v: (K, Hkv, D), same dtype, H a multiple of Hkv.
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32, where each document's queries and keys begin,
            and where the last ends; tokens past that see nothing and give 0.
        max_seqlen_q, max_seqlen_k: at least the longest document; checked on the CPU, not needed.
        softmax_scale: factor on the scores, a finite float or 0-d tensor; default D ** -0.5.
        deterministic: changes nothing, as in `moca_fast.attention`, whose backward repeats anyway.
        return_attn_probs: also return the log-sum-exp of each row, and None (flash-attn has
            probabilities to return only where there is dropout).
        dropout_p, softcap, alibi_slopes, block_table: not supported; only their defaults pass.

    Returns:
        (T, H, D); with `return_attn_probs` also lse (H, T) float32, and None.

    Raises:
        ValueError: an argument that is not supported, shapes, devices, cu_seqlens or maxima that
            do not fit, or a scale that is not finite.
        TypeError: a wrong dtype, a scale that is no number, or a `causal` that is no bool.
    """
    _refuse(dropout_p, softcap, alibi_slopes, block_table)
    if softmax_scale is not None:
        check_real(OP, "softmax_scale", softmax_scale)
    if not isinstance(causal, bool):
        raise TypeError(f"moca_fast.{OP}: causal: expected True or False, got {causal!r}")
    for name, x in (("q", q), ("k", k)):
        if not isinstance(x, Tensor) or x.dim() != 3:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"moca_fast.{OP}: {name}: expected a (tokens, heads, D) tensor, got {got}"
            )
    check_cu_seqlens(OP, "cu_seqlens_q", cu_seqlens_q, q.shape[0])
    check_cu_seqlens(OP, "cu_seqlens_k", cu_seqlens_k, k.shape[0])
    shape = cu_seqlens_q.shape
    dtypes = (torch.int32, torch.int64)
    check_tensor(OP, "cu_seqlens_k", cu_seqlens_k, shape=shape, dtypes=dtypes, like=cu_seqlens_q)
    _check_longest("max_seqlen_q", max_seqlen_q, cu_seqlens_q)
    _check_longest("max_seqlen_k", max_seqlen_k, cu_seqlens_k)
    left, right = _window(window_size, q.shape[0] + k.shape[0])
    mask = _mask(cu_seqlens_q, cu_seqlens_k, q.shape[0], k.shape[0], left, 0 if causal else right)
    out, lse = attention(
        q, k, v, mask, softmax_scale=softmax_scale, return_lse=True, deterministic=deterministic
    )
    return (out, lse.t().contiguous(), None) if return_attn_probs else out


def _refuse(
    dropout_p: float, softcap: float, alibi_slopes: Tensor | None, block_table: Tensor | None
) -> None:
    for name, value, default in (
        ("dropout_p", dropout_p, 0.0),
        ("softcap", softcap, 0.0),
        ("alibi_slopes", alibi_slopes, None),
        ("block_table", block_table, None),
    ):
        if value is not default and (default is None or value != default):
            got = "a tensor" if isinstance(value, Tensor) else repr(value)
            raise ValueError(
                f"moca_fast.{OP}: {name}: not supported, expected {default}, got {got}"
            )


def _window(window_size: tuple[int, int], widest: int) -> tuple[int, int]:
    """Its sides, none wider than there are tokens: sums of positions stay in the range of int32."""
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise ValueError(
            f"moca_fast.{OP}: window_size: expected (left, right), got {window_size!r}"
        )
    for side in window_size:
        check_int(OP, "window_size", side)
    left, right = window_size
    return torch.sym_min(left, widest), torch.sym_min(right, widest)


def _check_longest(name: str, longest: int, cu_seqlens: Tensor) -> None:
    check_int(OP, name, longest)
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling() or len(cu_seqlens) < 2:
        return
    actual = int(cu_seqlens.diff().max())
    if longest < actual:
        raise ValueError(f"moca_fast.{OP}: {name}: expected at least {actual}, got {longest}")


def _mask(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, queries: int, keys: int, left: int, right: int
) -> SpanMask:
    starts_q, starts_k = _closed(cu_seqlens_q), _closed(cu_seqlens_k)
    token = torch.arange(queries, dtype=torch.int32, device=cu_seqlens_q.device)
    document = torch.searchsorted(starts_q[:-1], token, right=True)
    first, last = starts_k[document - 1], starts_k[document]
    # The key that stands level with this query when the ends of both sides are aligned.
    level = token - starts_q[document] + last
    start = first if left < 0 else torch.maximum(first, level - left)
    end = last if right < 0 else torch.minimum(last, level + right + 1)
    start = torch.minimum(start, last)
    return SpanMask(start, torch.maximum(start, end), keys, validate=False)


def _closed(cu_seqlens: Tensor) -> Tensor:
    """cu_seqlens with an empty document at the end, for tokens past the last one."""
    bounds = cu_seqlens.to(torch.int32)
    return torch.cat([bounds, bounds[-1:]])
