"""What every `cpu.py` shares: the compiled module, dtype codes and common refusals."""

import torch
from torch import Tensor

from moca_fast import _C

DTYPES = {
    torch.float32: _C.DType.float32,
    torch.bfloat16: _C.DType.bfloat16,
    torch.float16: _C.DType.float16,
}


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
