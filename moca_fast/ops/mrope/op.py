"""Multimodal rotary embedding of queries and keys: rotary positions (arXiv 2104.09864) whose pairs
of dims turn by time, height or width, as in Qwen2-VL (arXiv 2409.12191) and Qwen3-VL.

T packed tokens, H / Hkv heads of q / k, D dim of a head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moca_fast import _dispatch
from moca_fast._checks import FLOATS, check_bool, check_int, check_tensor
from moca_fast._operator import operator

OP = "mrope"


def mrope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    mrope_section: Sequence[int] | None = None,
    interleaved: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Turn the pairs (i, D / 2 + i) of every head by the angles of their token.

    out[i] = x[i] cos[i] - x[D/2 + i] sin[i] and
    out[D/2 + i] = x[D/2 + i] cos[D/2 + i] + x[i] sin[D/2 + i], for both q and k. Everything is
    computed in float32 or better and rounded once. The backward is exact for any tables: nothing
    is assumed of their halves, which are equal in transformers' models.

    Args:
        q: (T, H, D) float32, bfloat16, float16 or float64, D even; receives a gradient. Where a
            token's heads lie one after another, tokens may have any stride (as a slice of a fused
            projection has); other layouts are copied.
        k: (T, Hkv, D) of the same dtype; receives a gradient.
        cos, sin: tables of any of these dtypes, both of the same; they get no gradient and may not
            require one. (T, D): those the rotary modules of transformers >= 5.17 return for
            Qwen2-VL, 2.5-VL and 3-VL, with `[0]` for its batch. (3, T, D): one table each for
            time, height and width, with `mrope_section`.
        mrope_section: (time, height, width), how many of the D / 2 pairs turn by each; of tables
            (3, T, D) and of no others.
        interleaved: with `mrope_section`; False, as in Qwen2-VL and 2.5-VL: first all pairs of
            time, then of height, then of width. True, as in Qwen3-VL: pair 3 n + 1 turns by height
            for n below its section, pair 3 n + 2 by width, as far as there are such pairs, and all
            others by time.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        q and k turned, (T, H, D) and (T, Hkv, D), contiguous, in their own dtype.

    Raises:
        ValueError: shapes, sections or devices that do not fit, tables that require a gradient,
            or a backend that cannot run the call.
        TypeError: a wrong dtype, or not a tensor.
    """
    q, k, cos, sin = inputs(q, k, cos, sin, mrope_section=mrope_section, interleaved=interleaved)
    section = [] if mrope_section is None else list(mrope_section)
    backend = _dispatch.requested(backend)
    return torch.ops.moca_fast.mrope(q, k, cos, sin, section, interleaved, backend)


def inputs(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    mrope_section: Sequence[int] | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The checked tensors that backends are asked about."""
    check_tensor(OP, "q", q, shape=("T", "H", "D"), dtypes=FLOATS)
    tokens, _, dim = q.shape
    if dim % 2:
        raise ValueError(f"moca_fast.{OP}: q: expected an even D, got {dim}")
    check_tensor(OP, "k", k, shape=(tokens, "Hkv", dim), dtypes=(q.dtype,), like=q)
    shape = (tokens, dim) if mrope_section is None else (3, tokens, dim)
    check_tensor(OP, "cos", cos, shape=shape, dtypes=FLOATS, like=q)
    check_tensor(OP, "sin", sin, shape=shape, dtypes=(cos.dtype,), like=q)
    if cos.requires_grad or sin.requires_grad:
        raise ValueError(f"moca_fast.{OP}: cos and sin get no gradient; detach them")
    check_bool(OP, "interleaved", interleaved)
    if mrope_section is not None:
        _check_section(mrope_section, dim // 2)
    elif interleaved:
        raise ValueError(
            f"moca_fast.{OP}: interleaved: expected an mrope_section with it, got None"
        )
    return q, k, cos, sin


def _check_section(section: Sequence[int], pairs: int) -> None:
    expected = (
        f"moca_fast.{OP}: mrope_section: expected three numbers of pairs, D / 2 = {pairs} in all"
    )
    if not isinstance(section, Sequence):
        raise TypeError(f"{expected}, got {section!r}")
    for number in section:
        check_int(OP, "mrope_section", number)
    if len(section) != 3 or min(section) < 0 or sum(section) != pairs:
        raise ValueError(f"{expected}, got {tuple(section)}")


@operator("mrope")
def _forward(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    section: list[int],
    interleaved: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`section` is empty for tables (T, D)."""
    kernel = _dispatch.select(OP, backend, q, k, cos, sin)
    return kernel.forward(q, k, cos, sin, section, interleaved)


@operator("mrope_backward")
def _backward(
    d_q_out: Tensor,
    d_k_out: Tensor,
    cos: Tensor,
    sin: Tensor,
    section: list[int],
    interleaved: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    kernel = _dispatch.select(OP, backend, d_q_out, d_k_out, cos, sin)
    return kernel.backward(d_q_out, d_k_out, cos, sin, section, interleaved)


def _fake(q, k, cos, sin, section, interleaved, backend):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))


_forward.register_fake(_fake)
_backward.register_fake(_fake)


def _setup_context(ctx, inputs, output):
    _, _, cos, sin, ctx.section, ctx.interleaved, ctx.backend = inputs
    ctx.save_for_backward(cos, sin)


def _autograd(ctx, d_q_out, d_k_out):
    needs = ctx.needs_input_grad[:2]
    # What needs no gradient takes part with no heads.
    above = (d if need else d[:, :0] for d, need in zip((d_q_out, d_k_out), needs, strict=True))
    gradients = torch.ops.moca_fast.mrope_backward(
        *above, *ctx.saved_tensors, ctx.section, ctx.interleaved, ctx.backend
    )
    d_q, d_k = (d if need else None for d, need in zip(gradients, needs, strict=True))
    return d_q, d_k, None, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
