"""mrope on the native CPU kernel (csrc/mrope/cpu.cpp)."""

from collections.abc import Callable

import torch
from torch import Tensor

from moca_fast import _C
from moca_fast._memory import empty_like
from moca_fast._native import DTYPES, unsupported_tensors


def unsupported(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    return unsupported_tensors(q, k, cos, sin)


def forward(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, section: list[int], interleaved: bool
) -> tuple[Tensor, Tensor]:
    return rotate(_C.mrope_rotate, q, k, cos, sin, section, interleaved, inverse=False)


def backward(
    d_q_out: Tensor,
    d_k_out: Tensor,
    cos: Tensor,
    sin: Tensor,
    section: list[int],
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    return rotate(_C.mrope_rotate, d_q_out, d_k_out, cos, sin, section, interleaved, inverse=True)


def rotate(
    kernel: Callable,
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    section: list[int],
    interleaved: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """q and k turned, or with `inverse` turned back, by a kernel of `_C`."""
    q_out, k_out = (empty_like(x) for x in (q, k))
    q, k = _heads_together(q), _heads_together(k)
    cos, sin = cos.contiguous(), sin.contiguous()
    time, height, width = section or (0, 0, 0)
    params = _C.MropeParams(
        q=q.data_ptr(),
        k=k.data_ptr(),
        cos=cos.data_ptr(),
        sin=sin.data_ptr(),
        q_out=q_out.data_ptr(),
        k_out=k_out.data_ptr(),
        tokens=q.shape[0],
        heads=q.shape[1],
        kv_heads=k.shape[1],
        dim=q.shape[2],
        q_stride=q.stride(0),
        k_stride=k.stride(0),
        dtype=DTYPES[q.dtype],
        table_dtype=DTYPES[cos.dtype],
        sections=bool(section),
        time=time,
        height=height,
        width=width,
        interleaved=interleaved,
        inverse=inverse,
        threads=torch.get_num_threads(),
    )
    kernel(params)
    return q_out, k_out


def _heads_together(x: Tensor) -> Tensor:
    """The tensor if a token's heads lie one after another, wherever tokens begin; else a copy."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()
