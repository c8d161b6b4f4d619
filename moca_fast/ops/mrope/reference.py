"""mrope in eager torch: the specification."""

import torch
from torch import Tensor


def unsupported(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    return None


def forward(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, section: list[int], interleaved: bool
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    cos, sin = (_of_each_dim(table, section, interleaved).to(dtype) for table in (cos, sin))
    return _turned(q, cos, sin), _turned(k, cos, sin)


def backward(
    d_q_out: Tensor,
    d_k_out: Tensor,
    cos: Tensor,
    sin: Tensor,
    section: list[int],
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """The transpose: back by the same angle, with the halves of sin changing places."""
    inverse = -sin.roll(sin.shape[-1] // 2, dims=-1)
    return forward(d_q_out, d_k_out, cos, inverse, section, interleaved)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.to(cos.dtype)
    first, second = wide.chunk(2, dim=-1)
    turned = wide * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
    return turned.to(x.dtype).contiguous()


def _of_each_dim(table: Tensor, section: list[int], interleaved: bool) -> Tensor:
    """(T, D): of the three tables (3, T, D) the row that each dim turns by."""
    if not section:
        return table
    time, height, width = section
    row = torch.tensor([0] * time + [1] * height + [2] * width)
    if interleaved:
        row.zero_()
        row[1 : 3 * height : 3] = 1
        row[2 : 3 * width : 3] = 2
    row = row.repeat(2).to(table.device)
    return table.gather(0, row.expand(1, table.shape[1], -1))[0]
