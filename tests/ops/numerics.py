"""The rule every output and gradient is held to, and memory that starts as NaN."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def assert_close_to_exact(
    got: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype, name: str = ""
) -> None:
    """max |got - exact| <= 2 * max |plain - exact| + one rounding of the largest exact value.

    Args:
        got: what the op gave. plain: what plain torch gives in `dtype`. exact: float64.
        name: what is compared, for the message.
    """
    assert got.shape == exact.shape == plain.shape, name
    if exact.numel() == 0:
        return
    error = (got.double() - exact).abs().max().item()
    allowed = 2 * (plain.double() - exact).abs().max().item()
    allowed += torch.finfo(dtype).eps * exact.abs().max().item()
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, fresh tensors hold NaN (the largest value for integers) until they are written."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill
