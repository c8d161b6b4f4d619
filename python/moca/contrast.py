"""Stage 2, heterogeneous contrastive fine-tuning (MoCa, arXiv 2506.23115, section 3.2).

Every batch holds pairs of one task, on all ranks; queries, positives and hard negatives go through
the model in one pack; positives of all ranks are each other's negatives, hard negatives are seen
by their own query only.

B pairs, K hard negatives of the query that has most of them, D dim.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

import moca_fast.nn
from moca.config import ConfigError, ContrastConfig, OnError
from moca.data.augment import ImageChanges, augment_images, drop_tokens, preload_images
from moca.data.batching import TaskBatches, pair_keys
from moca.data.encode import Encoded, Encoder
from moca.data.packing import PackedBatch, pack
from moca.data.records import Document, Pair
from moca.data.sources import Check, check_images, load_pairs, once
from moca.model import MocaModel
from moca.processes import load_batches
from moca.run import Run, begin

# Length of what stands in the place of a hard negative that a query lacks: at any temperature below
# 9,000, exp(-FAR / temperature) is 0 in float32.
FAR = 1e6


@dataclass
class PairBatch:
    """Queries, positives and hard negatives of one task in one pack.

    Args:
        task: of all its pairs.
        batch: B queries, then B positives, then the hard negatives of each query in turn.
        negatives: of each of the B queries, how many hard negatives it has.
        counts: what encoding cut or left out.
    """

    task: str
    batch: PackedBatch
    negatives: list[int]
    counts: Counter[str]

    def to(self, device: torch.device) -> PairBatch:
        return replace(self, batch=self.batch.to(device))


class ContrastObjective(nn.Module):
    """The embedding model and its InfoNCE loss, gathered over all ranks."""

    def __init__(self, model: MocaModel, config: ContrastConfig) -> None:
        super().__init__()
        self.model = model
        self.symmetric = config.symmetric
        self.loss = moca_fast.nn.InfoNCELoss(
            temperature=config.temperature, learnable=config.learn_temperature
        )

    @property
    @torch.no_grad()
    def temperature(self) -> float:
        """What scores are divided by, as it is now."""
        return float(self.loss.temperature)

    def forward(self, batch: PairBatch) -> Tensor:
        embeddings = self.model.embed(batch.batch)
        pairs = len(batch.negatives)
        query, document, negatives = embeddings.split([pairs, pairs, sum(batch.negatives)])
        hard = hard_negatives(query, negatives, batch.negatives)
        loss = self.loss(query, document, hard_negatives=hard)
        if self.symmetric:
            loss = 0.5 * (loss + self.loss(document, query))
        return loss


def hard_negatives(query: Tensor, negatives: Tensor, counts: list[int]) -> Tensor | None:
    """Hard negatives by query, as many places as the query with most of them has.

    A query with fewer keeps what it has. Its other places hold a vector opposite to it and so long
    that exp(score) is 0 in float32: they add nothing to the loss and have no gradient, where a
    negative given twice would count twice.

    Args:
        query: (B, D) float32, unit vectors.
        negatives: (sum of counts, D) float32, those of each query in turn.
        counts: of each query.

    Returns:
        (B, K, D) float32, K = max(counts); None where no query has any.
    """
    places = max(counts)
    if not places:
        return None
    held = torch.arange(places) < torch.tensor(counts)[:, None]
    absent = -FAR * query.detach()[:, None].expand(-1, places, -1)
    return absent.masked_scatter(held[..., None].to(query.device), negatives)


class PairBatches(Dataset):
    """Batches by step. What is random about a pair is a function of (seed, step, pair), so that a
    batch is the same on one process as spread over many."""

    def __init__(
        self,
        tasks: dict[str, list[Pair]],
        schedule: Sequence[tuple[str, Sequence[int]]],
        encoder: Encoder,
        config: ContrastConfig,
    ) -> None:
        self.tasks, self.schedule, self.encoder, self.config = tasks, schedule, encoder, config
        self.special_ids = np.asarray(sorted(encoder.tokenizer.all_special_ids))
        self.changes = ImageChanges(config.flip, config.rotate, config.shift, config.zoom)

    def __getitem__(self, step: int) -> PairBatch:
        task, indices = self.schedule[step]
        pairs = [self.tasks[task][index] for index in indices]
        counts = [min(len(pair.negatives), self.config.hard_negatives) for pair in pairs]
        before = self.encoder.counts.copy()
        queries, positives, hard = [], [], []
        for index, pair, count in zip(indices, pairs, counts, strict=True):
            rng = np.random.default_rng([self.config.seed, step, index])
            chosen = rng.permutation(len(pair.negatives))[:count]
            queries.append(self._encode(pair.query, task, rng))
            positives.append(self._encode(pair.positive, task, rng))
            hard += [self._encode(pair.negatives[number], task, rng) for number in chosen]
        encoded = queries + positives + hard
        return PairBatch(
            task,
            pack(encoded, self.encoder.merge_size, self.encoder.image_token_id),
            counts,
            self.encoder.counts - before,
        )

    def _encode(self, document: Document, task: str, rng: np.random.Generator) -> Encoded:
        encoded = self.encoder(augment_images(document, rng, self.changes))
        dropout = self.config.task_token_dropout.get(task, self.config.token_dropout)
        return drop_tokens(encoded, rng, dropout, self.special_ids)


def contrast(config: ContrastConfig) -> None:
    """Run stage 2 and leave the model in `output/model`.

    Raises:
        ConfigError: the output folder exists, nothing to resume, or a task too small for a batch.
        Interrupted: stopped by a signal; a checkpoint was written.
    """
    checkpoint, accelerator, model = begin(config)
    objective = ContrastObjective(model, config).to(accelerator.device)
    encoder = Encoder(model.tokenizer, model.image_settings, config.max_length)

    @once
    def checked(document: Document) -> Document:
        if config.cache_images:
            document = preload_images(document, model.image_settings)
        encoder.check(document)
        return document

    tasks = load_tasks(
        config.pairs, config.on_error, checked, config.image_root, accelerator.process_index
    )
    schedule = make_schedule(tasks, config, accelerator.process_index, accelerator.num_processes)
    tasks = {name: [_made_of(pair, checked) for pair in pairs] for name, pairs in tasks.items()}
    batches = PairBatches(tasks, schedule, encoder, config)
    run = Run(
        config, accelerator, objective, checkpoint,
        lambda step: zlib.crc32(repr(schedule[max(0, step - 100) : step]).encode()),
    )  # fmt: skip
    loader = load_batches(batches, range(run.step, config.steps), config.workers)
    for _ in run.steps("stage 2"):
        batch = next(loader).to(accelerator.device)
        run.counts += batch.counts
        with accelerator.autocast():
            loss = run.trained(batch)
        accelerator.backward(loss)
        sums = torch.stack([loss.detach(), loss.new_tensor(float(len(batch.batch.input_ids)))])
        total, tokens = accelerator.reduce(sums, "sum").tolist()
        value = total / accelerator.num_processes
        losses = {"loss": value, f"loss_{batch.task}": value}
        run.update({**losses, "temperature": objective.temperature}, tokens)
    counts = run.all_counts()
    if accelerator.is_main_process:
        for reason, count in sorted(counts.items()):
            tqdm.write(f"stage 2: {count} {reason}")
        model.settings = replace(model.settings, temperature=objective.temperature)
        model.save_pretrained(Path(config.output) / "model")
    accelerator.wait_for_everyone()


def load_tasks(
    sources: dict[str, str],
    on_error: OnError,
    check: Check = check_images,
    image_root: str = "",
    rank: int = 0,
) -> dict[str, list[Pair]]:
    """Pairs by task, every one checked, so that none stops a run that has begun.

    Args:
        sources: by task.
        on_error, check: as for `Records`; to raise, `check` is called here.
        image_root: folder that images' paths start from; "" for that of their file.
        rank: the first shows how far it is.

    Raises:
        ConfigError: an empty source.
        ValueError: a bad record, unless it is to be skipped; names it.
    """
    root = image_root or None
    tasks = {}
    for name, source in sources.items():
        tasks[name] = list(
            load_pairs(source, image_root=root, task=name, on_error=on_error, check=check)
        )
        if not tasks[name]:
            raise ConfigError(f"pairs.{name}: {source} holds no pairs")
        if on_error == "raise":  # to skip, loading has checked already
            for pair in tqdm(tasks[name], f"checking {name}", unit="pair", disable=rank > 0):
                for document in (pair.query, pair.positive, *pair.negatives):
                    check(document)
    return tasks


def make_schedule(
    tasks: dict[str, list[Pair]], config: ContrastConfig, rank: int, ranks: int
) -> list[tuple[str, Sequence[int]]]:
    """Task and indices of its pairs for every step on this rank; all ranks agree on the task."""
    for task, pairs in tasks.items():
        together = config.task_batch_sizes.get(task, config.batch_size) * ranks
        if together == 1 and not (config.hard_negatives and all(p.negatives for p in pairs)):
            raise ConfigError(
                f"batch_size: expected 2 or more for task {task!r}, whose pairs have no hard "
                "negatives, got 1: there would be nothing to tell the positive from"
            )
    items = [(task, index) for task, pairs in tasks.items() for index in range(len(pairs))]
    try:
        batches = TaskBatches(
            [task for task, _ in items],
            {task: config.task_batch_sizes.get(task, config.batch_size) for task in tasks},
            weights=config.task_weights or None,
            unique_keys=[pair_keys(tasks[task][index]) for task, index in items],
            seed=config.seed,
            rank=rank,
            world_size=ranks,
        )
    except ValueError as error:
        raise ConfigError(f"batch_size: {error}") from error
    schedule: list[tuple[str, Sequence[int]]] = []
    while len(schedule) < config.steps:
        for task, chosen in batches:
            schedule.append((task, [items[number][1] for number in chosen]))
    return schedule[: config.steps]


def _made_of(pair: Pair, of: Callable[[Document], Document]) -> Pair:
    negatives = tuple(map(of, pair.negatives))
    return replace(pair, query=of(pair.query), positive=of(pair.positive), negatives=negatives)
