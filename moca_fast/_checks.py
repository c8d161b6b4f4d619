"""Argument checks shared by the ops: each names what was expected and what came."""

import math
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_bool(op: str, name: str, value: object) -> None:
    """Raise unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"moca_fast.{op}: {name}: expected True or False, got {value!r}")


def check_int(op: str, name: str, value: object, least: int | None = None) -> None:
    """Raise unless `value` is a whole number, of at least `least`."""
    where = f"moca_fast.{op}: {name}"
    if isinstance(value, bool) or not isinstance(value, (Integral, torch.SymInt)):
        raise TypeError(f"{where}: expected a whole number, got {value!r}")
    if least is not None and int(value) < least:
        raise ValueError(f"{where}: expected at least {least}, got {value}")


def check_real(op: str, name: str, value: object) -> None:
    """Raise unless `value` is a finite number, or a 0-d tensor of one."""
    where = f"moca_fast.{op}: {name}"
    number = value.item() if isinstance(value, Tensor) and value.dim() == 0 else value
    if isinstance(number, bool) or not isinstance(number, (Real, torch.SymFloat, torch.SymInt)):
        got = f"{value.dtype}, {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise TypeError(f"{where}: expected a number or a 0-d tensor, got {got}")
    if not abs(float(number)) < math.inf:  # false for NaN too
        raise ValueError(f"{where}: expected a finite number, got {number}")


def check_entries(op: str, name: str, index: Tensor, size: int) -> None:
    """Raise IndexError unless every entry of `index` (N,) is from 0 to size - 1; waits for it."""
    wrong = ((index < 0) | (index >= size)).nonzero()[:, 0].tolist()
    if wrong:
        raise IndexError(
            f"moca_fast.{op}: {name}[{wrong[0]}]: expected 0 to {size - 1}, got "
            f"{int(index[wrong[0]])}"
        )


def check_tensor(
    op: str,
    name: str,
    value: object,
    *,
    shape: Sequence[int | str],
    dtypes: Sequence[torch.dtype],
    like: Tensor | None = None,
) -> None:
    """Raise unless `value` is a tensor of this shape (str = any size), dtype and device."""
    where = f"moca_fast.{op}: {name}"
    if not isinstance(value, Tensor):
        raise TypeError(f"{where}: expected a tensor, got {type(value).__name__}")
    sizes = value.shape
    fits = len(sizes) == len(shape)
    for wanted, size in zip(shape, sizes, strict=False):
        fits = fits and (wanted == size or isinstance(wanted, str))
    if not fits:
        expected = f"({', '.join(str(s) for s in shape)}{',' if len(shape) == 1 else ''})"
        raise ValueError(f"{where}: expected shape {expected}, got {tuple(value.shape)}")
    if value.dtype not in dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        got = str(value.dtype).removeprefix("torch.")
        raise TypeError(f"{where}: expected dtype {wanted}, got {got}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{where}: expected device {like.device}, got {value.device}")
