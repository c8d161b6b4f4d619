"""Documents become token ids and patches; long ones are cut between words, never inside an image.

L tokens of a document, N patches, P values a patch, I images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moca.data.images import ImageSettings, decode, patchify, resize, target_size
from moca.data.records import IMAGE_MARKER, Document, ImageLike

KNOWN_TOKENS = 1 << 22  # of texts whose tokens are remembered: 40 MB, and 0.5 KB a text
VISION_START, IMAGE_PAD, VISION_END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"


@dataclass
class Encoded:
    """One document, ready to be packed.

    Args:
        input_ids: (L,) int64; an image of grid (1, gh, gw) is ``<|vision_start|>``, then
            ``gh * gw / merge_size**2`` times ``<|image_pad|>``, then ``<|vision_end|>``.
        patches: (N, P) float32, the patches of all its images in order.
        grids: (I, 3) int64, (1, gh, gw) of each image in patches.
        name: where the document came from, for error messages.
    """

    input_ids: np.ndarray
    patches: np.ndarray
    grids: np.ndarray
    name: str = ""

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Piece:
    """A part of a document: runs[0], images[0], runs[1], images[1], ..., runs[I].

    Args:
        runs: I + 1 arrays of token ids, int32; any may be empty.
        images: as the document holds them, not decoded.
        image_names: of each image, for error messages.
        image_tokens: ``<|image_pad|>`` tokens that all its images take.
        name: of the document.
    """

    runs: tuple[np.ndarray, ...]
    images: tuple[ImageLike, ...]
    image_names: tuple[str, ...]
    image_tokens: int
    name: str

    def __len__(self) -> int:
        return sum(map(len, self.runs)) + 2 * len(self.images) + self.image_tokens


class Encoder:
    """Turns documents into `Encoded`.

    Args:
        tokenizer: a fast transformers tokenizer that has the three vision tokens of Qwen-VL.
        image_settings: how images become patches.
        max_length: most tokens of an encoded document; None for no limit.

    Attributes:
        counts: how many "documents truncated" and "images dropped" there were so far.

    Raises:
        ValueError: the tokenizer lacks a vision token, or max_length is not positive.
    """

    def __init__(
        self, tokenizer: Any, image_settings: ImageSettings, max_length: int | None = None
    ) -> None:
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be positive, got {max_length}")
        self.tokenizer = tokenizer
        self.settings = image_settings
        self.max_length = max_length
        self.merge_size = image_settings.merge_size
        self.counts: Counter[str] = Counter()
        self._known: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._room = KNOWN_TOKENS
        self.vision_start_id = self._special(VISION_START)
        self.image_token_id = self._special(IMAGE_PAD)
        self.vision_end_id = self._special(VISION_END)

    def __call__(self, document: Document, truncate: bool = True) -> Encoded:
        """Encode one document.

        With ``truncate`` it is cut to ``max_length``: text at a token, while an image that does not
        fit is left out whole (and counted) and the text after it is still used. Its closing is kept
        where no image has to go for it. Without, it comes back whole, whatever its length.

        Raises:
            ValueError: an empty document, an unreadable image, or one of which nothing but wording
                around it fits into max_length; names the record.
        """
        if not truncate or self.max_length is None:
            segments = list(self._segments(document))
        else:
            segments, dropped, cut = self._fitting(document, self.max_length)
            self.counts += Counter({"images dropped": dropped, "documents truncated": cut})
        return self._join([self._part(segment) for segment in segments], document.name)

    def check(self, document: Document) -> None:
        """Raise the ValueError that encoding the document would raise; nothing is counted."""
        if self.max_length is None:
            for _ in self._segments(document):
                pass
        else:
            self._fitting(document, self.max_length)

    def split(self, document: Document, budget: int) -> list[Piece]:
        """Cut a document into one or more pieces of at most ``budget`` tokens each.

        Cuts stand between words, or next to an image; only a single word longer than the budget is
        cut inside. Put together again, the pieces are the whole document. Its images are decoded
        here for their sizes.

        Raises:
            ValueError: an empty document, an unreadable image, or an image larger than the budget.
        """
        if budget < 1:
            raise ValueError(f"budget must be positive, got {budget}")
        pieces: list[Piece] = []
        segments: list[_Text | _Image] = []
        room = budget

        def flush() -> None:
            nonlocal segments, room
            pieces.append(_piece(segments, document.name))
            segments, room = [], budget

        for segment in self._segments(document):
            if isinstance(segment, _Image):
                if len(segment) > budget:
                    raise ValueError(
                        f"{document.name or 'document'}: an image of {len(segment)} tokens does "
                        f"not fit into the budget of {budget} tokens"
                    )
                if len(segment) > room:
                    flush()
                segments.append(replace(segment, image=segment.source))  # the pixels can go
                room -= len(segment)
                continue
            rest = segment
            while len(rest) > room:
                cut = rest.last_cut(room)
                if cut == 0 and segments:
                    flush()
                    continue
                head, rest = rest.cut(cut or room)
                segments.append(head)
                flush()
            if len(rest):
                segments.append(rest)
                room -= len(rest)
        if segments:
            flush()
        return pieces

    def encode(self, piece: Piece) -> Encoded:
        """Encode what `split` gave.

        Raises:
            ValueError: an unreadable image; names the record.
        """
        parts = [_Part(piece.runs[0])]
        for image, name, run in zip(piece.images, piece.image_names, piece.runs[1:], strict=True):
            parts += [self._part(self._open(image, name)), _Part(run)]
        return self._join(parts, piece.name)

    def _special(self, token: str) -> int:
        index = self.tokenizer.convert_tokens_to_ids(token)
        if index is None or index == self.tokenizer.unk_token_id:
            raise ValueError(f"the tokenizer has no token {token}; a Qwen-VL tokenizer is needed")
        return index

    def _segments(self, document: Document) -> Iterator[_Text | _Image]:
        """The document's runs of text and its images, in order."""
        where = document.name or "document"
        if document.empty:
            raise ValueError(f"{where}: the document is empty")
        ids, starts = self._tokens(document.text + document.closing)
        pads = np.flatnonzero(ids == self.image_token_id)
        whole = len(pads) == len(document.images) and all(
            0 < pad < len(ids) - 1
            and ids[pad - 1] == self.vision_start_id
            and ids[pad + 1] == self.vision_end_id
            for pad in pads
        )
        if not whole:
            raise ValueError(
                f"{where}: the tokenizer does not keep the image marker whole: {len(pads)} "
                f"{IMAGE_PAD} tokens for {len(document.images)} image(s)"
            )
        begin = 0
        for i, pad in enumerate(pads):
            if pad - 1 > begin:
                yield _Text(ids[begin : pad - 1], starts[begin : pad - 1])
            yield self._open(document.images[i], document.image_names[i])
            begin = int(pad) + 2
        if begin < len(ids):
            yield _Text(ids[begin:], starts[begin:])

    def _tokens(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of a text, and at which of them a word starts. Training sees a text many times:
        the first `KNOWN_TOKENS` are remembered.
        """
        if text in self._known:
            return self._known[text]
        encoding = self.tokenizer(text, add_special_tokens=False)
        ids = np.asarray(encoding["input_ids"], np.int64)
        words = np.asarray([-1 if word is None else word for word in encoding.word_ids()])
        starts = np.ones(len(ids), bool)
        starts[1:] = (words[1:] != words[:-1]) | (words[1:] < 0)
        ids.flags.writeable = starts.flags.writeable = False
        if len(ids) <= self._room:
            self._room -= len(ids)
            self._known[text] = ids, starts
        return ids, starts

    def _open(self, image: ImageLike, name: str) -> _Image:
        opened = decode(image, name)
        height, width = target_size(opened.height, opened.width, self.settings, name)
        tokens = height * width // self.settings.factor**2
        return _Image(image, opened, tokens, name)

    def _part(self, segment: _Text | _Image) -> _Part:
        if isinstance(segment, _Text):
            return _Part(segment.ids)
        resized = resize(segment.image, self.settings, segment.name)
        patches, grid = patchify(np.asarray(resized), self.settings)
        ids = np.full(len(segment), self.image_token_id, np.int64)
        ids[0], ids[-1] = self.vision_start_id, self.vision_end_id
        return _Part(ids, patches, grid)

    def _fitting(self, document: Document, room: int) -> tuple[list[_Text | _Image], int, bool]:
        """What of a document fits, how many images do not, and whether anything does not."""
        segments, too_large, cut = self._cut(document, room)
        if not cut:
            return segments, 0, False
        bare = replace(document, closing="")
        own = self._cut(bare, room)[0] if document.closing else segments
        if not self._own_left(document, own):
            what = f"an image of {max(too_large)} tokens" if too_large else "the text"
            prompt = document.opening or document.closing
            around = " with the wording around it" if prompt else ""
            raise ValueError(
                f"{document.name or 'document'}: {what} does not fit into max_length "
                f"{self.max_length}{around}, and nothing else of the document does"
            )
        closing = _Text(*self._tokens(document.closing))
        if 0 < len(closing) < room:
            kept, left_out, _ = self._cut(bare, room - len(closing))
            if len(left_out) == len(too_large) and self._own_left(document, kept):
                segments = [*kept, closing]
        return segments, len(too_large), cut

    def _own_left(self, document: Document, segments: list[_Text | _Image]) -> bool:
        """Whether an image is among the segments, or words of the document's own."""
        if any(isinstance(segment, _Image) for segment in segments):
            return True
        if not document.text.removeprefix(document.opening).replace(IMAGE_MARKER, "").strip():
            return False
        in_markers = 3 * document.opening.count(IMAGE_MARKER)
        opening = len(self._tokens(document.opening)[0]) - in_markers
        return sum(map(len, segments)) > opening

    def _cut(self, document: Document, room: int) -> tuple[list[_Text | _Image], list[int], bool]:
        """What fits from the beginning, the tokens of images that do not, and whether anything does
        not."""
        segments: list[_Text | _Image] = []
        cut, too_large = False, []
        for segment in self._segments(document):
            if isinstance(segment, _Image):
                if len(segment) > room:
                    cut = True
                    too_large.append(len(segment))
                    continue
            elif len(segment) > room:
                cut = True
                segment, _ = segment.cut(room)
                if not room:
                    continue
            segments.append(segment)
            room -= len(segment)
        return segments, too_large, cut

    def _join(self, parts: list[_Part], name: str) -> Encoded:
        if not sum(len(part.ids) for part in parts):
            raise ValueError(f"{name or 'document'}: the document has no tokens")
        patches = [part.patches for part in parts if part.patches is not None]
        grids = [part.grid for part in parts if part.grid is not None]
        return Encoded(
            np.concatenate([part.ids for part in parts], dtype=np.int64),
            np.concatenate(patches)
            if patches
            else np.zeros((0, self.settings.patch_dim), np.float32),
            np.asarray(grids, np.int64).reshape(-1, 3),
            name,
        )


@dataclass(frozen=True)
class _Text:
    """A run of text: token ids, and at which of them a word starts."""

    ids: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def last_cut(self, room: int) -> int:
        """The last place up to ``room`` where a word starts; 0 when there is no other."""
        places = np.flatnonzero(self.starts[: room + 1])
        return int(places[-1]) if len(places) else 0

    def cut(self, at: int) -> tuple[_Text, _Text]:
        """Its first ``at`` tokens, and the rest."""
        return _Text(self.ids[:at], self.starts[:at]), _Text(self.ids[at:], self.starts[at:])


@dataclass(frozen=True)
class _Image:
    """An image as the document holds it, decoded, and how many ``<|image_pad|>`` it takes."""

    source: ImageLike
    image: Any
    tokens: int
    name: str

    def __len__(self) -> int:
        return self.tokens + 2  # its brackets


@dataclass(frozen=True)
class _Part:
    """Tokens, and the patches behind them when they are an image."""

    ids: np.ndarray
    patches: np.ndarray | None = None
    grid: tuple[int, int, int] | None = None


def _piece(segments: list[_Text | _Image], name: str) -> Piece:
    runs: list[list[np.ndarray]] = [[]]
    images = []
    for segment in segments:
        if isinstance(segment, _Image):
            images.append(segment)
            runs.append([])
        else:
            runs[-1].append(segment.ids)
    return Piece(
        tuple(np.concatenate([*run, np.zeros(0, np.int32)], dtype=np.int32) for run in runs),
        tuple(image.source for image in images),
        tuple(image.name for image in images),
        sum(image.tokens for image in images),
        name,
    )
