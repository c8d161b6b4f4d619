"""What Triton 3.6's interpreter gets wrong, put right before the first kernel runs in it.

It multiplies bfloat16 by the integers that hold its bits, cuts numbers down to bfloat16 where GPUs
round them, and counts loops by a scalar only under numpy before 2.4, which refuses an array of one
number as an index. Compiled kernels have none of this.
"""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def repair() -> None:
    """Change the interpreter of this process."""
    builder: Any = interpreter.InterpreterBuilder
    dot, cast, patch = builder.create_dot, builder.cast_impl, interpreter._patch_lang_tensor

    def dot_of_floats(self, a, b, d, *options):
        return dot(self, _widened(a), _widened(b), d, *options)

    def cast_by_rounding(self, handle, dst_type):
        if handle.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return interpreter.TensorHandle(_bfloat16_bits(handle.data), tl.bfloat16)
        return cast(self, handle, dst_type)

    def patch_with_index(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda scalar: int(scalar.handle.data.item()))

    builder.create_dot = dot_of_floats
    builder.cast_impl = cast_by_rounding
    interpreter._patch_lang_tensor = patch_with_index


def _widened(handle: Any) -> Any:
    """bfloat16, the upper half of a float32, as that float32; other numbers as they are."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    data = (handle.data.astype(np.uint32) << 16).view(np.float32)
    return interpreter.TensorHandle(data, tl.float32)


def _bfloat16_bits(data: np.ndarray) -> np.ndarray:
    rounded = torch.from_numpy(np.ascontiguousarray(data)).to(torch.bfloat16)
    return rounded.view(torch.uint16).numpy().reshape(data.shape)
