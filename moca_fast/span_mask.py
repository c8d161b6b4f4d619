"""SpanMask: an attention mask in which every query sees one contiguous interval of keys.

B documents, T query tokens, K key tokens (K = T for self-attention), I images.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from moca_fast import _C
from moca_fast._checks import check_int, check_tensor
from moca_fast._operator import operator
from moca_fast.tile_plan import device_tiles

MOST_TOKENS = 2**31 - 1  # spans are int32
TILE_FIELDS = 5  # row_begin, row_end, key_begin, key_end, masked


class SpanMask:
    """Query i attends the keys j with start[i] <= j < end[i]; true means "may look at".

    Both ends are non-decreasing, so the queries that see one key are contiguous as well
    (`transposed`). An empty span is legal: that row's output is 0 and its lse is -inf.

    Plans and the transposed mask are made when first asked for and kept, so every layer that is
    given the same mask, forward and backward, shares them.

    Args:
        start, end: (T,) int32, non-decreasing, 0 <= start <= end <= num_keys.
        num_keys: number of keys; default T.
        validate: check the values too. Default: on the CPU only and not while compiling, since
            reading values from an accelerator waits for it. The CPU kernels check on their own.

    Raises:
        ValueError: shapes, devices or (where checked) values that break the rules above.
        TypeError: not int32 tensors.
    """

    def __init__(
        self,
        start: Tensor,
        end: Tensor,
        num_keys: int | None = None,
        *,
        validate: bool | None = None,
    ) -> None:
        check_tensor("SpanMask", "start", start, shape=("T",), dtypes=(torch.int32,))
        size = start.shape[0]
        check_tensor("SpanMask", "end", end, shape=(size,), dtypes=(torch.int32,), like=start)
        self.start, self.end = _saveable(start), _saveable(end)
        self.num_keys = size if num_keys is None else num_keys
        _check_size("num_keys", self.num_keys)
        self._tiles: dict[int, Tensor] = {}
        self._transposed: SpanMask | None = None
        if _checks_values(start) if validate is None else validate:
            _validate_spans(self.start, self.end, self.num_keys)

    @classmethod
    def full(
        cls, cu_seqlens: Tensor, total: int | None = None, *, validate: bool | None = None
    ) -> SpanMask:
        """Bidirectional inside each document: MoCa.

        Args:
            cu_seqlens: (B + 1,) int32 or int64, where documents begin, and where the last ends.
            total: T; tokens from cu_seqlens[-1] on see nothing. Default cu_seqlens[-1], which
                waits for an accelerator: give it where that counts, and under torch.compile.
            validate: as for the class.

        Raises:
            ValueError: cu_seqlens that does not start at 0, decreases, or ends past `total`.
        """
        _, start, end = _documents(cu_seqlens, total, validate)
        return cls(start, end, validate=False)

    @classmethod
    def causal(
        cls, cu_seqlens: Tensor, total: int | None = None, *, validate: bool | None = None
    ) -> SpanMask:
        """Every token sees itself and what comes before it in its document. Args as for `full`."""
        token, start, end = _documents(cu_seqlens, total, validate)
        return cls(start, torch.minimum(end, token + 1), validate=False)

    @classmethod
    def window(
        cls,
        cu_seqlens: Tensor,
        left: int | None,
        right: int | None,
        total: int | None = None,
        *,
        validate: bool | None = None,
    ) -> SpanMask:
        """Every token sees itself, `left` tokens before and `right` after it, in its document.

        Args:
            left, right: tokens to each side, 0 or more; None is without limit.
            cu_seqlens, total, validate: as for `full`.
        """
        for name, value in (("left", left), ("right", right)):
            if value is not None:
                check_int("SpanMask.window", name, value, 0)
        token, start, end = _documents(cu_seqlens, total, validate)
        size = token.shape[0]  # no window is wider: sums stay in the range of int32
        if right is not None:
            end = torch.minimum(end, token + (torch.sym_min(right, size) + 1))
        if left is not None:
            start = torch.minimum(torch.maximum(start, token - torch.sym_min(left, size)), end)
        return cls(start, end, validate=False)

    @classmethod
    def image_blocks(
        cls,
        cu_seqlens: Tensor,
        image_spans: Tensor,
        total: int | None = None,
        *,
        validate: bool | None = None,
    ) -> SpanMask:
        """Causal text; the tokens of one image see each other, and all that comes before.

        Args:
            image_spans: (I, 2) int32 or int64, the tokens [begin, end) of each image, in order,
                not overlapping, each inside one document.
            cu_seqlens, total, validate: as for `full`.
        """
        token, start, end = _documents(cu_seqlens, total, validate)
        dtypes = (torch.int32, torch.int64)
        check_tensor(
            "SpanMask", "image_spans", image_spans, shape=("I", 2), dtypes=dtypes, like=cu_seqlens
        )
        if _checks_values(image_spans) if validate is None else validate:
            _validate_images(image_spans, cu_seqlens)
        spans = image_spans.to(torch.int32)
        first = torch.cat([spans.new_zeros(1), spans[:, 0]])  # an empty image, so that I = 0 works
        last = torch.cat([spans.new_zeros(1), spans[:, 1]])
        image = torch.searchsorted(first, token, right=True) - 1
        return cls(start, torch.minimum(end, torch.maximum(token + 1, last[image])), validate=False)

    @property
    def num_queries(self) -> int:
        """T."""
        return self.start.shape[0]

    @property
    def device(self) -> torch.device:
        return self.start.device

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> SpanMask:
        """This mask on `device`; itself if it is there already."""
        start = self.start.to(device, non_blocking=non_blocking)
        if start is self.start:
            return self
        end = self.end.to(device, non_blocking=non_blocking)
        return SpanMask(start, end, self.num_keys, validate=False)

    def transposed(self) -> SpanMask:
        """The same pairs seen from the keys: key j is seen by queries [start[j], end[j])."""
        if self._transposed is not None:
            return self._transposed
        transposed = self._transpose()
        if _is_kept(transposed.start, self.start):
            self._transposed = transposed
        return transposed

    def _transpose(self) -> SpanMask:
        with _trainable():
            key = torch.arange(self.num_keys, dtype=torch.int32, device=self.device)
            # Query i sees j if start[i] <= j and j < end[i]: a prefix and a suffix of the queries.
            start = torch.searchsorted(self.end, key, right=True, out_int32=True)
            end = torch.searchsorted(self.start, key, right=True, out_int32=True)
            # A key that nobody sees stands at the end of those who see the keys before it: queries
            # that see nothing, whatever they hold, are then between no key's queries.
            seen = start < end
            last = torch.where(seen, end, 0).cummax(0).values
            start, end = torch.where(seen, start, last), torch.where(seen, end, last)
            return SpanMask(start, end, self.num_queries, validate=False)

    def tiles(self, rows: int) -> Tensor:
        """The tile plan for query tiles of at most `rows` rows.

        A tile is a slice of one long document or several whole short ones, where a document is a
        run of queries that share keys. Planned where the mask is: an accelerator is not waited for.

        Returns:
            (3 * T // rows + 2, 5) int32: row_begin, row_end, key_begin, key_end and masked (0 if
            every row of the tile sees every key of the interval); unused tiles last, all 0. In
            the order of rows on the CPU; on an accelerator those with the most keys first.
        """
        check_int("SpanMask.tiles", "rows", rows, 1)
        if rows in self._tiles:
            return self._tiles[rows]
        with _trainable():
            tiles = torch.ops.moca_fast.span_tiles(self.start, self.end, self.num_keys, rows)
        if _is_kept(tiles, self.start):
            self._tiles[rows] = tiles
        return tiles

    def tile_efficiency(self, rows: int, columns: int = 1) -> float:
        """Useful query-key pairs / pairs computed by tiles of `rows` queries by `columns` keys.

        A tile is computed whole, for as many blocks of `columns` keys as its interval needs.
        1.0 if there is nothing to compute.
        """
        check_int("SpanMask.tile_efficiency", "columns", columns, 1)
        useful = (self.end.long() - self.start.long()).sum()
        tiles = self.tiles(rows).long()
        blocks = (tiles[:, 3] - tiles[:, 2] + columns - 1) // columns
        computed = int(blocks.sum()) * rows * columns
        return int(useful) / computed if computed else 1.0

    def dense(self) -> Tensor:
        """(T, K) bool, true where query i sees key j. For tests and small examples."""
        key = torch.arange(self.num_keys, dtype=torch.int32, device=self.device)
        return (self.start[:, None] <= key) & (key < self.end[:, None])

    def __repr__(self) -> str:
        return f"SpanMask(T={self.num_queries}, num_keys={self.num_keys}, device='{self.device}')"


def _trainable() -> AbstractContextManager:
    """What is made and kept inside may be saved for a backward, even if now there is none."""
    if torch.compiler.is_compiling():
        return nullcontext()
    return torch.inference_mode(False)


def _saveable(tensor: Tensor) -> Tensor:
    """The tensor, contiguous, as one that a backward may use: those of inference mode may not."""
    if torch.compiler.is_compiling() or not tensor.is_inference():
        return tensor.contiguous()
    with torch.inference_mode(False):
        return tensor.clone(memory_format=torch.contiguous_format)


def _is_kept(made: Tensor, of: Tensor) -> bool:
    """Whether what was made of a mask is kept: not what torch.export makes of a real one."""
    return type(made) is type(of)


def _checks_values(tensor: Tensor) -> bool:
    real = type(tensor) is Tensor  # others have no values while torch traces
    return real and tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_size(name: str, value: int) -> None:
    check_int("SpanMask", name, value, 0)
    if value > MOST_TOKENS:
        raise ValueError(f"moca_fast.SpanMask: {name}: expected at most 2^31 - 1, got {value}")


def _documents(
    cu_seqlens: Tensor, total: int | None, validate: bool | None
) -> tuple[Tensor, Tensor, Tensor]:
    """For every token its index, where its document begins and where it ends: (T,) int32 each."""
    if total is not None:
        _check_size("total", total)
    check_cu_seqlens("SpanMask", "cu_seqlens", cu_seqlens, total, validate)
    size = int(cu_seqlens[-1]) if total is None else total
    _check_size("the last of cu_seqlens", size)
    bounds = cu_seqlens.to(torch.int32)
    bounds = torch.cat([bounds, bounds[-1:]])  # an empty document for tokens past the last one
    token = torch.arange(size, dtype=torch.int32, device=cu_seqlens.device)
    document = torch.searchsorted(bounds[:-1], token, right=True)
    return token, bounds[document - 1], bounds[document]


def check_cu_seqlens(
    op: str, name: str, cu_seqlens: Tensor, total: int | None, validate: bool | None = None
) -> None:
    """Raise unless cu_seqlens is (B + 1,) int32 or int64, starts at 0, rises, ends by `total`."""
    check_tensor(op, name, cu_seqlens, shape=("B + 1",), dtypes=(torch.int32, torch.int64))
    where = f"moca_fast.{op}: {name}"
    if cu_seqlens.shape[0] == 0:
        raise ValueError(f"{where}: expected at least one entry (0), got none")
    if not (_checks_values(cu_seqlens) if validate is None else validate):
        return
    if int(cu_seqlens[0]) != 0:
        raise ValueError(f"{where}: expected to start at 0, got {int(cu_seqlens[0])}")
    _raise_where(cu_seqlens[1:] < cu_seqlens[:-1], where, "non-decreasing", cu_seqlens, 1)
    if total is not None and int(cu_seqlens[-1]) > total:
        raise ValueError(
            f"{where}: expected to end at or before the {total} tokens, got {int(cu_seqlens[-1])}"
        )


def _validate_spans(start: Tensor, end: Tensor, num_keys: int) -> None:
    where = "moca_fast.SpanMask"
    _raise_where(start[1:] < start[:-1], f"{where}: start", "non-decreasing", start, 1)
    _raise_where(end[1:] < end[:-1], f"{where}: end", "non-decreasing", end, 1)
    _raise_where(start < 0, f"{where}: start", "0 or more", start)
    _raise_where(start > end, f"{where}: start", "at most end", start)
    _raise_where(end > num_keys, f"{where}: end", f"at most num_keys = {num_keys}", end)


def _validate_images(image_spans: Tensor, cu_seqlens: Tensor) -> None:
    where = "moca_fast.SpanMask: image_spans"
    begin, end = image_spans[:, 0].contiguous(), image_spans[:, 1].contiguous()
    _raise_where(begin > end, where, "begin at most end", image_spans)
    _raise_where(begin[1:] < end[:-1], where, "in order and not overlapping", image_spans, 1)
    document = torch.searchsorted(cu_seqlens.contiguous(), begin, right=True)
    bounds = torch.cat([cu_seqlens, cu_seqlens[-1:]])
    outside = (begin < 0) | ((begin < end) & (end > bounds[document.clamp(max=len(cu_seqlens))]))
    _raise_where(outside, where, "inside one document", image_spans)


def _raise_where(bad: Tensor, where: str, expected: str, values: Tensor, offset: int = 0) -> None:
    if bad.any():
        at = int(bad.nonzero()[0]) + offset
        previous = f" after {values[at - 1].tolist()}" if offset else ""
        raise ValueError(
            f"{where}: expected {expected}, got {values[at].tolist()}{previous} at {at}"
        )


@operator("span_tiles")
def _span_tiles(start: Tensor, end: Tensor, num_keys: int, rows: int) -> Tensor:
    if start.device.type != "cpu":
        return device_tiles(start, end, rows, _max_tiles(start.shape[0], rows))
    start, end = start.contiguous(), end.contiguous()
    tiles = torch.zeros(_max_tiles(start.shape[0], rows), TILE_FIELDS, dtype=torch.int32)
    _C.span_tiles(
        start=start.data_ptr(),
        end=end.data_ptr(),
        num_queries=start.shape[0],
        num_keys=num_keys,
        rows=rows,
        tiles=tiles.data_ptr(),
        max_tiles=tiles.shape[0],
    )
    return tiles


@_span_tiles.register_fake
def _(start, end, num_keys, rows):
    return start.new_empty(_max_tiles(start.shape[0], rows), TILE_FIELDS)


def _max_tiles(num_queries: int, rows: int) -> int:
    """More tiles than any mask needs: a long document wastes at most one tile, and so does the
    run of short ones after it; two consecutive tiles of short ones hold more than `rows`."""
    return 3 * num_queries // rows + 2
