"""Who else computes attention over packed documents: padded rows in torch's SDPA, by each of its
kernels, FlashAttention's packed kernel inside torch, and FlexAttention with a document mask.

B documents of up to S tokens, T packed tokens, H / Hkv heads, D dim of a head.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.harness import Call, Runner

if TYPE_CHECKING:
    from benchmarks.bench_attention import Attention


def sdpa(
    work: Attention, leaves: tuple[Tensor, ...], d_out: Tensor, kernel: SDPBackend | None = None
) -> Call:
    """Documents as rows of a batch (B, H, S, D), padded and masked if their lengths differ.

    Args:
        kernel: that torch must take; None leaves it the choice.
    """
    longest = max(work.lengths)
    lengths = torch.tensor(work.lengths, device=d_out.device)
    real = torch.arange(longest, device=d_out.device) < lengths[:, None]  # (B, S)
    mask = None if real.all() else real[:, None, None]
    grouped = work.kv_heads is not None
    # This kernel has no grouped queries, and torch takes none that has them beside a mask: then
    # keys and values are repeated, as transformers does.
    alone = kernel is EFFICIENT or (kernel is None and mask is not None)
    repeat = work.heads // (work.kv_heads or work.heads) if alone else 1

    def pad(x: Tensor) -> Tensor:
        padded = x.new_zeros(*real.shape, *x.shape[1:])
        padded[real] = x
        return padded.transpose(1, 2).contiguous()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if repeat > 1:
            k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, enable_gqa=grouped and repeat == 1
        )

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if kernel is None:
            return attend(q, k, v)
        with sdpa_kernel(kernel):
            return attend(q, k, v)

    padded = [pad(leaf) for leaf in leaves]
    return Call(function, padded, pad(d_out), undo=lambda x: x.transpose(1, 2)[real])


def flash_varlen(work: Attention, leaves: tuple[Tensor, ...], d_out: Tensor) -> Call:
    """The packed kernel that torch carries for nested tensors, called as flash-attn is."""
    cu_seqlens, longest = _cu_seqlens(work, d_out.device), max(work.lengths)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, cu_seqlens, cu_seqlens, longest, longest, 0.0, False, False
        )
        return out

    return Call(function, leaves, d_out)


def flex(work: Attention, leaves: tuple[Tensor, ...], d_out: Tensor) -> Call:
    """One row of all tokens (1, H, T, D); its block mask is made outside the time, as our plan."""
    device, tokens = d_out.device, sum(work.lengths)
    lengths = torch.tensor(work.lengths, device=device)
    document = torch.arange(len(lengths), device=device).repeat_interleave(lengths)

    def same_document(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return document[query] == document[key]

    make_mask: Any = (
        torch.compile(create_block_mask) if device.type == "cuda" else create_block_mask
    )
    mask = make_mask(same_document, None, None, tokens, tokens, device=device)
    attend = torch.compile(flex_attention, dynamic=False)
    grouped = work.kv_heads is not None

    def row(x: Tensor) -> Tensor:
        return x.transpose(0, 1)[None].contiguous()

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, block_mask=mask, enable_gqa=grouped)

    return Call(function, [row(x) for x in leaves], row(d_out), undo=lambda x: x[0].transpose(0, 1))


def _cu_seqlens(work: Attention, device: torch.device) -> Tensor:
    return torch.tensor([0, *work.lengths]).cumsum(0).int().to(device)


def _even(work: Attention) -> bool:
    """All documents are as long: rows need no mask, which this kernel would not take."""
    return len(set(work.lengths)) == 1


def _half(work: Attention) -> bool:
    return work.dtype != "float32"


def _packed(work: Attention) -> bool:
    """More than one document, and both passes: compiled for each shape, which takes a while."""
    return len(work.lengths) > 1 and work.backward and work.forward


CUDNN, FLASH = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
EFFICIENT = SDPBackend.EFFICIENT_ATTENTION
GPU = ("cuda",)
SDPA = "torch"
SDPA_CUDNN, VARLEN = "torch cuDNN", "torch flash varlen"
PEERS = [
    Runner(SDPA, sdpa, yardstick=True),
    Runner(SDPA_CUDNN, partial(sdpa, kernel=CUDNN), devices=GPU, suits=_half),
    Runner(
        "torch flash",
        partial(sdpa, kernel=FLASH),
        devices=GPU,
        suits=lambda work: _even(work) and _half(work),
    ),
    Runner("torch efficient", partial(sdpa, kernel=EFFICIENT), devices=GPU, suits=_packed),
    Runner(VARLEN, flash_varlen, devices=GPU, suits=lambda work: _half(work) and _packed(work)),
    Runner("torch flex", flex, devices=GPU, suits=_packed),
]
