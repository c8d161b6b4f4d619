"""masked_patch_mse in Triton: forward and backward each read a row of predictions and its target
once, gathered, and keep both in registers while the target is standardised.

Making d_pred in the forward would save nothing: a loss is nearly always weighted, and scaling a
gradient reads and writes it again, which are the bytes of reading both rows a second time. It would
also round twice, and unscaled gradients of 2 / (M P) are below the range of float16.

M masked patches, N clean patches, P values a patch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moca_triton.device import unsupported_tensors

EPSILON = tl.constexpr(1e-6)  # on the variance, as in moca_fast's reference
TILE = 8192  # values of each array that a program holds: 32 a thread
MAX_SIZE = 16384  # values of the longest patch that fits the registers of one program
SUMMED = 8192  # partial losses that are added at once


def unsupported(pred: Tensor, patches: Tensor, index: Tensor) -> str | None:
    if pred.shape[1] > MAX_SIZE:
        return f"patches of {pred.shape[1]} values; the kernel holds at most {MAX_SIZE}"
    return unsupported_tensors(pred, patches, index)


def forward(pred: Tensor, patches: Tensor, index: Tensor, normalize: bool) -> Tensor:
    rows, size = pred.shape
    if rows == 0:
        return pred.new_zeros((), dtype=torch.float32)
    pred, patches, index = pred.contiguous(), patches.contiguous(), index.contiguous()
    tile = _tile(size)
    partials = triton.cdiv(rows, tile["BLOCK_M"])
    partial = pred.new_empty(partials, dtype=torch.float32)
    loss = pred.new_empty((), dtype=torch.float32)
    _forward_kernel[(partials,)](
        pred, patches, index, partial, rows, patches.shape[0], size, normalize, **tile
    )
    _mean_kernel[(1,)](partial, loss, partials, rows, SUMMED, num_warps=8)
    return loss


def backward(
    d_loss: Tensor, pred: Tensor, patches: Tensor, index: Tensor, normalize: bool
) -> Tensor:
    rows, size = pred.shape
    pred, patches, index = pred.contiguous(), patches.contiguous(), index.contiguous()
    d_pred = torch.empty_like(pred)
    if rows == 0:
        return d_pred
    tile = _tile(size)
    _backward_kernel[(triton.cdiv(rows, tile["BLOCK_M"]),)](
        d_loss.to(torch.float32),
        pred,
        patches,
        index,
        d_pred,
        2.0 / (rows * size),
        rows,
        patches.shape[0],
        size,
        normalize,
        **tile,
    )
    return d_pred


def _tile(size: int) -> dict[str, int]:
    """The rows and values of one program; short patches go many to a program."""
    block_p = max(triton.next_power_of_2(size), 16)
    block_m = max(1, TILE // block_p)
    return {"BLOCK_M": block_m, "BLOCK_P": block_p, "num_warps": max(8, block_p // 1024)}


@triton.jit
def _error(
    pred_ptr,
    patches_ptr,
    index_ptr,
    offs_m,
    offs_p,
    rows,
    num_patches,
    SIZE: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """(BLOCK_M, BLOCK_P) float32 prediction - target, 0 outside of the arrays."""
    source = tl.load(index_ptr + offs_m, offs_m < rows, other=0)
    # There is no waiting for the device to raise an error: a row that does not exist is NaN.
    exists = ((source >= 0) & (source < num_patches))[:, None]
    mask = (offs_m < rows)[:, None] & (offs_p < SIZE)[None, :]
    # SIZE is known when this is compiled, so that rows which begin on 16 bytes are read by 16.
    pred = tl.load(pred_ptr + offs_m[:, None] * SIZE + offs_p[None, :], mask, other=0.0)
    target = tl.load(
        patches_ptr + source[:, None] * SIZE + offs_p[None, :], mask & exists, other=0.0
    ).to(tl.float32)
    if NORMALIZE:
        mean = tl.sum(target, axis=1) * (1.0 / SIZE)
        target = tl.where(mask, target - mean[:, None], 0.0)
        variance = tl.sum(target * target, axis=1) * (1.0 / max(SIZE - 1, 1))
        target *= tl.div_rn(1.0, tl.sqrt_rn(variance + EPSILON))[:, None]
    error = tl.where(exists, pred.to(tl.float32) - target, float("nan"))
    return tl.where(mask, error, 0.0)


@triton.jit
def _forward_kernel(
    pred_ptr,
    patches_ptr,
    index_ptr,
    partial_ptr,
    rows,
    num_patches,
    SIZE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The sum over BLOCK_M rows of the mean squared error of each."""
    pid = tl.program_id(0)
    offs_m = pid.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_p = tl.arange(0, BLOCK_P)
    error = _error(
        pred_ptr, patches_ptr, index_ptr, offs_m, offs_p, rows, num_patches, SIZE, NORMALIZE
    )
    row_loss = tl.sum(error * error, axis=1) * (1.0 / SIZE)
    tl.store(partial_ptr + pid, tl.sum(row_loss, axis=0))


@triton.jit
def _mean_kernel(partial_ptr, loss_ptr, partials, rows, BLOCK: tl.constexpr):
    """The sum of all partial sums over `rows`, always in the same order."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, partials, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + offs, offs < partials, other=0.0)
    tl.store(loss_ptr, tl.sum(total, axis=0) / rows)


@triton.jit
def _backward_kernel(
    d_loss_ptr,
    pred_ptr,
    patches_ptr,
    index_ptr,
    d_pred_ptr,
    scale,
    rows,
    num_patches,
    SIZE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_p = tl.arange(0, BLOCK_P)
    error = _error(
        pred_ptr, patches_ptr, index_ptr, offs_m, offs_p, rows, num_patches, SIZE, NORMALIZE
    )
    d_pred = error * (tl.load(d_loss_ptr) * scale)
    mask = (offs_m < rows)[:, None] & (offs_p < SIZE)[None, :]
    tl.store(d_pred_ptr + offs_m[:, None] * SIZE + offs_p[None, :], d_pred, mask)
