"""attention on the CUDA kernels (csrc/attention/*.cu): tensor cores, and so 16-bit dtypes only.

Weights are 0, not absent, where a document shares a tile with another: NaN or infinity in its
values reaches rows of the same tile.
"""

import torch
from torch import Tensor

from moca_fast import _C
from moca_fast._cuda import queue, unsupported_tensors
from moca_fast._native import DTYPES
from moca_fast.ops.attention.op import TILE_ROWS

CHUNK = 8  # values in 16 bytes, which kernels read at a time


def unsupported(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if reason := unsupported_tensors(q, k, v):
        return reason
    if q.dtype == torch.float32:
        return "float32 has no CUDA kernel: they run on tensor cores, in products of 16 bits"
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, plan: list[Tensor], softmax_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    q, scale, _ = _positive(q, softmax_scale)
    q, k, v = _rows(q), _rows(k), _rows(v)
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    _C.attention_forward_cuda(_params(q, k, v, out, lse, plan, scale), queue(q))
    # Weights are rounded to 16 bits: what rounding took from lse does not show.
    return out, lse, torch.zeros_like(lse)


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
    # No sum here depends on the order in which blocks run.
    q, scale, sign = _positive(q, softmax_scale)
    q, k, v = _rows(q), _rows(k), _rows(v)
    d_out, d_lse = _rows(d_out.contiguous()), d_lse.to(torch.float32).contiguous()
    d_q, d_k, d_v = (x.new_empty(x.shape) for x in (q, k, v))
    sums = q.new_empty((2, lse.numel()), dtype=torch.float32)  # working memory
    _C.attention_backward_cuda(
        _params(q, k, v, out, lse, plan, scale),
        d_out=d_out.data_ptr(),
        d_lse=d_lse.data_ptr(),
        rows=sums.data_ptr(),
        d_q=d_q.data_ptr(),
        d_k=d_k.data_ptr(),
        d_v=d_v.data_ptr(),
        queue=queue(q),
    )
    return d_q if sign == 1 else d_q * sign, d_k, d_v


def _positive(q: Tensor, softmax_scale: float) -> tuple[Tensor, float, int]:
    """Kernels find the largest score before they scale it: q takes the sign, or the 0."""
    sign = (softmax_scale > 0) - (softmax_scale < 0)
    return (q if sign == 1 else q * sign), abs(softmax_scale) or 1.0, sign


def _rows(x: Tensor) -> Tensor:
    """The kernels take any strides of tokens and heads, but whole rows of D at multiples of 16
    bytes."""
    aligned = x.data_ptr() % 16 == 0 and all(stride % CHUNK == 0 for stride in x.stride()[:2])
    if aligned and x.stride(2) == 1:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _params(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: list[Tensor],
    softmax_scale: float,
) -> "_C.AttentionCudaParams":
    return _C.AttentionCudaParams(
        q=q.data_ptr(),
        k=k.data_ptr(),
        v=v.data_ptr(),
        q_token=q.stride(0),
        q_head=q.stride(1),
        k_token=k.stride(0),
        k_head=k.stride(1),
        v_token=v.stride(0),
        v_head=v.stride(1),
        out=out.data_ptr(),
        lse=lse.data_ptr(),
        queries=_spans(*plan[:3]),
        keys=_spans(*plan[3:]),
        tile_rows=TILE_ROWS["cuda"],
        heads=q.shape[1],
        kv_heads=k.shape[1],
        dim=q.shape[2],
        softmax_scale=softmax_scale,
        dtype=DTYPES[q.dtype],
    )


def _spans(start: Tensor, end: Tensor, tiles: Tensor) -> "_C.Spans":
    return _C.Spans(
        start=start.data_ptr(),
        end=end.data_ptr(),
        tiles=tiles.data_ptr(),
        size=start.shape[0],
        max_tiles=tiles.shape[0],
    )
