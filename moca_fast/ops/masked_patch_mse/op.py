"""Masked-patch reconstruction loss: the mean squared error of MAE (arXiv 2111.06377) as MoCa's
continual pre-training uses it (arXiv 2506.23115).

M masked patches, N clean patches, P values a patch.
"""

import torch
from torch import Tensor

from moca_fast import _dispatch
from moca_fast._checks import FLOATS, check_bool, check_tensor
from moca_fast._operator import operator

OP = "masked_patch_mse"


def masked_patch_mse(
    pred: Tensor,
    patches: Tensor,
    index: Tensor,
    *,
    normalize: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Mean squared error of predicted patches against the clean patches they stand for.

    loss = mean over m of mean over p of (pred[m, p] - target[index[m], p])^2, where target is
    `patches`, or with `normalize` each patch of it brought to zero mean and unit variance:
    (x - mean) / sqrt(var + 1e-6), with the unbiased variance.

    Args:
        pred: (M, P) float32, bfloat16, float16 or float64; receives a gradient.
        patches: (N, P) clean pixels, any of the same dtypes (it may differ from that of pred, as
            under mixed precision); a target, so it gets no gradient and may not require one.
        index: (M,) int64, the row of `patches` that each prediction stands for; rows may repeat.
        normalize: standardise each target patch first.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        () float32 (float64 for float64 predictions). An empty index gives 0 with zero gradient.

    Raises:
        ValueError: shapes or devices that do not fit, `patches` that requires a gradient, or a
            backend that cannot run the call.
        TypeError: a wrong dtype, or not a tensor.
        IndexError: an entry of `index` outside 0 to N - 1. The kernels for GPUs, which never wait
            for the device, make the loss and that row's gradient NaN instead.
    """
    pred, patches, index = inputs(pred, patches, index, normalize=normalize)
    backend = _dispatch.requested(backend)
    return torch.ops.moca_fast.masked_patch_mse(pred, patches, index, normalize, backend)


def inputs(
    pred: Tensor, patches: Tensor, index: Tensor, *, normalize: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The checked tensors that backends are asked about."""
    check_tensor(OP, "pred", pred, shape=("M", "P"), dtypes=FLOATS)
    size = pred.shape[1]
    check_tensor(OP, "patches", patches, shape=("N", size), dtypes=FLOATS, like=pred)
    check_tensor(OP, "index", index, shape=(pred.shape[0],), dtypes=(torch.int64,), like=pred)
    if size == 0:
        raise ValueError(f"moca_fast.{OP}: expected patches of at least one value, got P = 0")
    if patches.requires_grad:
        raise ValueError(f"moca_fast.{OP}: patches is a target and gets no gradient; detach it")
    check_bool(OP, "normalize", normalize)
    return pred, patches, index


@operator("masked_patch_mse")
def _forward(pred: Tensor, patches: Tensor, index: Tensor, normalize: bool, backend: str) -> Tensor:
    kernel = _dispatch.select(OP, backend, pred, patches, index)
    return kernel.forward(pred, patches, index, normalize)


@operator("masked_patch_mse_backward")
def _backward(
    d_loss: Tensor, pred: Tensor, patches: Tensor, index: Tensor, normalize: bool, backend: str
) -> Tensor:
    kernel = _dispatch.select(OP, backend, pred, patches, index)
    return kernel.backward(d_loss, pred, patches, index, normalize)


@_forward.register_fake
def _(pred, patches, index, normalize, backend):
    return pred.new_empty((), dtype=torch.promote_types(pred.dtype, torch.float32))


@_backward.register_fake
def _(d_loss, pred, patches, index, normalize, backend):
    return torch.empty_like(pred, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    pred, patches, index, ctx.normalize, ctx.backend = inputs
    ctx.save_for_backward(pred, patches, index)


def _autograd(ctx, d_loss):
    d_pred = None
    if ctx.needs_input_grad[0]:
        d_pred = torch.ops.moca_fast.masked_patch_mse_backward(
            d_loss, *ctx.saved_tensors, ctx.normalize, ctx.backend
        )
    return d_pred, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
