"""What every `cpu.py` shares: dtype codes, addresses and common refusals."""

from typing import Any

import torch
from torch import Tensor

from moca_fast import _C

DTYPES = {
    torch.float32: _C.DType.float32,
    torch.bfloat16: _C.DType.bfloat16,
    torch.float16: _C.DType.float16,
}


def contiguous(tensor: Tensor | None) -> Any:
    """The tensor (or None) with its elements one after another, as kernels read them."""
    return None if tensor is None else tensor.contiguous()


def address(tensor: Tensor | None) -> int:
    """Where its first element lies; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def unsupported_tensors(*tensors: Tensor | None) -> str | None:
    """Why the CPU kernels cannot take these tensors: their device, or a float dtype."""
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            return f"tensors are on {tensor.device}, this backend runs on the cpu"
        if tensor.is_floating_point() and tensor.dtype not in DTYPES:
            return f"dtype {str(tensor.dtype).removeprefix('torch.')} has no native kernel"
    return None
