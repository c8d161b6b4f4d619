"""Stage 1, modality-aware continual pre-training (MoCa, arXiv 2506.23115, section 3.1).

Masked language modelling on text and masked-patch reconstruction on images, jointly, over packed
interleaved documents: loss = L_MLM + w * L_MAE.

T packed tokens, D dim, N patches, P values a patch, M masked patches, V vocabulary.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

import moca_fast
from moca.checkpoint import write_file
from moca.config import ConfigError, CptConfig, load_config
from moca.data.augment import ImageChanges, augment_images, preload_images
from moca.data.encode import Encoder, Piece
from moca.data.packing import PackedBatch, batches_by_cost, document_cost, pack
from moca.data.records import Document
from moca.data.sources import load_documents, once
from moca.model import MocaModel
from moca.processes import load_batches
from moca.run import CONFIG, Run, begin, seeded

IGNORE = -100
DECODER = "mae_decoder.safetensors"


@dataclass
class MaskedBatch:
    """A packed batch with tokens and patches hidden.

    Args:
        batch: input_ids with mask tokens, pixel_values with noise.
        labels: (T,) int64, the token where it was masked, else -100.
        patches: (N, P) float32, the clean pixels.
        units: (U,) int64, masked image tokens, counted over the image tokens of the batch.
    """

    batch: PackedBatch
    labels: Tensor
    patches: Tensor
    units: Tensor

    def counts(self) -> tuple[int, int, int]:
        """Masked text tokens, masked image tokens, and tokens."""
        return int((self.labels != IGNORE).sum()), len(self.units), len(self.labels)

    def to(self, device: torch.device) -> MaskedBatch:
        return MaskedBatch(
            self.batch.to(device),
            self.labels.to(device),
            self.patches.to(device),
            self.units.to(device),
        )


def mask_batch(
    batch: PackedBatch,
    *,
    special_ids: Tensor,
    mask_token_id: int,
    merge_size: int,
    mlm_probability: float,
    mae_probability: float,
    generator: torch.Generator,
) -> MaskedBatch:
    """Hide text tokens behind the mask token and image tokens behind noise.

    A text token that is not special is masked with `mlm_probability`; its label stands at its own
    position. An image token (merge_size^2 patches) is masked with `mae_probability`: each of its
    patches is replaced by its own draw of standard normal noise, in normalised pixel values.
    """
    ids = batch.input_ids
    chosen = torch.rand(ids.shape, generator=generator) < mlm_probability
    chosen &= ~torch.isin(ids, special_ids)
    labels = torch.where(chosen, ids, IGNORE)
    per_unit = merge_size**2
    unit_count = len(batch.pixel_values) // per_unit
    units = (torch.rand(unit_count, generator=generator) < mae_probability).nonzero().squeeze(1)
    rows = patch_rows(units, per_unit)
    pixels = batch.pixel_values.clone()
    pixels[rows] = torch.randn(len(rows), pixels.shape[1], generator=generator)
    hidden = copy.copy(batch)
    hidden.input_ids = torch.where(chosen, mask_token_id, ids)
    hidden.pixel_values = pixels
    return MaskedBatch(hidden, labels, batch.pixel_values, units)


def patch_rows(units: Tensor, per_unit: int) -> Tensor:
    """(U * per_unit,) rows of patches behind image tokens: those of one token are consecutive."""
    return (units[:, None] * per_unit + torch.arange(per_unit, device=units.device)).flatten()


class PretrainObjective(nn.Module):
    """The model with its MAE decoder: a copy of the language model's middle layer and a linear
    head from each image token to its patches.

    Called with a `MaskedBatch`; returns the two losses, of MLM and MAE, as means over what is
    masked in it: () float32 each, 0 where nothing is.
    """

    def __init__(self, model: MocaModel, normalize_patches: bool = False) -> None:
        super().__init__()
        self.model = model
        self.normalize_patches = normalize_patches
        layers = model.language_model.layers
        self.decoder = copy.deepcopy(layers[len(layers) // 2])
        settings = model.image_settings
        self.per_unit = settings.merge_size**2
        width = model.hidden_size
        self.patch_head = nn.Linear(width, self.per_unit * settings.patch_dim)
        nn.init.normal_(self.patch_head.weight, std=width**-0.5)
        nn.init.zeros_(self.patch_head.bias)

    def forward(self, masked: MaskedBatch) -> tuple[Tensor, Tensor]:
        hidden = self.model.hidden_states(masked.batch)
        head = self.model.lm_head_weight
        mlm = moca_fast.linear_cross_entropy(hidden, head, masked.labels)
        rows = patch_rows(masked.units, self.per_unit)
        if len(rows):
            pred = self.reconstruct(hidden, masked)
            mae = moca_fast.masked_patch_mse(
                pred, masked.patches, rows, normalize=self.normalize_patches
            )
        else:
            mae = hidden.new_zeros((), dtype=torch.float32)
        return mlm, mae

    def reconstruct(self, hidden: Tensor, masked: MaskedBatch) -> Tensor:
        """(M, P) predicted pixels of the masked patches, from (T, D) hidden states."""
        decoded = self.model.run_layer(self.decoder, hidden, masked.batch)
        positions = masked.batch.mm_token_type_ids.nonzero().squeeze(1)[masked.units]
        return self.patch_head(decoded[positions]).view(-1, masked.patches.shape[1])

    def decoder_state(self) -> dict[str, Tensor]:
        """The parameters that are no part of the saved model."""
        state = self.state_dict()
        return {name: value for name, value in state.items() if not name.startswith("model.")}


class CptBatches(Dataset):
    """Masked micro-batches by number: everything random is a function of (seed, number, rank)."""

    def __init__(
        self,
        pieces: Sequence[Piece],
        encoder: Encoder,
        model: MocaModel,
        config: CptConfig,
        rank: int,
        ranks: int,
    ) -> None:
        self.encoder, self.config, self.rank, self.ranks = encoder, config, rank, ranks
        self.special_ids = torch.tensor(sorted(model.tokenizer.all_special_ids))
        self.mask_token_id = model.mask_token_id
        self.merge_size = model.image_settings.merge_size
        self.changes = ImageChanges(config.flip, config.rotate, config.shift, config.zoom)
        self.pieces = pieces
        self.costs = [document_cost(len(piece), piece.image_tokens) for piece in self.pieces]
        most, worst = max(zip(self.costs, self.pieces, strict=True), key=lambda pair: pair[0])
        if most > config.batch_cost:
            raise ConfigError(
                f"batch_cost: expected at least {most}, the cost of {worst.name}, "
                f"got {config.batch_cost}"
            )
        self._epochs: list[list[list[int]]] = []

    def _indices(self, number: int) -> list[int]:
        """The pieces of the `number`-th batch of the run, over all epochs and ranks."""
        epoch = 0
        while True:
            if epoch == len(self._epochs):
                seed = self.config.seed * 100_003 + epoch
                budget = self.config.batch_cost
                self._epochs.append(batches_by_cost(self.costs, budget, seed=seed))
            if number < len(self._epochs[epoch]):
                return self._epochs[epoch][number]
            number -= len(self._epochs[epoch])
            epoch += 1

    def identity(self, steps: int) -> int:
        """A hash of which pieces the last hundred batches before that step hold; it knows the
        costs of pieces and their order, not what they say."""
        end = steps * self.config.accumulation * self.ranks
        latest = [self._indices(number) for number in range(max(0, end - 100), end)]
        return zlib.crc32(repr((self.ranks, self.config.accumulation, latest)).encode())

    def __getitem__(self, number: int) -> MaskedBatch:
        number = number * self.ranks + self.rank
        config = self.config
        rng = np.random.default_rng([config.seed, number])
        pieces = (self.pieces[index] for index in self._indices(number))
        encoded = [
            self.encoder.encode(augment_images(piece, rng, self.changes)) for piece in pieces
        ]
        return mask_batch(
            pack(encoded, self.merge_size, self.encoder.image_token_id),
            special_ids=self.special_ids,
            mask_token_id=self.mask_token_id,
            merge_size=self.merge_size,
            mlm_probability=config.mlm_probability,
            mae_probability=config.mae_probability,
            generator=seeded(config.seed, number),
        )


def pretrain(config: CptConfig) -> None:
    """Run stage 1 and leave the model in `output/model`, its MAE decoder beside it.

    Raises:
        ConfigError: the output folder exists, or there is nothing to resume.
        Interrupted: stopped by a signal; a checkpoint was written.
    """
    checkpoint, accelerator, model = begin(config)
    objective = PretrainObjective(model, config.normalize_patches).to(accelerator.device)
    encoder = Encoder(model.tokenizer, model.image_settings)
    pieces = load_pieces(config, encoder, accelerator.process_index)
    batches = CptBatches(
        pieces, encoder, model, config, accelerator.process_index, accelerator.num_processes
    )
    run = Run(config, accelerator, objective, checkpoint, batches.identity)
    numbers = range(run.step * config.accumulation, config.steps * config.accumulation)
    loader = load_batches(batches, numbers, config.workers)
    for _ in run.steps("stage 1"):
        micro_batches = [next(loader) for _ in range(config.accumulation)]
        counts = torch.tensor([masked.counts() for masked in micro_batches])  # (micro-batches, 3)
        totals = accelerator.reduce(counts.sum(dim=0).to(accelerator.device), "sum").cpu()
        # What makes a micro-batch's means its part of the means of the step, over all ranks; times
        # their number, by which their gradients will be divided.
        shares = (counts[:, :2] * accelerator.num_processes / totals[:2].clamp(min=1)).tolist()
        losses = torch.zeros(2, device=accelerator.device)
        for (mlm_share, mae_share), masked in zip(shares, micro_batches, strict=True):
            last = masked is micro_batches[-1]
            with nullcontext() if last else accelerator.no_sync(run.trained):
                with accelerator.autocast():
                    mlm, mae = run.trained(masked.to(accelerator.device))
                mlm, mae = mlm * mlm_share, mae * mae_share
                accelerator.backward(mlm + config.mae_weight * mae)
            losses += torch.stack([mlm.detach(), mae.detach()])
        mlm_loss, mae_loss = accelerator.reduce(losses, "mean").tolist()
        logged = {"loss": mlm_loss + config.mae_weight * mae_loss}
        masked_text, masked_image, tokens = totals.tolist()
        if masked_text:
            logged["loss_mlm"] = mlm_loss
        if masked_image:
            logged["loss_mae"] = mae_loss
        run.update(logged, tokens)
    if accelerator.is_main_process:
        decoder = {k: v.cpu().contiguous() for k, v in objective.decoder_state().items()}
        write_file(Path(config.output) / DECODER, lambda path: save_file(decoder, path))
        model.save_pretrained(Path(config.output) / "model")  # last: its folder says "done"
    accelerator.wait_for_everyone()


def load_objective(output: str | Path) -> PretrainObjective:
    """The model and MAE decoder that `pretrain` left in its run folder, for the same targets.

    Raises:
        OSError, ValueError: a folder that is not of a finished run of stage 1.
    """
    model = MocaModel.from_pretrained(Path(output) / "model")
    config = load_config(CptConfig, Path(output) / CONFIG)
    objective = PretrainObjective(model, config.normalize_patches)
    decoder = load_file(Path(output) / DECODER)
    missing = set(objective.decoder_state()) ^ set(decoder)
    if missing:
        raise ValueError(f"{Path(output) / DECODER}: expected other tensors: {sorted(missing)[:5]}")
    objective.load_state_dict(decoder, strict=False)
    return objective.eval()


def load_pieces(config: CptConfig, encoder: Encoder, rank: int = 0) -> list[Piece]:
    """All documents of a run, text as tokens, in pieces of `max_length` at most each.

    Args:
        config: says which, and what a bad one does.
        encoder: cuts them.
        rank: the first shows how far it is.

    Raises:
        ConfigError: there are none.
        ValueError: a bad record, unless it is to be skipped; names it.
    """

    @once
    def split(document: Document) -> list[Piece]:
        if config.cache_images:
            document = preload_images(document, encoder.settings)
        return encoder.split(document, config.max_length)

    documents: list[Document] = []
    for source in config.documents:
        root = config.image_root or None
        documents += load_documents(source, image_root=root, on_error=config.on_error, check=split)
    shown = tqdm(documents, "measuring documents", unit="doc", disable=rank > 0)
    pieces = [piece for document in shown for piece in split(document)]
    if not pieces:
        raise ConfigError("documents: the sources hold no documents")
    return pieces
