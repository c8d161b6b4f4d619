"""mrope in Triton: a program turns all heads of one token, so that its cosines and sines are read
once.

T tokens, H / Hkv heads of q / k, D dim of a head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moca_triton.device import unsupported_tensors

TILE = 2048  # values of one half of the heads that a program holds at once: 16 a thread
MAX_DIM = 4096


def unsupported(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    if q.shape[2] > MAX_DIM:
        return f"{q.shape[2]} dims a head; the kernel holds at most {MAX_DIM}"
    return unsupported_tensors(q, k, cos, sin)


def forward(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, section: list[int], interleaved: bool
) -> tuple[Tensor, Tensor]:
    return _rotate(q, k, cos, sin, section, interleaved, inverse=False)


def backward(
    d_q: Tensor, d_k: Tensor, cos: Tensor, sin: Tensor, section: list[int], interleaved: bool
) -> tuple[Tensor, Tensor]:
    return _rotate(d_q, d_k, cos, sin, section, interleaved, inverse=True)


def _rotate(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    section: list[int],
    interleaved: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    tokens, _, dim = q.shape
    q_out, k_out = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))
    if tokens == 0 or dim == 0:
        return q_out, k_out
    q, k = _heads_together(q), _heads_together(k)
    cos, sin = cos.contiguous(), sin.contiguous()
    block_d = max(triton.next_power_of_2(dim // 2), 16)
    _rotate_kernel[(tokens,)](
        q, k, cos, sin, q_out, k_out,
        tokens, q.stride(0), k.stride(0),
        q.shape[1], k.shape[1], dim // 2,
        *(section or (0, 0, 0)), len(section) > 0, interleaved, inverse,
        max(1, TILE // block_d), block_d,
    )  # fmt: skip
    return q_out, k_out


def _heads_together(x: Tensor) -> Tensor:
    """The tensor if a token's heads lie one after another, wherever tokens begin; else a copy."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


@triton.jit
def _rotate_heads(
    x_ptr,
    out_ptr,
    cos1,
    cos2,
    sin1,
    sin2,
    offs_d,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Turns the pairs (i, HALF + i) of every head of one token."""
    for first in range(0, HEADS, BLOCK_H):
        offs_h = first + tl.arange(0, BLOCK_H)
        mask = (offs_h < HEADS)[:, None] & (offs_d < HALF)[None, :]
        offs = offs_h[:, None] * (2 * HALF) + offs_d[None, :]
        x1 = tl.load(x_ptr + offs, mask, other=0.0).to(tl.float32)
        x2 = tl.load(x_ptr + offs + HALF, mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + offs, x1 * cos1[None, :] - x2 * sin1[None, :], mask)
        tl.store(out_ptr + offs + HALF, x2 * cos2[None, :] + x1 * sin2[None, :], mask)


@triton.jit
def _rotate_kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    tokens,
    q_stride,
    k_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    SECTION_T: tl.constexpr,
    SECTION_H: tl.constexpr,
    SECTION_W: tl.constexpr,
    SECTIONS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    offs = token * (2 * HALF) + offs_d
    if SECTIONS:  # the row of the tables, time, height or width, that a pair turns by
        if INTERLEAVED:
            height = (offs_d % 3 == 1) & (offs_d < 3 * SECTION_H)
            width = (offs_d % 3 == 2) & (offs_d < 3 * SECTION_W)
            row = height.to(tl.int64) + 2 * width.to(tl.int64)
        else:
            width = offs_d >= SECTION_T + SECTION_H
            row = (offs_d >= SECTION_T).to(tl.int64) + width.to(tl.int64)
        offs += row * tokens * (2 * HALF)
    inside = offs_d < HALF
    cos1 = tl.load(cos_ptr + offs, inside, other=0.0).to(tl.float32)
    cos2 = tl.load(cos_ptr + offs + HALF, inside, other=0.0).to(tl.float32)
    sin1 = tl.load(sin_ptr + offs, inside, other=0.0).to(tl.float32)
    sin2 = tl.load(sin_ptr + offs + HALF, inside, other=0.0).to(tl.float32)
    if INVERSE:  # the transpose of the rotation, whatever the tables hold
        sin1, sin2 = -sin2, -sin1
    q_out = q_out_ptr + token * (HEADS * 2 * HALF)
    k_out = k_out_ptr + token * (KV_HEADS * 2 * HALF)
    _rotate_heads(
        q_ptr + token * q_stride, q_out, cos1, cos2, sin1, sin2, offs_d, HEADS, HALF, BLOCK_H
    )
    _rotate_heads(
        k_ptr + token * k_stride, k_out, cos1, cos2, sin1, sin2, offs_d, KV_HEADS, HALF, BLOCK_H
    )
