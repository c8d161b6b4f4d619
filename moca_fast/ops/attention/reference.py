"""attention in eager torch: the specification. Holds all T x K scores."""

import torch
from torch import Tensor


def unsupported(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, plan: list[Tensor], softmax_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _seen(plan, q, k, v)
    queries, keys, values = _grouped(q, k), _wide(k), _wide(v)
    scores = _scores(queries, keys, plan, softmax_scale)
    out = torch.einsum("hgij,jhd->ihgd", _probabilities(scores, plan), values)
    lse = scores.logsumexp(dim=-1).flatten(0, 1).t().contiguous().float()
    return out.flatten(1, 2).to(q.dtype).contiguous(), lse, torch.zeros_like(lse)


def backward(
    d_out: Tensor,
    d_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lse_rest: Tensor,
    plan: list[Tensor],
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, d_out = _seen(plan, q, k, v, d_out)
    queries, keys, values = _grouped(q, k), _wide(k), _wide(v)
    probabilities = _probabilities(_scores(queries, keys, plan, softmax_scale), plan)
    d_outs = _grouped(d_out, k)
    d_values = torch.einsum("hgij,ihgd->jhd", probabilities, d_outs)
    d_probabilities = torch.einsum("ihgd,jhd->hgij", d_outs, values)
    mean = (probabilities * d_probabilities).sum(dim=-1, keepdim=True)
    d_lses = _grouped(d_lse.unsqueeze(-1), k).permute(1, 2, 0, 3)
    d_scores = probabilities * (d_probabilities - mean + d_lses) * softmax_scale
    d_queries = torch.einsum("hgij,jhd->ihgd", d_scores, keys).flatten(1, 2)
    d_keys = torch.einsum("hgij,ihgd->jhd", d_scores, queries)
    gradients = zip((d_queries, d_keys, d_values), (q, k, v), strict=True)
    d_q, d_k, d_v = (gradient.to(like.dtype).contiguous() for gradient, like in gradients)
    return d_q, d_k, d_v


def _seen(plan: list[Tensor], q: Tensor, k: Tensor, v: Tensor, *d_out: Tensor) -> list[Tensor]:
    """The tensors with 0 for queries that see nothing and keys that nobody sees: 0 times what they
    hold may be NaN."""
    start, end, _, key_start, key_end, _ = plan
    blind, unseen = (start >= end)[:, None, None], (key_start >= key_end)[:, None, None]
    q, *rest = (x.masked_fill(blind, 0) for x in (q, *d_out))
    return [q, k.masked_fill(unseen, 0), v.masked_fill(unseen, 0), *rest]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _grouped(x: Tensor, k: Tensor) -> Tensor:
    """(T, H, D) to (T, Hkv, H / Hkv, D): the query heads that share one key head."""
    return _wide(x).unflatten(1, (k.shape[1], -1))


def _scores(queries: Tensor, keys: Tensor, plan: list[Tensor], softmax_scale: float) -> Tensor:
    start, end = plan[0].unsqueeze(1), plan[1].unsqueeze(1)
    key = torch.arange(keys.shape[0], device=keys.device)
    visible = (start <= key) & (key < end)
    scores = torch.einsum("ihgd,jhd->hgij", queries, keys) * softmax_scale
    return scores.masked_fill(~visible, float("-inf"))


def _probabilities(scores: Tensor, plan: list[Tensor]) -> Tensor:
    """Softmax over the keys, and 0 where a query sees nothing."""
    start, end, *_ = plan
    sees_nothing = (start >= end).unsqueeze(1)
    return scores.softmax(dim=-1).masked_fill(sees_nothing, 0.0)
