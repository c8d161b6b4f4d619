"""Task-aware batches: one task each, the same on all ranks, seeded."""

from collections import Counter

import numpy as np
import pytest
from moca.data.batching import TaskBatches, _distinct, pair_keys
from moca.data.records import Document, Pair

TASKS = ["a"] * 50 + ["b"] * 23 + ["c"] * 9


def epoch(batches):
    return list(batches)


def test_one_task_a_batch_and_one_pass_an_epoch():
    batches = TaskBatches(TASKS, 4, seed=1)
    taken = epoch(batches)
    assert len(taken) == 19
    for task, indices in taken:
        assert len(indices) == 4 and {TASKS[i] for i in indices} == {task}
    everything = [i for _, indices in taken for i in indices]
    assert len(set(everything)) == len(everything)
    assert Counter(task for task, _ in taken) == {"a": 12, "b": 5, "c": 2}


def test_seeds_and_epochs_differ_and_repeat():
    def two_epochs(seed):
        batches = TaskBatches(TASKS, 4, seed=seed)
        return epoch(batches), epoch(batches)

    assert two_epochs(1) == two_epochs(1)
    assert two_epochs(1) != two_epochs(2)
    first, second = two_epochs(1)
    assert first != second and [task for task, _ in first] != [task for task, _ in second]


def test_ranks_share_tasks_and_not_items():
    ranks = [epoch(TaskBatches(TASKS, 3, seed=5, rank=r, world_size=3)) for r in range(3)]
    assert len({len(rank) for rank in ranks}) == 1 and ranks[0]
    for steps in zip(*ranks, strict=True):
        assert len({task for task, _ in steps}) == 1
        items = [i for _, indices in steps for i in indices]
        assert len(set(items)) == 9


def test_weights_share_an_epoch():
    batches = TaskBatches(TASKS, 4, weights={"a": 1, "b": 1, "c": 2})
    taken = epoch(batches)
    assert len(taken) == 19
    counts = Counter(task for task, _ in taken)
    assert counts["c"] in (9, 10) and {counts["a"], counts["b"]} <= {4, 5}
    seen = Counter(i for task, indices in taken if task == "a" for i in indices)
    assert max(seen.values()) == 1


def test_batch_sizes_of_their_own():
    batches = TaskBatches(TASKS, {"a": 8, "b": 4, "c": 2})
    assert {(task, len(indices)) for task, indices in batches} == {("a", 8), ("b", 4), ("c", 2)}


@pytest.mark.parametrize("world_size", [1, 2])
def test_items_that_share_a_key_are_kept_apart(world_size):
    keys = [(f"q{i % 30}", f"p{i % 11}") for i in range(82)]
    ranks = [
        epoch(TaskBatches(TASKS, 4, unique_keys=keys, rank=r, world_size=world_size))
        for r in range(world_size)
    ]
    seen = []
    for steps in zip(*ranks, strict=True):
        items = [i for _, indices in steps for i in indices]
        seen += items
        used = [key for i in items for key in keys[i]]
        assert len(set(used)) == len(used)
    assert len(set(seen)) == len(seen) > 40


def test_without_conflicts_keys_change_nothing():
    keys = [(i,) for i in range(82)]
    assert epoch(TaskBatches(TASKS, 4, unique_keys=keys)) == epoch(TaskBatches(TASKS, 4))


def one_by_one(order, size, keys):
    """Batches of the first items left that share no key, by looking at all of them again."""
    while True:
        batch, taken = [], set()
        for index in order:
            if len(batch) < size and taken.isdisjoint(keys[index]):
                batch.append(index)
                taken.update(keys[index])
        if len(batch) < size:
            return
        yield batch
        order = [index for index in order if index not in batch]


@pytest.mark.parametrize("queries, positives", [(300, 300), (40, 300), (30, 12), (9, 40), (300, 1)])
def test_a_batch_is_of_the_first_items_left_that_share_no_key(queries, positives):
    rng = np.random.default_rng(queries)
    # Squared, so that some keys are far more frequent than others.
    keys = [
        (f"q{int(queries * q * q)}", f"p{int(positives * p * p)}") for q, p in rng.random((300, 2))
    ]
    order = rng.permutation(300).tolist()
    for size in (1, 2, 7):
        got = list(_distinct(order, size, keys))
        assert got == list(one_by_one(order, size, keys))


class CountedKeys(list):
    asked = 0

    def __getitem__(self, index):
        self.asked += 1
        return super().__getitem__(index)


def test_the_time_of_a_pass_grows_with_its_items_alone():
    """Also where half of them share a positive, which only one of a batch can have."""
    keys = CountedKeys((f"q{n}", "same" if n % 2 else f"p{n}") for n in range(20_000))
    batches = TaskBatches(["a"] * len(keys), 8, unique_keys=keys)
    assert keys.asked < 100, "for the check, one batch is enough"
    assert len(epoch(batches)) == 20_000 // 2 // 7
    assert keys.asked < 4 * len(keys)


def test_pair_keys():
    def pair(query, positive):
        return Pair(Document(query), Document(positive))

    first, second = pair_keys(pair("a", "b")), pair_keys(pair("a", "c"))
    assert first[0] == second[0] and first[1] != second[1]
    assert set(pair_keys(pair("b", "a"))).isdisjoint(first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": []}, "at least one item"),
        ({"batch_size": 10}, r"task 'c' has 9 items, fewer than a batch of 10"),
        ({"batch_size": 5, "world_size": 2}, "task 'c' has 9 items.* 2 process"),
        ({"batch_size": 0}, "batch_size of task 'a' must be positive"),
        ({"batch_size": {"a": 2}}, r"batch_size names \['a'\], the data has"),
        ({"weights": {"a": 1, "x": 2}}, r"weights names \['a', 'x'\]"),
        ({"weights": {"a": 1, "b": 0, "c": 1}}, "weights of task 'b' must be positive"),
        ({"unique_keys": [(1,)] * 82}, "task 'a' has too many items with the same"),
        ({"unique_keys": [(1,)]}, "82 items but keys of 1"),
        ({"rank": 2, "world_size": 2}, r"rank must be in \[0, 2\), got 2"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        TaskBatches(**{"tasks": TASKS, "batch_size": 4} | options)
