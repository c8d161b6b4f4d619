"""Task-aware batches: each batch is of one task, so that its in-batch negatives are too.

All ranks draw the same task at the same step and get disjoint parts of one global batch
(arXiv 2506.23115). What an epoch holds depends on nothing but the seed and its number.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from heapq import heappop, heappush
from typing import Any

import numpy as np

from moca.data.records import Pair


def pair_keys(pair: Pair) -> tuple[tuple[str, bytes], tuple[str, bytes]]:
    """The keys of a pair for `TaskBatches`: its query, and its positive."""
    return ("query", pair.query.key()), ("positive", pair.positive.key())


class TaskBatches:
    """Batches of indices, each from one task.

    Iterating yields ``(task, indices)`` for one epoch; iterate again for the next. Every rank
    yields the same tasks and the same number of batches. Within an epoch an item comes at most
    once, unless weights ask a task for more batches than it has; what does not fill a batch of all
    ranks is left for another epoch.

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
        self.keys = unique_keys or [()] * len(tasks)
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.epoch = 0
        for task in self.members:
            self._check(task)

    def __iter__(self) -> Iterator[tuple[str, list[int]]]:
        plan = self._plan(self.epoch)
        self.epoch += 1
        for task, indices in plan:
            yield task, indices[self.rank :: self.world_size]

    def _check(self, task: str) -> None:
        size = self.sizes[task] * self.world_size
        have = len(self.members[task])
        if have < size:
            raise ValueError(
                f"task {task!r} has {have} items, fewer than a batch of {self.sizes[task]} on each "
                f"of {self.world_size} process(es)"
            )
        if next(self._pass(task, np.random.default_rng(self.seed)), None) is None:
            raise ValueError(
                f"task {task!r} has too many items with the same query or positive to fill a batch "
                f"of {size} without repeating one"
            )

    def _plan(self, epoch: int) -> list[tuple[str, list[int]]]:
        """All batches of an epoch, each over all ranks, in order."""
        streams = {
            task: np.random.default_rng((self.seed, epoch, number))
            for number, task in enumerate(self.members)
        }
        passes = {task: list(self._pass(task, rng)) for task, rng in streams.items()}
        if self.weights is not None:
            total = sum(len(batches) for batches in passes.values())
            for task, wanted in _shares(self.weights, total).items():
                while len(passes[task]) < wanted and (more := [*self._pass(task, streams[task])]):
                    passes[task] += more
                passes[task] = passes[task][:wanted]
        plan = [(task, batch) for task, batches in passes.items() for batch in batches]
        order = np.random.default_rng((self.seed, epoch, len(streams))).permutation(len(plan))
        return [plan[i] for i in order]

    def _pass(self, task: str, rng: np.random.Generator) -> Iterator[list[int]]:
        """One shuffled pass over a task, in full batches over all ranks."""
        size = self.sizes[task] * self.world_size
        return _distinct(rng.permutation(self.members[task]).tolist(), size, self.keys)


def _distinct(
    order: list[int], size: int, keys: Sequence[Sequence[Hashable]]
) -> Iterator[list[int]]:
    """Full batches, each of the first items left that share no key.

    An item that shares one with the batch waits behind that key, and of those who wait behind a key
    only the first is looked at again: the time does not grow with how many share it.
    """
    waiting: dict[Hashable, list[int]] = defaultdict(list)  # places in `order` behind a key: heaps
    again: list[tuple[int, Hashable]] = []  # heap of the first behind each key that is free
    fresh = iter(range(len(order)))
    batch: list[int] = []
    taken: set[Hashable] = set()

    def release(key: Hashable) -> None:
        if key not in taken and waiting[key]:
            heappush(again, (heappop(waiting[key]), key))

    while True:
        place, behind = heappop(again) if again else (next(fresh, None), None)
        if place is None:
            return
        own = keys[order[place]]
        if taken.isdisjoint(own):
            batch.append(order[place])
            taken.update(own)
        else:
            heappush(waiting[next(key for key in own if key in taken)], place)
            release(behind)
        if len(batch) == size:
            yield batch
            batch, done, taken = [], taken, set()
            for key in done:
                release(key)


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
