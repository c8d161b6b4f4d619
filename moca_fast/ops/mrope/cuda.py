"""mrope on the CUDA kernel (csrc/mrope/rotate.cu)."""

import torch
from torch import Tensor

from moca_fast import _C
from moca_fast._cuda import queue, unsupported_tensors
from moca_fast.ops.mrope.cpu import rotate


def unsupported(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    return unsupported_tensors(q, k, cos, sin)


def forward(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, section: list[int], interleaved: bool
) -> tuple[Tensor, Tensor]:
    return _rotate(q, k, cos, sin, section, interleaved, inverse=False)


def backward(
    d_q_out: Tensor,
    d_k_out: Tensor,
    cos: Tensor,
    sin: Tensor,
    section: list[int],
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    return _rotate(d_q_out, d_k_out, cos, sin, section, interleaved, inverse=True)


def _rotate(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    section: list[int],
    interleaved: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    if cos.dtype not in (q.dtype, torch.float32):  # the kernel takes these; float32 changes nothing
        cos, sin = cos.float(), sin.float()
    here = queue(q)

    def kernel(params: "_C.MropeParams") -> None:
        _C.mrope_rotate_cuda(params, here)

    return rotate(kernel, q, k, cos, sin, section, interleaved, inverse)
