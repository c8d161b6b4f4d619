"""Every op once, forward and backward, at odd sizes: for tests of memory, threads and processes.

No tensor reaches the 32768 values from which torch's own operations use threads: in a forked
process those wait for ever.
"""

import torch
from torch import Tensor

import moca_fast
from moca_fast import SpanMask


def cu_seqlens() -> Tensor:
    """Documents of 5, 0, 1 and 41 tokens; on torch's default device, as all tensors here."""
    return torch.tensor([0, 5, 5, 6, 47], dtype=torch.int32)


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def attention(dtype: torch.dtype, dim: int = 24, kv_heads: int = 2) -> tuple[Tensor, list[Tensor]]:
    q = random(49, 3 * kv_heads, dim, dtype=dtype)
    k, v = random(49, kv_heads, dim, dtype=dtype), random(49, kv_heads, dim, dtype=dtype)
    return moca_fast.attention(q, k, v, SpanMask.causal(cu_seqlens(), total=49)), [q, k, v]


def attention_wide(dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    return attention(dtype, dim=136, kv_heads=1)


def info_nce(dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    query, document = random(13, 37, dtype=dtype), random(29, 37, dtype=dtype)
    negatives = random(13, 3, 37, dtype=dtype)
    ids = torch.arange(29) // 2
    loss = moca_fast.info_nce(
        query, document, temperature=0.1, hard_negatives=negatives, document_ids=ids
    )
    return loss, [query, document, negatives]


def linear_cross_entropy(dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    hidden, weight = random(21, 19, dtype=dtype), random(1031, 19, dtype=dtype)
    bias = random(1031, dtype=dtype)
    labels = torch.randint(1031, (21,))
    labels[::3] = -100
    loss = moca_fast.linear_cross_entropy(hidden, weight, labels, bias=bias)
    return loss, [hidden, weight, bias]


def masked_patch_mse(dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    pred, patches = random(71, 27, dtype=dtype), torch.randn(33, 27).to(dtype)
    index = torch.randint(33, (71,))
    return moca_fast.masked_patch_mse(pred, patches, index, normalize=True), [pred]


def mrope(dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    q, k = random(49, 3, 26, dtype=dtype), random(49, 1, 26, dtype=dtype)
    cos, sin = torch.randn(2, 3, 49, 26).to(dtype)
    out = moca_fast.mrope(q, k, cos, sin, mrope_section=[5, 4, 4], interleaved=True)
    return torch.cat([x.flatten(1) for x in out], dim=1), [q, k]


def patchify(dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    image = torch.randint(256, (66, 154, 3), dtype=torch.uint8)
    return moca_fast.patchify(image, patch_size=11, temporal_patch_size=1, dtype=dtype), []


def pool(dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    hidden = random(49, 31, dtype=dtype)
    return moca_fast.pool(hidden, cu_seqlens()), [hidden]


CALLS = {
    call.__name__: call
    for call in (
        attention,
        attention_wide,
        info_nce,
        linear_cross_entropy,
        masked_patch_mse,
        mrope,
        patchify,
        pool,
    )
}


def run(name: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The op's output and the gradients of its inputs, always from the same numbers."""
    torch.manual_seed(0)
    out, leaves = CALLS[name](dtype)
    if leaves:
        out.float().square().sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def run_all() -> list[Tensor]:
    return [result for name in CALLS for result in run(name)]
