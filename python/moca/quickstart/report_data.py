"""What the quickstart's report shows, as plain data. Metrics are 0 to 1, times in seconds."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import PIL.Image

from moca.data.records import IMAGE_MARKER, Document

# A uint8 array is (H, W, 3) or (H, W); bytes are an encoded image, a string is a path.
Picture = np.ndarray | bytes | str | os.PathLike | PIL.Image.Image


@dataclass(frozen=True)
class Machine:
    """What the run was made on.

    Args:
        cpu: model name.
        cores: how many the run used.
        instruction_set: the one the compiled operations chose, such as "AVX-512 bf16".
        memory_gib: of the machine.
    """

    cpu: str
    cores: int
    instruction_set: str
    memory_gib: float


@dataclass(frozen=True)
class Item:
    """A query or a document as the report shows it.

    Args:
        text: its text, without image markers; may be empty when there are pictures.
        pictures: its images, in order.
        name: where it came from.
    """

    text: str = ""
    pictures: tuple[Picture, ...] = ()
    name: str = ""

    @classmethod
    def of(cls, document: Document) -> Item:
        """What is seen of a document."""
        text = " ".join(document.text.replace(IMAGE_MARKER, " ").split())
        return cls(text, document.images, document.name)


@dataclass(frozen=True)
class TaskScores:
    """The metrics of one task.

    Args:
        name: of the task.
        direction: what is looked for, in words.
        queries, candidates: how many.
        systems: metrics (names as in `moca.evaluate.metrics`) by system, the model first; None for
            a baseline that cannot be had for the task.
        target: the recall@10 the model should reach; None when there is none.
    """

    name: str
    direction: str
    queries: int
    candidates: int
    systems: Mapping[str, Mapping[str, float] | None]
    target: float | None = None


@dataclass(frozen=True)
class Reconstruction:
    """One image of stage 1, three times as (H, W, 3) uint8 pixels.

    Args:
        masked: what the model saw.
        reconstructed: the original with the masked patches as predicted.
        original: the image.
        caption: what it shows.
    """

    masked: np.ndarray
    reconstructed: np.ndarray
    original: np.ndarray
    caption: str = ""


@dataclass(frozen=True)
class Similarity:
    """Cosines of held-out queries with documents.

    Args:
        name: of the task.
        queries: Q items, the rows; at most 24 are shown.
        documents: Q items, the columns; the i-th is the right one of the i-th query.
        scores: (Q, Q) cosines.
    """

    name: str
    queries: Sequence[Item]
    documents: Sequence[Item]
    scores: np.ndarray


@dataclass(frozen=True)
class Hit:
    """A document found, its cosine with the query, and whether it is the right one."""

    item: Item
    score: float
    right: bool = False


@dataclass(frozen=True)
class Search:
    """A held-out query with what the model finds.

    Args:
        task: name of the task.
        query: what was looked for.
        hits: the best, in order.
        rank: place of the right document, from 1; None when unknown.
        candidates: how many documents there are.
        answer: the right document, shown when it is none of the hits.
    """

    task: str
    query: Item
    hits: Sequence[Hit]
    rank: int | None = None
    candidates: int | None = None
    answer: Item | None = None


@dataclass(frozen=True)
class ComparisonRow:
    """One way to train.

    Args:
        name: of the way, such as "stage 1 + stage 2".
        recall: recall@10 by task.
        seconds: of both stages together.
        steps: contrastive steps.
        group: rows of one group stand under one heading, such as "10 % of the pairs".
    """

    name: str
    recall: Mapping[str, float]
    seconds: float | None
    steps: int | None
    group: str = ""


@dataclass(frozen=True)
class Comparison:
    """What stage 1 is worth: ways to train beside each other, and what was held equal."""

    tasks: Sequence[str]
    rows: Sequence[ComparisonRow]
    caption: str = ""


@dataclass(frozen=True)
class TaskData:
    """How many pairs a task has, and what was left out by reason; a row of `Corpora.summary`."""

    name: str
    direction: str
    train: int
    test: int
    dropped: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Command:
    """A command to go on with, and what it is for."""

    purpose: str
    command: str


@dataclass
class Report:
    """Everything the report shows. What is empty is reported as missing.

    Args:
        summary: what was run, in one sentence.
        date: as it is to be printed.
        machine: what it ran on.
        seconds: of the whole run.
        versions: of the packages used, by name.
        facts: more about the run (parameters, vocabulary, seed), by name.
        tasks: metrics of each task.
        metrics_note: what the baselines are.
        stage1, stage2: lines of the runs' log.jsonl: "step", "seconds", "loss", "loss_<name>",
            "lr", "tokens_per_second".
        reconstructions: images of stage 1.
        similarities: heat-maps.
        searches: held-out queries with their hits.
        times: seconds by what they were spent on, in order.
        comparison: what stage 1 is worth, when that was run.
        comparison_command: what runs it.
        data: the pairs of each task.
        documents: how many documents of stage 1, by source.
        notes: what else is to be known about the data.
        commands: how to go on.
    """

    summary: str
    date: str
    machine: Machine
    seconds: float
    versions: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    tasks: Sequence[TaskScores] = ()
    metrics_note: str = ""
    stage1: Sequence[Mapping[str, float]] = ()
    stage2: Sequence[Mapping[str, float]] = ()
    reconstructions: Sequence[Reconstruction] = ()
    similarities: Sequence[Similarity] = ()
    searches: Sequence[Search] = ()
    times: Mapping[str, float] = field(default_factory=dict)
    comparison: Comparison | None = None
    comparison_command: str = "moca quickstart compare=true output=runs/compare"
    data: Sequence[TaskData] = ()
    documents: Mapping[str, int] = field(default_factory=dict)
    notes: Sequence[str] = ()
    commands: Sequence[Command] = ()
