"""Memory for large results on a CPU, kept when they are freed, for the next ones.

The system clears every page before a process first writes it, and the C library hands arrays of
tens of megabytes back as soon as they are freed. So a step that makes a large gradient and lets go
of it would have the same pages cleared in every step, which takes longer than many a gradient
takes to compute. Here they are kept, as torch keeps freed memory on a GPU.
"""

import contextlib
import math
import mmap
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST = 4 << 20  # bytes of a result that is kept; the C library keeps smaller ones itself
MOST = 512 << 20  # bytes kept at a time: some activations and gradients of a large batch
_HUGE_PAGE = 2 << 20  # bytes; cleared faster than as many in pages of 4 KiB

_kept: list[mmap.mmap] = []  # what was freed first comes first


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`torch.empty(shape, dtype=dtype)` on the CPU, in kept memory where it is large.

    Where torch is to fill fresh memory (`torch.utils.deterministic`), it comes from torch. The
    storage of a large result cannot be resized.
    """
    size = math.prod(shape) * dtype.itemsize
    filled = torch.are_deterministic_algorithms_enabled()
    if size < SMALLEST or filled or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.empty(shape, dtype=dtype)
    block = _kept_block(size) or _fresh_block(size)
    view = memoryview(block)
    weakref.finalize(view, _keep, block).atexit = False  # when the last tensor has let go of it
    return torch.frombuffer(view, dtype=dtype, count=math.prod(shape)).view(shape)


def empty_like(tensor: Tensor) -> Tensor:
    """`empty` of the tensor's shape and dtype; on another device torch's own, contiguous."""
    if tensor.device.type != "cpu":
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)
    return empty(tensor.shape, tensor.dtype)


def empty_cache() -> None:
    """Gives memory that is kept for results on the CPU back to the system.

    Kept are at most 512 MiB, of results of 4 MiB and more that are in use no longer. For memory on
    a GPU call `torch.cuda.empty_cache()`.
    """
    _kept.clear()


def _kept_block(size: int) -> mmap.mmap | None:
    """The smallest that is kept, large enough and at most a quarter larger."""
    for block in sorted(_kept, key=len):
        if size <= len(block) <= size + max(size // 4, _HUGE_PAGE):
            with contextlib.suppress(ValueError):  # another thread has taken it
                _kept.remove(block)
                return block
    return None


def _fresh_block(size: int) -> mmap.mmap:
    size = -(-size // _HUGE_PAGE) * _HUGE_PAGE
    try:
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:  # callers expect what torch raises
        raise RuntimeError(f"moca_fast: the system has no {size} bytes of memory left") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system without huge pages
            block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _keep(block: mmap.mmap) -> None:
    _kept.append(block)
    while sum(len(kept) for kept in _kept) > MOST:
        del _kept[:1]
