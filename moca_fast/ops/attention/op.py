"""Scaled dot-product attention over packed documents, without a T x K array (FlashAttention,
arXiv 2205.14135), with one interval of keys for each query.

T query tokens, K key tokens, H query heads, Hkv key-value heads, D dim of a head.
"""

import torch
from torch import Tensor

from moca_fast import _dispatch
from moca_fast._checks import FLOATS, check_bool, check_real, check_tensor
from moca_fast._operator import operator
from moca_fast.span_mask import SpanMask

OP = "attention"
MIN_DIM, MAX_DIM, DIM_STEP = 16, 256, 8
# Rows of a tile in the plan that kernels follow, by device. A CPU packs keys once for all rows of a
# tile, or of several tiles of a long document; a GPU program takes 128, 64, 32 or 16 of them at a
# time.
TILE_ROWS = {"cpu": 256, "cuda": 128}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: SpanMask,
    *,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of packed queries over packed keys and values.

    out[i, h] = sum over j of softmax_j(scale * q[i, h] . k[j, g]) v[j, g], over the keys j that
    the mask lets query i see, where g = h // (H / Hkv) is the key-value head of query head h.

    Args:
        q: (T, H, D) float32, bfloat16, float16 or float64 (the reference only); D is a multiple
            of 8 from 16 to 256. Receives a gradient, as k and v do.
        k, v: (K, Hkv, D), same dtype; Hkv divides H. K = T unless the mask says otherwise.
        mask: the keys [start, end) each query sees, on the same device.
        softmax_scale: factor on the scores, a finite float or 0-d tensor, which gets no gradient;
            default D ** -0.5.
        return_lse: also return the log-sum-exp of each row's scaled scores (differentiable).
        deterministic: changes nothing: every backend's backward already repeats bit by bit, on a
            CPU for a given number of threads, and every forward, there for any number. Kept for
            callers that ask.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        (T, H, D) in the dtype of q, and with `return_lse` (T, H) float32. A query that sees no
        key gets output 0, lse -inf and gradient 0. What nobody sees reaches nobody, be it NaN. NaN
        and infinity in a document stay there on a CPU; on a GPU and in the reference they may reach
        documents beside it.

    Raises:
        ValueError: shapes or devices that do not fit, a scale that is not finite, or a backend that
            cannot run the call.
        TypeError: a wrong dtype, a mask that is not a SpanMask, a scale that is no number, or a
            flag that is no bool.
    """
    q, k, v = inputs(
        q, k, v, mask,
        softmax_scale=softmax_scale, return_lse=return_lse, deterministic=deterministic,
    )  # fmt: skip
    scale = q.shape[2] ** -0.5 if softmax_scale is None else float(softmax_scale)
    backend = _dispatch.requested(backend)
    out, lse, _ = torch.ops.moca_fast.attention(q, k, v, plan(mask), scale, backend)
    return (out, lse) if return_lse else out


def plan(mask: SpanMask) -> list[Tensor]:
    """What kernels read of a mask, made at its first call: start, end and tiles of the queries,
    then start, end and tiles of the keys, whose spans are the queries that see each key."""
    rows = TILE_ROWS.get(mask.device.type, TILE_ROWS["cpu"])
    keys = mask.transposed()
    return [mask.start, mask.end, mask.tiles(rows), keys.start, keys.end, keys.tiles(rows)]


def inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: SpanMask,
    *,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The checked tensors that backends are asked about."""
    if not isinstance(mask, SpanMask):
        raise TypeError(f"moca_fast.{OP}: mask: expected a SpanMask, got {type(mask).__name__}")
    check_tensor(OP, "q", q, shape=("T", "H", "D"), dtypes=FLOATS)
    heads, dim = q.shape[1:]
    if dim < MIN_DIM or dim > MAX_DIM or dim % DIM_STEP:
        raise ValueError(
            f"moca_fast.{OP}: q: expected D a multiple of {DIM_STEP} from {MIN_DIM} to {MAX_DIM}, "
            f"got {dim}"
        )
    check_tensor(OP, "k", k, shape=("K", "Hkv", dim), dtypes=(q.dtype,), like=q)
    check_tensor(OP, "v", v, shape=k.shape, dtypes=(q.dtype,), like=q)
    if heads == 0 or k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(
            f"moca_fast.{OP}: expected the {heads} heads of q to be a multiple of those of k, "
            f"got {k.shape[1]}"
        )
    if mask.num_queries != q.shape[0] or mask.num_keys != k.shape[0]:
        raise ValueError(
            f"moca_fast.{OP}: mask: expected {q.shape[0]} queries and {k.shape[0]} keys, as q and "
            f"k have, got {mask.num_queries} and {mask.num_keys}"
        )
    if mask.device != q.device:
        raise ValueError(f"moca_fast.{OP}: mask: expected device {q.device}, got {mask.device}")
    if softmax_scale is not None:
        check_real(OP, "softmax_scale", softmax_scale)
    check_bool(OP, "return_lse", return_lse)
    check_bool(OP, "deterministic", deterministic)
    return q, k, v


@operator("attention")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: list[Tensor],
    softmax_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, lse in float32, and what rounding took from lse, so that the backward finds the
    probabilities as exactly as the forward did."""
    kernel = _dispatch.select(OP, backend, q, k, v)
    return kernel.forward(q, k, v, plan, softmax_scale)


@operator("attention_backward")
def _backward(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = _dispatch.select(OP, backend, q, k, v)
    return kernel.backward(d_out, d_lse, q, k, v, out, lse, lse_rest, plan, softmax_scale)


@_forward.register_fake
def _(q, k, v, plan, softmax_scale, backend):
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    return q.new_empty(q.shape), lse, torch.empty_like(lse)


@_backward.register_fake
def _(d_out, d_lse, q, k, v, out, lse, lse_rest, plan, softmax_scale, backend):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    q, k, v, plan, ctx.softmax_scale, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, *output, *plan)


def _autograd(ctx, d_out, d_lse, _):
    q, k, v, out, lse, lse_rest, *plan = ctx.saved_tensors
    d_q, d_k, d_v = torch.ops.moca_fast.attention_backward(
        d_out,
        d_lse,
        q,
        k,
        v,
        out,
        lse,
        lse_rest,
        plan,
        ctx.softmax_scale,
        ctx.backend,
    )
    needs = ctx.needs_input_grad
    grads = [grad if need else None for grad, need in zip((d_q, d_k, d_v), needs, strict=False)]
    return *grads, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
