"""pool in eager torch: the specification."""

import torch
from torch import Tensor

EPSILON = 1e-12  # least length divided by, as in torch.nn.functional.normalize


def unsupported(hidden: Tensor, cu_seqlens: Tensor) -> str | None:
    return None


def forward(
    hidden: Tensor, cu_seqlens: Tensor, mean: bool, normalize: bool
) -> tuple[Tensor, Tensor]:
    token, document, count = _members(hidden, cu_seqlens, mean)
    states = hidden[token].to(torch.promote_types(hidden.dtype, torch.float32))
    total = states.new_zeros((count.shape[0], hidden.shape[1]))
    pooled = total.index_add(0, document, states) / count
    if not normalize:
        return pooled, pooled.new_ones(pooled.shape[0])
    norm = torch.linalg.vector_norm(pooled, dim=1, dtype=torch.float64)  # no square overflows
    norm = norm.to(pooled.dtype).clamp(min=EPSILON)
    return pooled / norm[:, None], norm


def backward(
    d_pooled: Tensor,
    hidden: Tensor,
    cu_seqlens: Tensor,
    pooled: Tensor,
    norm: Tensor,
    mean: bool,
    normalize: bool,
) -> Tensor:
    if normalize:  # below EPSILON the divisor is a constant
        along = (pooled * d_pooled).sum(dim=1) * (norm > EPSILON)
        d_pooled = (d_pooled - along[:, None] * pooled) / norm[:, None]
    token, document, count = _members(hidden, cu_seqlens, mean)
    d_hidden = hidden.new_zeros(hidden.shape)
    d_hidden[token] = (d_pooled / count)[document].to(hidden.dtype)
    return d_hidden


def _members(hidden: Tensor, cu_seqlens: Tensor, mean: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens that are pooled, the document of each, and (B, 1) how many a document has."""
    check_boundaries(cu_seqlens, hidden.shape[0])
    length = cu_seqlens.diff().long()
    if mean:
        token = torch.arange(int(cu_seqlens[-1]), device=hidden.device)
        document = torch.repeat_interleave(length)
        return token, document, length.clamp(min=1)[:, None]
    document = length.nonzero()[:, 0]
    token = cu_seqlens[1:].long()[document] - 1
    return token, document, torch.ones_like(length)[:, None]


def check_boundaries(cu_seqlens: Tensor, tokens: int) -> None:
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] > tokens or bounds != sorted(bounds):
        raise ValueError(
            "moca_fast.pool: cu_seqlens: expected non-decreasing entries from 0 to at most "
            f"T = {tokens}, got {bounds if len(bounds) <= 16 else [*bounds[:8], '...', bounds[-1]]}"
        )
