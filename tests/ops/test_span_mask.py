"""SpanMask: what each constructor lets a token see, what it refuses, and how it is cut in tiles."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moca_fast import SpanMask, attention
from moca_fast.tile_plan import device_tiles


def cu(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def dense(lengths, sees, total=None) -> Tensor:
    """(T, T) bool from a rule about two tokens of one document, both counted in the pack."""
    total = sum(lengths) if total is None else total
    owner = [b for b, n in enumerate(lengths) for _ in range(n)]
    return torch.tensor(
        [
            [max(i, j) < len(owner) and owner[i] == owner[j] and sees(i, j) for j in range(total)]
            for i in range(total)
        ]
    ).view(total, total)


LENGTHS = ((5, 0, 3), (0, 1, 1, 0), (9,), ())


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("extra", [0, 4])
def test_documents(lengths, extra):
    total = sum(lengths) + extra
    bounds = cu(*lengths)
    every = {
        SpanMask.full(bounds, total): lambda i, j: True,
        SpanMask.causal(bounds, total): lambda i, j: j <= i,
        SpanMask.window(bounds, 2, 1, total): lambda i, j: i - 2 <= j <= i + 1,
        SpanMask.window(bounds, None, 1, total): lambda i, j: j <= i + 1,
        SpanMask.window(bounds, 0, None, total): lambda i, j: i <= j,
        SpanMask.window(bounds, 0, 0, total): lambda i, j: i == j,
    }
    for mask, sees in every.items():
        assert torch.equal(mask.dense(), dense(lengths, sees, total))
        assert (mask.num_queries, mask.num_keys) == (total, total)


def test_total_defaults_to_the_last_bound():
    assert SpanMask.full(cu(3, 4)).num_queries == 7
    assert SpanMask.full(torch.tensor([0, 3], dtype=torch.int64)).start.dtype == torch.int32


def test_image_blocks():
    lengths = (8, 0, 6)
    images = [(1, 3), (3, 3), (3, 5), (8, 12)]

    def sees(i, j):
        return j <= i or any(begin <= i < end and begin <= j < end for begin, end in images)

    mask = SpanMask.image_blocks(cu(*lengths), torch.tensor(images), total=16)
    assert torch.equal(mask.dense(), dense(lengths, sees, 16))
    none = SpanMask.image_blocks(cu(*lengths), torch.zeros(0, 2, dtype=torch.int32))
    assert torch.equal(none.dense(), SpanMask.causal(cu(*lengths)).dense())


@st.composite
def span_masks(draw):
    keys = draw(st.integers(0, 60))
    queries = draw(st.integers(0, 60))
    ends = st.lists(st.integers(0, keys), min_size=queries, max_size=queries)
    start = torch.tensor(sorted(draw(ends)), dtype=torch.int32)
    end = torch.maximum(start, torch.tensor(sorted(draw(ends)), dtype=torch.int32))
    return SpanMask(start, end, keys)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(span_masks())
def test_transposed(mask):
    other = mask.transposed()
    assert torch.equal(other.dense(), mask.dense().t())
    SpanMask(other.start, other.end, other.num_keys)  # monotone too


@settings(max_examples=60, deadline=None, derandomize=True)
@given(span_masks(), st.integers(1, 20))
def test_tiles_cover_every_row_once(mask, rows):
    tiles = [t for t in mask.tiles(rows).tolist() if t[1] > t[0]]
    assert [row for t in tiles for row in range(t[0], t[1])] == list(range(mask.num_queries))
    visible = mask.dense()
    for begin, end, key_begin, key_end, masked in tiles:
        assert end - begin <= rows
        assert not visible[begin:end, :key_begin].any() and not visible[begin:end, key_end:].any()
        assert masked or visible[begin:end, key_begin:key_end].all()


def test_tiles_follow_documents():
    """Short documents whole, six of twenty tokens to a tile; long ones cut, by themselves."""
    mask = SpanMask.full(cu(*[20] * 7, 100, 500, 8))
    tiles = [t[:4] for t in mask.tiles(128).tolist() if t[1] > t[0]]
    assert tiles[0] == [0, 120, 0, 120]
    assert tiles[1:3] == [[120, 240, 120, 240], [240, 368, 240, 740]]
    assert [t[1] - t[0] for t in tiles] == [120, 120, 128, 128, 128, 116, 8]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(span_masks(), st.integers(1, 20))
def test_device_plan_has_the_same_tiles(mask, rows):
    """Made by other means on accelerators, longest first; unused tiles are 0 and come last."""
    host = mask.tiles(rows)
    device = device_tiles(mask.start, mask.end, rows, len(host))
    assert device.shape == host.shape and device.dtype == host.dtype
    assert sorted(device.tolist()) == sorted(host.tolist())
    used = [t for t in device.tolist() if t[1] > t[0]]
    assert not device[len(used) :].any()
    keys = [t[3] - t[2] for t in used]
    assert keys == sorted(keys, reverse=True)


def test_plans_are_made_once():
    mask = SpanMask.full(cu(5, 9))
    assert mask.tiles(8) is mask.tiles(8)
    assert mask.transposed() is mask.transposed()


def test_tile_efficiency():
    assert SpanMask.full(cu(256)).tile_efficiency(128, 64) == 1.0
    assert SpanMask.full(cu(64)).tile_efficiency(128, 64) == 0.5
    assert SpanMask.full(cu(*[20] * 6)).tile_efficiency(128, 128) == 6 * 400 / 128**2
    assert SpanMask.full(cu(0), total=9).tile_efficiency(4) == 1.0
    assert SpanMask.full(cu(40, 2)).tile_efficiency(4) > SpanMask.full(cu(40, 2)).tile_efficiency(
        32
    )


def test_to():
    mask = SpanMask.causal(cu(4, 2))
    assert mask.to("cpu") is mask
    moved = mask.to("meta")
    assert moved.device.type == "meta" and moved.num_keys == 6 and "T=6" in repr(moved)


def ints(*values: int, dtype=torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


BAD_SPANS = {
    "start falls": ((ints(2, 1), ints(3, 3)), "start: expected non-decreasing, got 1 after 2 at 1"),
    "end falls": ((ints(0, 0), ints(2, 1)), "end: expected non-decreasing, got 1 after 2 at 1"),
    "negative": ((ints(-1, 0), ints(1, 1)), "start: expected 0 or more, got -1 at 0"),
    "inverted": ((ints(1, 2), ints(1, 1)), "start: expected at most end, got 2 at 1"),
    "past the keys": ((ints(0, 0), ints(1, 3)), "end: expected at most num_keys = 2, got 3 at 1"),
    "past given keys": ((ints(0), ints(9), 8), "at most num_keys = 8, got 9"),
    "lengths": ((ints(0, 0), ints(1)), r"end: expected shape \(2,\), got \(1,\)"),
    "dims": ((ints(0)[None], ints(1)), r"start: expected shape \(T,\), got \(1, 1\)"),
    "devices": ((ints(0), ints(1).to("meta")), "end: expected device cpu, got meta"),
}


@pytest.mark.parametrize("name", BAD_SPANS)
def test_bad_spans(name):
    arguments, message = BAD_SPANS[name]
    with pytest.raises(ValueError, match=message):
        SpanMask(*arguments)


def test_dtype_is_named():
    with pytest.raises(TypeError, match="start: expected dtype int32, got int64"):
        SpanMask(ints(0, dtype=torch.int64), ints(1))
    with pytest.raises(TypeError, match="cu_seqlens: expected dtype int32 or int64, got float32"):
        SpanMask.full(torch.tensor([0.0, 1.0]))
    with pytest.raises(TypeError, match="start: expected a tensor, got list"):
        SpanMask([0], [1])


CONSTRUCTORS = {
    "full": SpanMask.full,
    "causal": SpanMask.causal,
    "window": lambda bounds, total=None: SpanMask.window(bounds, 1, 1, total),
    "image_blocks": lambda bounds, total=None: SpanMask.image_blocks(
        bounds, torch.zeros(0, 2, dtype=torch.int32), total
    ),
}


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_bad_cu_seqlens(name):
    make = CONSTRUCTORS[name]
    with pytest.raises(ValueError, match="cu_seqlens: expected to start at 0, got 1"):
        make(ints(1, 3))
    with pytest.raises(ValueError, match="expected non-decreasing, got 2 after 3 at 2"):
        make(ints(0, 3, 2))
    with pytest.raises(ValueError, match="end at or before the 4 tokens, got 5"):
        make(ints(0, 5), total=4)
    with pytest.raises(ValueError, match=r"expected shape \(B \+ 1,\), got \(1, 2\)"):
        make(ints(0, 1)[None])
    with pytest.raises(ValueError, match="at least one entry"):
        make(ints())


@pytest.mark.parametrize(
    "images, message",
    [
        ([[3, 2]], "begin at most end"),
        ([[0, 2], [1, 3]], "in order and not overlapping"),
        ([[4, 5], [0, 2]], "in order and not overlapping"),
        ([[3, 6]], "inside one document"),
        ([[7, 9]], "inside one document"),
        ([[-1, 2]], "inside one document"),
        ([[0, 1, 2]], r"expected shape \(I, 2\)"),
    ],
)
def test_bad_images(images, message):
    with pytest.raises(ValueError, match=message):
        SpanMask.image_blocks(cu(5, 3), torch.tensor(images))


def test_bad_window():
    with pytest.raises(ValueError, match="left: expected at least 0, got -1"):
        SpanMask.window(cu(5), -1, 0)
    with pytest.raises(TypeError, match=r"right: expected a whole number, got 2\.0"):
        SpanMask.window(cu(5), None, 2.0)


@pytest.mark.parametrize("wide", [5, 2**31 - 1, 2**63 - 1, 10**30])
def test_a_window_wider_than_all_has_no_limit(wide):
    bounds = cu(5, 3)
    full = SpanMask.full(bounds).dense()
    assert torch.equal(SpanMask.window(bounds, wide, wide).dense(), full)


def test_bad_number_of_keys():
    with pytest.raises(TypeError, match=r"num_keys: expected a whole number, got 2\.5"):
        SpanMask(ints(0), ints(1), 2.5)
    with pytest.raises(ValueError, match="num_keys: expected at least 0, got -3"):
        SpanMask(ints(), ints(), -3)


@pytest.mark.parametrize("total", [2**31, 2**40])
def test_more_tokens_than_spans_can_name(total):
    with pytest.raises(ValueError, match=rf"total: expected at most 2\^31 - 1, got {total}"):
        SpanMask.full(cu(5), total)
    with pytest.raises(ValueError, match=f"last of cu_seqlens: expected at most .* got {total}"):
        SpanMask.full(torch.tensor([0, total]))
    with pytest.raises(ValueError, match=f"num_keys: expected at most .* got {total}"):
        SpanMask(ints(0), ints(1), total)


def test_bad_sizes():
    with pytest.raises(TypeError, match=r"total: expected a whole number, got 5\.0"):
        SpanMask.full(cu(5), 5.0)
    mask = SpanMask.full(cu(5))
    for rows in (0, -3):
        with pytest.raises(ValueError, match=f"rows: expected at least 1, got {rows}"):
            mask.tiles(rows)
    with pytest.raises(ValueError, match="columns: expected at least 1, got 0"):
        mask.tile_efficiency(16, 0)


def test_plans_and_masks_of_inference_serve_training():
    mask = SpanMask.full(cu(5, 3))
    x = torch.randn(8, 2, 16)
    with torch.inference_mode():
        attention(x, x, x, mask)
        assert not mask.transposed().start.is_inference()
        other = SpanMask.full(cu(5, 3))
    for each in (mask, other):
        x.grad = None
        attention(x.requires_grad_(), x, x, each).sum().backward()
        assert x.grad is not None


def test_plans_of_a_trace_are_not_kept():
    """A trace of fake tensors leaves none of them in the mask of a module."""

    class Attention(torch.nn.Module):
        mask = SpanMask.full(cu(5, 3))

        def forward(self, x):
            return attention(x, x, x, self.mask)

    module, x = Attention(), torch.randn(8, 2, 16)
    torch.export.export(module, (x,), strict=False)
    with FakeTensorMode() as mode:
        assert SpanMask.causal(mode.from_tensor(cu(5, 3)), 8).tiles(16).shape[1] == 5
    assert torch.equal(module(x), attention(x, x, x, SpanMask.full(cu(5, 3))))


def test_validation_can_be_left_out_or_forced():
    falling = ints(1, 0)
    assert SpanMask(falling, ints(2, 2), validate=False).num_queries == 2
    assert SpanMask.full(ints(0, 3, 2), total=3, validate=False).num_queries == 3
    with pytest.raises(ValueError, match="non-decreasing"):
        SpanMask(falling, ints(2, 2), validate=True)
