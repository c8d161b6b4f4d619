"""flash_attn_varlen_func against a softmax in float64, document by document."""

import inspect
import math

import pytest
import torch
from numerics import assert_close_to_exact
from torch import Tensor

from moca_fast import flash_attn_varlen_func


def cu(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def plain(q, k, v, queries, keys, causal=False, window=(-1, -1), scale=None):
    """Each document by itself; rows that see nothing and tokens past the last document are 0."""
    group = q.shape[1] // k.shape[1]
    left, right = window[0], 0 if causal else window[1]
    outs, row, key = [], 0, 0
    for n, m in zip(queries, keys, strict=True):
        a = q[row : row + n].transpose(0, 1)
        b, c = (x[key : key + m].repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
        level = torch.arange(n)[:, None] + m - n
        seen = torch.ones(n, m, dtype=torch.bool)
        if left >= 0:
            seen &= torch.arange(m) >= level - left
        if right >= 0:
            seen &= torch.arange(m) <= level + right
        scores = a @ b.transpose(1, 2) * (q.shape[2] ** -0.5 if scale is None else scale)
        weights = scores.masked_fill(~seen, -math.inf).softmax(-1) if m else scores
        weights = weights.masked_fill(~seen, 0)
        outs.append((weights @ c).transpose(0, 1))
        row, key = row + n, key + m
    return torch.cat([*outs, torch.zeros_like(q[row:])])


def check(queries, keys, heads=4, kv_heads=2, dim=32, extra=0, **options):
    random = torch.Generator().manual_seed(0)
    q = torch.randn(sum(queries) + extra, heads, dim, generator=random)
    k, v = torch.randn(2, sum(keys) + extra, kv_heads, dim, generator=random)
    d_out = torch.randn(q.shape, generator=random)
    d_out[sum(queries) :] = 0  # flash-attn leaves these rows undefined; ours are 0

    def run(function, inputs, gradient):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]

    theirs = {"window" if n == "window_size" else n: x for n, x in options.items()}
    theirs = {"scale" if n == "softmax_scale" else n: x for n, x in theirs.items()}
    longest = max(queries, default=0), max(keys, default=0)
    got = run(
        lambda *x: flash_attn_varlen_func(*x, cu(*queries), cu(*keys), *longest, **options),
        (q, k, v),
        d_out,
    )
    usual = run(lambda *x: plain(*x, queries, keys, **theirs), (q, k, v), d_out)
    doubles = [x.double() for x in (q, k, v)]
    exact = run(lambda *x: plain(*x, queries, keys, **theirs), doubles, d_out.double())
    for name, *values in zip(("out", "d_q", "d_k", "d_v"), got, usual, exact, strict=True):
        assert_close_to_exact(*values, torch.float32, name)


WINDOWS = [(-1, -1), (7, 3), (0, 0), (5, -1), (-1, 2), (100, 100)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
def test_self_attention(causal, window):
    lengths = [13, 0, 1, 40]
    check(lengths, lengths, causal=causal, window_size=window)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
def test_other_keys_than_queries(causal, window):
    """More keys, fewer, none, and documents without queries: the ends are aligned."""
    check([5, 20, 3, 0, 1], [30, 8, 0, 4, 50], causal=causal, window_size=window)


def test_scale_heads_and_tokens_past_the_end():
    check([30, 31], [30, 31], softmax_scale=0.4)
    check([30], [40], heads=3, kv_heads=1)
    check([9, 9], [9, 9], extra=5)


def test_log_sum_exp():
    q, k = torch.randn(6, 2, 16), torch.randn(9, 1, 16)
    out, lse, rest = flash_attn_varlen_func(
        q, k, k, cu(4, 2), cu(5, 4), 4, 5, return_attn_probs=True
    )
    scores = torch.einsum("ihd,jhd->hij", q, k.expand(-1, 2, -1)) / 4
    want = torch.cat([scores[:, :4, :5].logsumexp(-1), scores[:, 4:, 5:].logsumexp(-1)], dim=1)
    torch.testing.assert_close(lse, want)
    assert rest is None
    assert torch.equal(out, flash_attn_varlen_func(q, k, k, cu(4, 2), cu(5, 4), 4, 5))


def test_signature_is_that_of_flash_attn():
    names = (
        "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p softmax_scale causal "
        "window_size softcap alibi_slopes deterministic return_attn_probs block_table"
    )
    assert " ".join(inspect.signature(flash_attn_varlen_func).parameters) == names


@pytest.mark.parametrize("wide", [7, 2**31 - 2, 2**31 - 1, 2**63 - 1])
def test_a_window_wider_than_all_has_no_limit(wide):
    x = torch.randn(7, 2, 16)
    for window, same in (((-1, wide), (-1, -1)), ((wide, 0), (-1, 0))):
        assert torch.equal(call(q=x, window_size=window), call(q=x, window_size=same))


@pytest.mark.parametrize("change", [{"max_seqlen_q": None}, {"window_size": (1.0, 0)}])
def test_numbers_are_whole(change):
    with pytest.raises(TypeError, match="expected a whole number, got"):
        call(**change)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"softmax_scale": "a"}, TypeError, "softmax_scale: expected a number .*, got 'a'"),
        ({"softmax_scale": math.nan}, ValueError, "softmax_scale: expected a finite.*, got nan"),
        ({"causal": None}, TypeError, "causal: expected True or False, got None"),
    ],
)
def test_scale_and_causal_are_checked(change, error, message):
    with pytest.raises(error, match=f"moca_fast.flash_attn_varlen_func: {message}"):
        call(**change)


def call(**changes):
    x = torch.linspace(-1, 1, 7 * 2 * 16).view(7, 2, 16)
    values = {"q": x, "k": x, "v": x, "cu_seqlens_q": cu(4, 3), "cu_seqlens_k": cu(4, 3)}
    return flash_attn_varlen_func(**{**values, "max_seqlen_q": 4, "max_seqlen_k": 4, **changes})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dropout_p": 0.1}, "dropout_p: not supported, expected 0.0, got 0.1"),
        ({"softcap": 30.0}, "softcap: not supported"),
        ({"alibi_slopes": torch.ones(2)}, "alibi_slopes: not supported, expected None, got a tens"),
        ({"block_table": torch.zeros(1, 1)}, "block_table: not supported"),
        ({"max_seqlen_q": 3}, "max_seqlen_q: expected at least 4, got 3"),
        ({"max_seqlen_k": 0}, "max_seqlen_k: expected at least 4, got 0"),
        ({"cu_seqlens_q": torch.tensor([1, 7])}, "cu_seqlens_q: expected to start at 0, got 1"),
        ({"cu_seqlens_k": torch.tensor([0, 5, 4])}, "cu_seqlens_k: expected non-decreasing"),
        ({"cu_seqlens_q": torch.tensor([0, 8, 8])}, "end at or before the 7 tokens, got 8"),
        ({"cu_seqlens_k": torch.tensor([0, 7])}, r"cu_seqlens_k: expected shape \(3,\), got \(2,"),
        ({"q": torch.randn(7, 32)}, r"q: expected a \(tokens, heads, D\) tensor, got \(7, 32\)"),
        ({"k": None}, r"k: expected a \(tokens, heads, D\) tensor, got NoneType"),
        ({"v": torch.randn(7, 2, 24)}, r"v: expected shape \(7, 2, 16\)"),
        ({"cu_seqlens_q": cu(4, 3).to("meta")}, "device"),
        ({"window_size": None}, r"window_size: expected \(left, right\), got None"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)
