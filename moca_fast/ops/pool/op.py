"""Pooling of packed token states into one embedding a document, as MoCa (arXiv 2506.23115) does:
the mean over a document's tokens, or its last token, brought to unit length.

B documents, T packed tokens, D dim.
"""

import torch
from torch import Tensor

from moca_fast import _dispatch
from moca_fast._checks import FLOATS, check_bool, check_tensor
from moca_fast._operator import operator

OP = "pool"
MODES = ("mean", "last")


def pool(
    hidden: Tensor,
    cu_seqlens: Tensor,
    *,
    mode: str = "mean",
    normalize: bool = True,
    backend: str = "auto",
) -> Tensor:
    """One vector a document from its packed token states.

    x[b] = mean over t of hidden[t] for cu_seqlens[b] <= t < cu_seqlens[b + 1] (or the last such
    row); with `normalize`, x[b] / max(|x[b]|, 1e-12). Sums are in float32 or better.

    Args:
        hidden: (T, D) float32, bfloat16, float16 or float64; receives a gradient, which is zero
            for rows past the last document.
        cu_seqlens: (B + 1,) int32, where documents begin; starts at 0, never decreases, and ends
            at no more than T. A document may be empty: it pools to the zero vector.
        mode: "mean" or "last".
        normalize: bring every vector to unit length.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        (B, D) float32 (float64 for float64 states).

    Raises:
        ValueError: shapes, devices or boundaries that do not fit, an unknown mode, or a backend
            that cannot run the call. The kernels for GPUs, which never wait for the device, do not
            look at all boundaries first: a document that begins after its end or ends past T
            pools to NaN.
        TypeError: a wrong dtype, or not a tensor.
    """
    hidden, cu_seqlens = inputs(hidden, cu_seqlens, mode=mode, normalize=normalize)
    backend = _dispatch.requested(backend)
    return torch.ops.moca_fast.pool(hidden, cu_seqlens, mode == "mean", normalize, backend)[0]


def inputs(
    hidden: Tensor, cu_seqlens: Tensor, *, mode: str = "mean", normalize: bool = True
) -> tuple[Tensor, Tensor]:
    """The checked tensors that backends are asked about."""
    check_tensor(OP, "hidden", hidden, shape=("T", "D"), dtypes=FLOATS)
    check_tensor(OP, "cu_seqlens", cu_seqlens, shape=("B + 1",), dtypes=(torch.int32,), like=hidden)
    if cu_seqlens.shape[0] == 0:
        raise ValueError(f"moca_fast.{OP}: cu_seqlens: expected B + 1 entries, got none")
    if mode not in MODES:
        raise ValueError(f"moca_fast.{OP}: mode: expected one of {MODES}, got {mode!r}")
    check_bool(OP, "normalize", normalize)
    return hidden, cu_seqlens


@operator("pool")
def _forward(
    hidden: Tensor, cu_seqlens: Tensor, mean: bool, normalize: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """Pooled vectors (B, D), and the lengths (B,) they were divided by."""
    kernel = _dispatch.select(OP, backend, hidden, cu_seqlens)
    return kernel.forward(hidden, cu_seqlens, mean, normalize)


@operator("pool_backward")
def _backward(
    d_pooled: Tensor,
    hidden: Tensor,
    cu_seqlens: Tensor,
    pooled: Tensor,
    norm: Tensor,
    mean: bool,
    normalize: bool,
    backend: str,
) -> Tensor:
    kernel = _dispatch.select(OP, backend, hidden, cu_seqlens)
    return kernel.backward(d_pooled, hidden, cu_seqlens, pooled, norm, mean, normalize)


@_forward.register_fake
def _(hidden, cu_seqlens, mean, normalize, backend):
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    docs = cu_seqlens.shape[0] - 1
    return hidden.new_empty((docs, hidden.shape[1]), dtype=dtype), hidden.new_empty(
        (docs,), dtype=dtype
    )


@_backward.register_fake
def _(d_pooled, hidden, cu_seqlens, pooled, norm, mean, normalize, backend):
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    hidden, cu_seqlens, ctx.mean, ctx.normalize, ctx.backend = inputs
    ctx.save_for_backward(hidden, cu_seqlens, *output)


def _autograd(ctx, d_pooled, d_norm):
    d_hidden = None
    if ctx.needs_input_grad[0]:
        d_hidden = torch.ops.moca_fast.pool_backward(
            d_pooled, *ctx.saved_tensors, ctx.mean, ctx.normalize, ctx.backend
        )
    return d_hidden, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
