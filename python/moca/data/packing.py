"""Packing: documents one after another on a single axis of tokens, without any padding.

B documents, T packed tokens, N patches, P values a patch, I images, L tokens of one document.
Positions are the multimodal rotary ones of Qwen2-VL (arXiv 2409.12191): text advances time, height
and width together; an image spreads over height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from moca.data.encode import Encoded

# What an image token costs in text tokens: behind it stand the patches of the vision tower
# (arXiv 2506.23115, released code).
IMAGE_TOKEN_COST = 4
# Documents that are sorted by cost together before they are put into batches.
BUCKET = 1024


@dataclass
class PackedBatch:
    """Documents on one axis of tokens.

    Args:
        input_ids: (T,) int64.
        position_ids: (4, T) int64: a text row that restarts with each document, then time, height
            and width.
        cu_seqlens: (B + 1,) int32, where documents begin, and T.
        max_length: tokens of the longest document.
        pixel_values: (N, P) float32, the patches of all documents in order.
        image_grid_thw: (I, 3) int64, each image's (1, gh, gw) in patches.
        mm_token_type_ids: (T,) int32, 1 on image tokens and 0 elsewhere.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_length: int
    pixel_values: torch.Tensor
    image_grid_thw: torch.Tensor
    mm_token_type_ids: torch.Tensor

    def __len__(self) -> int:
        """B, the number of documents."""
        return len(self.cu_seqlens) - 1

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on another device."""
        moved: dict[str, Any] = {
            name: value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)


def mrope_positions(
    input_ids: np.ndarray, grids: np.ndarray, merge_size: int, image_token_id: int
) -> np.ndarray:
    """Rotary positions of one document: time, height, width.

    Args:
        input_ids: (L,) int64.
        grids: (I, 3) int64, in patches.
        merge_size: patches along each side of one image token.
        image_token_id: the token that stands for a piece of an image.

    Returns:
        (3, L) int64.

    Raises:
        ValueError: runs of image tokens that do not match the grids.
    """
    is_image = np.asarray(input_ids) == image_token_id
    if not len(grids) and not is_image.any():
        return np.tile(np.arange(len(is_image)), (3, 1))
    edges = np.flatnonzero(np.diff(is_image, prepend=False, append=False))
    starts, ends = edges[::2], edges[1::2]
    sizes = np.asarray(grids, np.int64).reshape(-1, 3) // (1, merge_size, merge_size)
    if len(starts) != len(sizes) or (sizes.prod(axis=1) != ends - starts).any():
        raise ValueError(
            f"runs of image tokens of lengths {(ends - starts).tolist()} do not match grids of "
            f"{sizes.prod(axis=1).tolist()} tokens"
        )
    positions = np.empty((3, len(is_image)), np.int64)
    token, position = 0, 0
    for start, end, size in zip(starts, ends, sizes, strict=True):
        positions[:, token:start] = np.arange(position, position + start - token)
        position += start - token
        positions[:, start:end] = np.indices(size).reshape(3, -1) + position
        position += int(size[1:].max())
        token = end
    positions[:, token:] = np.arange(position, position + len(is_image) - token)
    return positions


def pack(encoded: Sequence[Encoded], merge_size: int, image_token_id: int) -> PackedBatch:
    """Put documents one after another.

    Args:
        encoded: the documents, at least one.
        merge_size: patches along each side of one image token.
        image_token_id: the token that stands for a piece of an image.

    Raises:
        ValueError: nothing to pack, or image tokens that do not match the grids or patches.
    """
    if not encoded:
        raise ValueError("expected at least one document to pack, got none")
    positions = []
    for i, document in enumerate(encoded):
        where = document.name or f"document {i}"
        patches = int(document.grids.prod(axis=1).sum())
        if patches != len(document.patches):
            raise ValueError(
                f"{where}: grids of {patches} patches, but {len(document.patches)} are given"
            )
        try:
            rope = mrope_positions(document.input_ids, document.grids, merge_size, image_token_id)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        positions.append(np.concatenate([np.arange(len(document))[None], rope]))
    lengths = [len(document) for document in encoded]
    input_ids = np.concatenate([document.input_ids for document in encoded])
    grids = np.concatenate([document.grids for document in encoded])
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(np.concatenate(positions, axis=1)),
        cu_seqlens=torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32)),
        max_length=max(lengths),
        pixel_values=torch.from_numpy(np.concatenate([doc.patches for doc in encoded])),
        image_grid_thw=torch.from_numpy(grids),
        mm_token_type_ids=torch.from_numpy((input_ids == image_token_id).astype(np.int32)),
    )


def document_cost(tokens: int, image_tokens: int) -> int:
    """The cost in text tokens of so many tokens, of which some are `<|image_pad|>`: those count
    `IMAGE_TOKEN_COST` each."""
    return tokens + (IMAGE_TOKEN_COST - 1) * image_tokens


def batches_by_cost(
    lengths: Sequence[int], budget: int, *, seed: int | None = None
) -> list[list[int]]:
    """Group documents into batches whose costs sum to at most a budget.

    Documents are shuffled (with a seed), sorted by cost `BUCKET` at a time, so that a batch holds
    documents of similar cost, and taken greedily; then the batches are shuffled.

    Args:
        lengths: each document's cost, in tokens or as `document_cost`.
        budget: most cost of a batch.
        seed: of the shuffling; None keeps the order of the documents and of the batches.

    Returns:
        Indices, every document once.

    Raises:
        ValueError: a document above the budget.
    """
    costs = np.asarray(lengths, np.int64).reshape(-1)
    if len(costs) and costs.max() > budget:
        worst = int(costs.argmax())
        raise ValueError(
            f"document {worst} costs {costs[worst]}, above the budget of {budget}: split it first"
        )
    rng = np.random.default_rng(seed)
    order = np.arange(len(costs)) if seed is None else rng.permutation(len(costs))
    batches: list[list[int]] = []
    for begin in range(0, len(order), BUCKET):
        part = order[begin : begin + BUCKET]
        batch: list[int] = []
        room = budget
        for index in part[np.argsort(-costs[part], kind="stable")].tolist():
            if batch and costs[index] > room:
                batches.append(batch)
                batch, room = [], budget
            batch.append(index)
            room -= int(costs[index])
        if batch:
            batches.append(batch)
    return batches if seed is None else [batches[i] for i in rng.permutation(len(batches))]
