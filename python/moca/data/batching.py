"""Task-aware batches: each batch is of one task, so that its in-batch negatives are too.

All ranks draw the same task at the same step and get disjoint parts of one global batch
(arXiv 2506.23115). What an epoch holds depends on nothing but the seed and its number.
"""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from moca.data.records import Pair


def pair_keys(pair: Pair) -> tuple[tuple[str, bytes], tuple[str, bytes]]:
    """The keys of a pair for `TaskBatches`: its query, and its positive."""
    return ("query", pair.query.key()), ("positive", pair.positive.key())


class TaskBatches:
    """Batches of indices, each from one task.

    Iterating yields ``(task, indices)`` for the rest of the current epoch, then moves on to the
    next; iterate again for that one. Every rank yields the same tasks and the same number of
    batches. Within an epoch an item comes at most once, unless weights ask a task for more batches
    than it has; what does not fill a batch of all ranks is left for another epoch.

    Args:
        tasks: the task of each item.
        batch_size: items of a batch on one rank; a mapping gives each task its own.
        weights: how much of an epoch each task gets, relative to the others; default by size, so
            that an epoch is one pass. An epoch has as many batches either way.
        unique_keys: the keys of each item (see `pair_keys`); items that share one, such as the same
            query or the same positive, are kept out of one batch of all ranks.
        seed: of tasks and items.
        rank: this process.
        world_size: number of processes.

    Raises:
        ValueError: sizes that do not match, weights or batch_size of other tasks than the data's,
            or a task that cannot fill one batch of all ranks; names the task.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        batch_size: int | Mapping[str, int],
        *,
        weights: Mapping[str, float] | None = None,
        unique_keys: Sequence[Sequence[Hashable]] | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
        if not len(tasks):
            raise ValueError("expected at least one item, got none")
        if unique_keys is not None and len(unique_keys) != len(tasks):
            raise ValueError(f"{len(tasks)} items but keys of {len(unique_keys)}")
        self.members: dict[str, list[int]] = defaultdict(list)
        for index, task in enumerate(tasks):
            self.members[task].append(index)
        self.members = dict(sorted(self.members.items()))
        self.sizes = _per_task(batch_size, self.members, "batch_size")
        self.weights = None if weights is None else _per_task(weights, self.members, "weights")
        self.keys = unique_keys
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.epoch = self.step = 0
        self._cached: tuple[int, list[tuple[str, list[int]]]] = (-1, [])
        for task in self.members:
            self._check(task)

    def __len__(self) -> int:
        """Batches of the current epoch, those already taken included."""
        return len(self._plan(self.epoch))

    def __iter__(self) -> Iterator[tuple[str, list[int]]]:
        plan = self._plan(self.epoch)
        while self.step < len(plan):
            task, indices = plan[self.step]
            # Counted before it is handed out: a state saved while it is used resumes after it.
            self.step += 1
            yield task, indices[self.rank :: self.world_size]
        self.epoch, self.step = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """Where the iteration stands: plain numbers."""
        return {"epoch": self.epoch, "step": self.step, "identity": self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the last batch handed out before `state_dict`; any rank's state will do.

        Raises:
            ValueError: the state is of other items, batch sizes, weights, seed or number of ranks.
        """
        if state["identity"] != self._identity():
            raise ValueError(
                "the saved position belongs to other data, batch sizes, weights, seed or number of "
                "processes; it cannot be continued here"
            )
        self.epoch, self.step = int(state["epoch"]), int(state["step"])

    def _identity(self) -> int:
        counts = {task: len(items) for task, items in self.members.items()}
        described = (counts, self.sizes, self.weights, self.seed, self.world_size)
        return zlib.crc32(repr(described).encode())

    def _check(self, task: str) -> None:
        size = self.sizes[task] * self.world_size
        have = len(self.members[task])
        if have < size:
            raise ValueError(
                f"task {task!r} has {have} items, fewer than a batch of {self.sizes[task]} on each "
                f"of {self.world_size} process(es)"
            )
        if not self._pass(task, np.random.default_rng(self.seed)):
            raise ValueError(
                f"task {task!r} has too many items with the same query or positive to fill a batch "
                f"of {size} without repeating one"
            )

    def _plan(self, epoch: int) -> list[tuple[str, list[int]]]:
        """All batches of an epoch, each over all ranks, in order."""
        if self._cached[0] != epoch:
            self._cached = (epoch, self._make_plan(epoch))
        return self._cached[1]

    def _make_plan(self, epoch: int) -> list[tuple[str, list[int]]]:
        streams = {
            task: np.random.default_rng((self.seed, epoch, number))
            for number, task in enumerate(self.members)
        }
        passes = {task: self._pass(task, rng) for task, rng in streams.items()}
        if self.weights is not None:
            total = sum(len(batches) for batches in passes.values())
            for task, wanted in _shares(self.weights, total).items():
                while len(passes[task]) < wanted and (more := self._pass(task, streams[task])):
                    passes[task] += more
                passes[task] = passes[task][:wanted]
        plan = [(task, batch) for task, batches in passes.items() for batch in batches]
        order = np.random.default_rng((self.seed, epoch, len(streams))).permutation(len(plan))
        return [plan[i] for i in order]

    def _pass(self, task: str, rng: np.random.Generator) -> list[list[int]]:
        """One shuffled pass over a task, in full batches over all ranks."""
        size = self.sizes[task] * self.world_size
        order = rng.permutation(self.members[task]).tolist()
        if self.keys is None:
            return [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
        batches = []
        while len(order) >= size:
            batch, rest = _take(order, size, self.keys)
            if len(batch) < size:
                break
            batches.append(batch)
            order = rest
        return batches


def _take(
    order: list[int], size: int, keys: Sequence[Sequence[Hashable]]
) -> tuple[list[int], list[int]]:
    """The first items that share no key, and those that remain, in their order."""
    taken: set[Hashable] = set()
    batch: list[int] = []
    passed: list[int] = []
    for place, index in enumerate(order):
        if len(batch) == size:
            return batch, passed + order[place:]
        if taken.isdisjoint(keys[index]):
            batch.append(index)
            taken.update(keys[index])
        else:
            passed.append(index)
    return batch, passed


def _per_task(value: Any, members: Mapping[str, list[int]], name: str) -> dict[str, Any]:
    """A setting for every task: one for all, or a mapping that names each of them."""
    values = dict(value) if isinstance(value, Mapping) else dict.fromkeys(members, value)
    if set(values) != set(members):
        raise ValueError(f"{name} names {sorted(values)}, the data has the tasks {list(members)}")
    for task, number in values.items():
        if not number > 0:
            raise ValueError(f"{name} of task {task!r} must be positive, got {number}")
    return {task: values[task] for task in members}


def _shares(weights: Mapping[str, float], total: int) -> Counter[str]:
    """Divide a number of batches in proportion to weights; the largest remainders round up."""
    scale = total / sum(weights.values())
    exact = {task: weight * scale for task, weight in weights.items()}
    shares = Counter({task: int(value) for task, value in exact.items()})
    by_remainder = sorted(exact, key=lambda task: shares[task] - exact[task])
    shares.update(by_remainder[: total - sum(shares.values())])
    return shares
