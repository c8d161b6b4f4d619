"""moca_fast.mrope in place of the rotary functions of transformers' models.

transformers has a public way to replace them only through the `kernels` package, which fetches
repositories. Without it an attention layer calls a function of its modelling file by name. So the
layers of one model are given that name in globals of their own: their code stays theirs, and
nothing changes for other models.

B rows of a batch, L tokens a row, T packed tokens, H / Hkv heads, D dim of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from moca_fast.ops.mrope.op import mrope


def use_mrope(model: nn.Module) -> int:
    """Let the attention layers of a model turn q and k by `moca_fast.mrope`, forward and backward.

    For Qwen2-VL, Qwen2.5-VL and Qwen3-VL, text and vision, and for any other model whose layers
    call rotary functions of these names that do the same, which is checked on random tensors
    first. Tables narrower than a head, as those of GPT-NeoX, turn its first columns. Only the
    layers of this model change, in place; calling it twice is harmless. Results keep the dtype of q
    and k, also under autocast.

    Args:
        model: a transformers model, with its layers' forwards as their classes have them: call it
            before what wraps them (accelerate's hooks, for one).

    Returns:
        The number of attention layers it was installed on.

    Raises:
        ValueError: no layer calls such a function, or one has a forward of its own already.
        RuntimeError: a function of such a name does something else.
    """
    layers = {module: name for module in model.modules() if (name := _rotary_name(module))}
    if not layers:
        raise ValueError(
            f"use_mrope: expected attention layers that call one of {tuple(REPLACED)}, got none in "
            f"{type(model).__name__}"
        )
    for module, name in layers.items():
        own = vars(module).get("forward")
        code = getattr(own, "__func__", None)
        if own is not None and _globals(code).get(name) is not REPLACED[name].ours:
            raise ValueError(
                f"use_mrope: expected {type(module).__name__} to run the forward of its class, got "
                "one of its own; call use_mrope before what wraps forwards"
            )
    for name, original in {(n, _globals(_forward_of(m))[n]) for m, n in layers.items()}:
        _check_same(name, original, type(model).__name__)
    for module, name in layers.items():
        module.forward = MethodType(_calling(_forward_of(module), name), module)  # type: ignore
    return len(layers)


def rotate_rows(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """`apply_rotary_pos_emb` of the text models.

    Args:
        q: (B, H, L, D), or (B, L, H, D) with unsqueeze_dim=2.
        k: (B, Hkv, L, D) or (B, L, Hkv, D).
        cos, sin: (B, L, D) or (1, L, D), merged from the tables of time, height and width; of
            fewer columns, these of a head turn and the others stay.
    """
    heads_first = unsqueeze_dim == 1
    q, k = (x.transpose(1, 2) if heads_first else x for x in (q, k))
    rows = q.shape[:2]
    cos, sin = (table.expand(*rows, -1).flatten(0, 1) for table in (cos, sin))
    out = _turned(q.flatten(0, 1), k.flatten(0, 1), cos, sin)
    q, k = (x.unflatten(0, rows) for x in out)
    return (q.transpose(1, 2), k.transpose(1, 2)) if heads_first else (q, k)


def rotate_patches(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`apply_rotary_pos_emb_vision` of the vision towers: q, k (T, H, D); cos, sin (T, D)."""
    return _turned(q, k, cos, sin)


def _turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """mrope of the first columns of every head, as many as the tables have."""
    columns = cos.shape[-1]
    if columns >= q.shape[-1]:
        return mrope(q, k, cos, sin)
    first_q, first_k = mrope(q[..., :columns], k[..., :columns], cos, sin)
    rest_q, rest_k = q[..., columns:], k[..., columns:]
    return torch.cat([first_q, rest_q], dim=-1), torch.cat([first_k, rest_k], dim=-1)


@dataclass(frozen=True)
class Replacement:
    """What stands in for a function of transformers, and shapes (q, k, tables) to try both on."""

    ours: Callable
    shapes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


REPLACED = {
    "apply_rotary_pos_emb": Replacement(rotate_rows, ((2, 4, 5, 16), (2, 2, 5, 16), (2, 5, 16))),
    "apply_rotary_pos_emb_vision": Replacement(rotate_patches, ((5, 4, 16), (5, 4, 16), (5, 16))),
}


def _globals(function: Callable | None) -> dict[str, Any]:
    return getattr(function, "__globals__", {})


def _forward_of(module: nn.Module) -> FunctionType:
    return type(module).forward  # type: ignore[return-value]


def _rotary_name(module: nn.Module) -> str | None:
    """The rotary function that the forward of the module's class calls, if it calls one."""
    code = getattr(_forward_of(module), "__code__", None)
    names = code.co_names if code is not None else ()
    return next((name for name in REPLACED if name in names), None)


def _calling(forward: FunctionType, name: str) -> FunctionType:
    """The same function, to which the global `name` is ours."""
    own = {**forward.__globals__, name: REPLACED[name].ours}
    copy = FunctionType(
        forward.__code__, own, forward.__name__, forward.__defaults__, forward.__closure__
    )
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


def _check_same(name: str, original: Callable, model: str) -> None:
    """Raise unless both turn random q and k alike, by tables with equal halves as models have, of
    whole heads and, where the original takes those, of half of their columns."""
    generator = torch.Generator().manual_seed(0)
    q, k, table = (torch.randn(shape, generator=generator) for shape in REPLACED[name].shapes)
    dim = q.shape[-1]
    for columns in (dim, dim // 2):
        angle = torch.cat([table[..., : columns // 2]] * 2, dim=-1)
        inputs = q, k, angle.cos(), angle.sin()
        try:
            want, got = original(*inputs), REPLACED[name].ours(*inputs)
        except (TypeError, ValueError, RuntimeError) as error:
            if columns < dim:
                return
            raise RuntimeError(
                f"use_mrope: {name} of {model} takes other arguments: {error}"
            ) from None
        if not all(torch.allclose(a, b, rtol=0, atol=1e-5) for a, b in zip(want, got, strict=True)):
            raise RuntimeError(
                f"use_mrope: {name} of {model} is another rotation; nothing was changed"
            )
