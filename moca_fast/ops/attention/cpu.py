"""attention on the native CPU kernels (csrc/attention/cpu.cpp)."""

import torch
from torch import Tensor

from moca_fast import _C
from moca_fast._memory import empty_like
from moca_fast._native import DTYPES, unsupported_tensors


def unsupported(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    return unsupported_tensors(q, k, v)


def forward(
    q: Tensor, k: Tensor, v: Tensor, plan: list[Tensor], softmax_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _rows(q), _rows(k), _rows(v)
    out = empty_like(q)
    lse = torch.empty(q.shape[:2], dtype=torch.float32)
    lse_rest = torch.empty_like(lse)
    _C.attention_forward(_params(q, k, v, out, lse, lse_rest, plan, softmax_scale))
    return out, lse, lse_rest


def backward(
    d_out: Tensor,
    d_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lse_rest: Tensor,
    plan: list[Tensor],
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    # No sum here depends on the order in which threads finish.
    q, k, v, d_out = _rows(q), _rows(k), _rows(v), d_out.contiguous()
    d_q, d_k, d_v = (empty_like(x) for x in (q, k, v))
    d_lse = d_lse.to(torch.float32).contiguous()
    delta = torch.empty(lse.shape, dtype=torch.float32)  # working memory
    _C.attention_backward(
        _params(q, k, v, out, lse, lse_rest, plan, softmax_scale),
        d_out=d_out.data_ptr(),
        d_lse=d_lse.data_ptr(),
        delta=delta.data_ptr(),
        d_q=d_q.data_ptr(),
        d_k=d_k.data_ptr(),
        d_v=d_v.data_ptr(),
    )
    return d_q, d_k, d_v


def _rows(x: Tensor) -> Tensor:
    """The kernels take any strides of tokens and heads, but whole rows of D."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _params(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lse_rest: Tensor,
    plan: list[Tensor],
    softmax_scale: float,
) -> "_C.AttentionParams":
    return _C.AttentionParams(
        q=q.data_ptr(),
        k=k.data_ptr(),
        v=v.data_ptr(),
        out=out.data_ptr(),
        lse=lse.data_ptr(),
        lse_rest=lse_rest.data_ptr(),
        q_strides=q.stride()[:2],
        k_strides=k.stride()[:2],
        v_strides=v.stride()[:2],
        queries=_spans(*plan[:3]),
        keys=_spans(*plan[3:]),
        heads=q.shape[1],
        kv_heads=k.shape[1],
        dim=q.shape[2],
        softmax_scale=softmax_scale,
        dtype=DTYPES[q.dtype],
        threads=torch.get_num_threads(),
    )


def _spans(start: Tensor, end: Tensor, tiles: Tensor) -> "_C.Spans":
    return _C.Spans(
        start=start.data_ptr(),
        end=end.data_ptr(),
        tiles=tiles.data_ptr(),
        size=start.shape[0],
        max_tiles=tiles.shape[0],
    )
