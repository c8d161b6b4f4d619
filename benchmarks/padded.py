"""The system as other code runs it: documents as rows padded to the longest, torch's attention and
losses. The peer of the end-to-end benchmarks and, one document at a time, their oracle.

B documents, L tokens of the longest, D dim, N patches, P values a patch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
from moca.data.packing import PackedBatch
from moca.model import MocaModel, split_documents
from moca.pretrain import IGNORE, MaskedBatch, PretrainObjective, patch_rows
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence


@dataclass
class Rows:
    """Padded documents.

    Args:
        inputs: what the transformers model takes.
        real: (B, L) bool, false at padding.
    """

    inputs: dict[str, Tensor]
    real: Tensor

    def to(self, device: torch.device) -> Rows:
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return Rows(inputs, self.real.to(device))


@dataclass
class MaskedRows:
    """Padded documents with tokens and patches hidden.

    Args:
        labels: (B, L) int64, -100 where nothing is asked.
        targets: (M, P) clean pixels of the masked patches.
        positions: (M / merge_size^2,) int64, their tokens in the flattened (B * L).
    """

    rows: Rows
    labels: Tensor
    targets: Tensor
    positions: Tensor

    def to(self, device: torch.device) -> MaskedRows:
        tensors = (self.labels, self.targets, self.positions)
        return MaskedRows(self.rows.to(device), *(tensor.to(device) for tensor in tensors))


def pad(parts: Sequence[PackedBatch]) -> Rows:
    """Documents (batches of one) side by side."""
    real = pad_sequence([torch.ones(len(part.input_ids), dtype=torch.bool) for part in parts], True)
    inputs = {
        "input_ids": pad_sequence([part.input_ids for part in parts], True),
        "attention_mask": real.long(),
        "position_ids": pad_sequence([part.position_ids[1:].T for part in parts], True).permute(
            2, 0, 1
        ),
        "mm_token_type_ids": pad_sequence([part.mm_token_type_ids for part in parts], True),
    }
    grids = torch.cat([part.image_grid_thw for part in parts])
    if len(grids):
        inputs["image_grid_thw"] = grids
        inputs["pixel_values"] = torch.cat([part.pixel_values for part in parts])
    return Rows(inputs, real)


def by_length(lengths: Sequence[int], chunks: int) -> list[list[int]]:
    """Documents sorted by length, in chunks of about as many; one chunk keeps their order."""
    if chunks == 1:
        return [list(range(len(lengths)))]
    order = sorted(range(len(lengths)), key=lambda document: lengths[document])
    size = -(-len(order) // chunks)
    return [order[begin : begin + size] for begin in range(0, len(order), size)]


def pad_masked(masked: MaskedBatch, model: MocaModel, chunks: int) -> list[MaskedRows]:
    """A masked packed batch as padded ones; as many chunks as documents pads nothing."""
    settings = model.image_settings
    per_unit = settings.merge_size**2
    parts = split_documents(masked.batch, settings)
    labels = masked.labels.split([len(part.input_ids) for part in parts])
    patches = masked.patches.split([len(part.pixel_values) for part in parts])
    hidden_units = torch.zeros(len(masked.patches) // per_unit, dtype=torch.bool)
    hidden_units[masked.units] = True
    hidden = hidden_units.split([len(part.pixel_values) // per_unit for part in parts])
    result = []
    for chunk in by_length([len(part.input_ids) for part in parts], chunks):
        rows = pad([parts[document] for document in chunk])
        units = torch.cat([hidden[document] for document in chunk]).nonzero().squeeze(1)
        clean = torch.cat([patches[document] for document in chunk])
        images = rows.inputs["mm_token_type_ids"].flatten().nonzero().squeeze(1)
        result.append(
            MaskedRows(
                rows,
                pad_sequence([labels[document] for document in chunk], True, IGNORE),
                clean[patch_rows(units, per_unit)],
                images[units],
            ).to(model.device)
        )
    return result


def hidden_states(model: MocaModel, rows: Rows) -> Tensor:
    """(B, L, D)."""
    return model.vlm.model(**rows.inputs, use_cache=False).last_hidden_state


def embed(model: MocaModel, rows: Rows) -> Tensor:
    """(B, D): the mean over real tokens, brought to unit length."""
    hidden = hidden_states(model, rows)
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    weights = rows.real[..., None].to(hidden.dtype)
    return F.normalize((hidden * weights).sum(dim=1) / weights.sum(dim=1), dim=1)


def embedding(model: MocaModel, parts: Sequence[PackedBatch], chunks: int) -> Callable[[], Tensor]:
    """A function that embeds documents (batches of one): (B, D), in their order."""
    order = by_length([len(part.input_ids) for part in parts], chunks)
    batches = [pad([parts[document] for document in some]).to(model.device) for some in order]
    back = torch.tensor([*chain.from_iterable(order)]).argsort().to(model.device)
    return lambda: torch.cat([embed(model, rows) for rows in batches])[back]


def run_layer(model: MocaModel, layer: nn.Module, hidden: Tensor, rows: Rows) -> Tensor:
    """One more decoder layer: (B, L, D) to (B, L, D)."""
    return layer(
        hidden,
        attention_mask=None if rows.real.all() else rows.real[:, None, None],
        position_embeddings=model.language_model.rotary_emb(hidden, rows.inputs["position_ids"]),
        is_causal=False,
    )


def pretrain_loss(
    objective: PretrainObjective, chunk: MaskedRows, tokens: int, patches: int
) -> tuple[Tensor, Tensor]:
    """A chunk's share of both losses: MLM over `tokens` masked ones, MAE over `patches`."""
    model = objective.model
    hidden = hidden_states(model, chunk.rows)
    keep = chunk.labels != IGNORE
    logits = F.linear(hidden[keep], model.lm_head_weight)
    mlm = F.cross_entropy(logits, chunk.labels[keep], reduction="sum") / max(tokens, 1)
    if not len(chunk.targets):
        return mlm, mlm.new_zeros(())
    decoded = run_layer(model, objective.decoder, hidden, chunk.rows).flatten(0, 1)
    pred = objective.patch_head(decoded[chunk.positions]).view(chunk.targets.shape)
    error = (pred - chunk.targets).square().mean(dim=1).sum()
    return mlm, error / patches
