"""Retrieval metrics, and the two baselines that need no model: chance and TF-IDF.

Q queries, C candidates, D dimensions. A rank counts from 1. Ties are counted against the model: a
candidate that is not relevant but scores the same as a relevant one stands before it, so a model
that gives the same embedding to everything gets the worst score there is, not a lucky one.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np

from moca.data.prompts import prompted
from moca.data.records import IMAGE_MARKER, Document, Pair

# Relevance of the candidates of each query: candidate -> gain (finite, above 0).
Relevance = Sequence[Mapping[int, float]]
Embed = Callable[[list[Document]], Any]

DEFAULT_KS = (1, 5, 10)
# Scores closer than this are equal: rounding must not break the tie of two equal embeddings.
TIE = 1e-9
# Scores held at a time; 128 MiB in float64.
_SCORES_AT_A_TIME = 2**24
_WORD = re.compile(r"\w+")


def metrics(
    query: Any,
    document: Any,
    target: Any = None,
    *,
    relevance: Relevance | None = None,
    ks: Sequence[int] = DEFAULT_KS,
) -> dict[str, float]:
    """Score a retrieval by inner product of embeddings.

    Args:
        query: (Q, D) array or tensor.
        document: (C, D) array or tensor.
        target: (Q,) integers, the one right candidate of each query; default ``arange(Q)``.
        relevance: instead of ``target``, the gains of each query's relevant candidates.
        ks: cut-offs.

    Returns:
        ``recall@k`` (share of the relevant candidates among the first k), ``ndcg@k`` (linear gain,
        discount ``1 / log2(rank + 1)``) for every k, ``mrr`` (of the first relevant candidate),
        ``precision@1``: means over queries, 0 to 1.

    Raises:
        ValueError: shapes that do not fit, a target or a relevant candidate out of range, an
            embedding or a gain that is not finite, a gain that is not above 0, a query without a
            relevant candidate, a cut-off that is no whole number of at least 1.
    """
    query, document = _matrix(query, "query"), _matrix(document, "document")
    if query.shape[1] != document.shape[1]:
        raise ValueError(
            "query and document must have the same number of dimensions, "
            f"got {query.shape} and {document.shape}"
        )
    if relevance is None:
        relevance = _targets(target, len(query), len(document))
    elif target is not None:
        raise ValueError("give target or relevance, not both")
    step = max(1, _SCORES_AT_A_TIME // max(1, len(document)))
    blocks = (query[i : i + step] @ document.T for i in range(0, len(query), step))
    return rank_metrics((row for block in blocks for row in block), len(document), relevance, ks)


def rank_metrics(
    scores: Iterable[np.ndarray],
    candidates: int,
    relevance: Relevance,
    ks: Sequence[int] = DEFAULT_KS,
) -> dict[str, float]:
    """The metrics of any scores.

    Args:
        scores: for each query, (C,) scores; higher is better, and infinite ones have a place too.
        candidates: C.
        relevance: for each query, candidate -> gain.
        ks: cut-offs.

    Raises:
        ValueError: see `metrics`; also when there are more or fewer scores than queries, or a row
            of them has another shape or holds NaN.
    """
    _check(candidates, relevance, ks)
    totals: Counter[str] = Counter()
    for number, (row, gains) in enumerate(zip(scores, relevance, strict=True)):
        ranks, values = _ranks(_row(row, candidates, number), gains)
        totals["mrr"] += 1 / ranks[0]
        totals["precision@1"] += ranks[0] == 1
        ideal = np.sort(values)[::-1]
        for k in ks:
            found = ranks <= k
            totals[f"recall@{k}"] += found.mean()
            totals[f"ndcg@{k}"] += (values / np.log2(ranks + 1))[found].sum() / _dcg(ideal[:k])
    return _means(totals, len(relevance), ks)


def chance(
    candidates: int, relevance: Relevance, ks: Sequence[int] = DEFAULT_KS
) -> dict[str, float]:
    """What a random order of the candidates reaches on average, every order being as likely.

    Args:
        candidates: C.
        relevance: for each query, candidate -> gain.
        ks: cut-offs.

    Raises:
        ValueError: no query; see `metrics` for relevance and cut-offs.
    """
    _check(candidates, relevance, ks)
    # Of a gain of 1 at every rank: a random order has the mean gain there.
    full = {k: _dcg(np.ones(min(k, candidates))) for k in ks}
    first = {count: _first_hit(count, candidates) for count in set(map(len, relevance))}
    totals: defaultdict[str, float] = defaultdict(float)
    for gains in relevance:
        ideal = np.sort(np.fromiter(gains.values(), np.float64, len(gains)))[::-1]
        totals["mrr"] += first[len(gains)]
        totals["precision@1"] += len(gains) / candidates
        for k in ks:
            totals[f"recall@{k}"] += min(k, candidates) / candidates
            totals[f"ndcg@{k}"] += ideal.sum() / candidates * full[k] / _dcg(ideal[:k])
    return _means(totals, len(relevance), ks)


class TfIdf:
    """Cosine similarity of TF-IDF vectors over words.

    A word's weight is ``(1 + ln tf) * (ln((1 + C) / (1 + df)) + 1)``, where ``df`` of C candidates
    hold it; a word is a run of letters and digits in lower case; a vector has length 1.

    Args:
        candidates: the texts to be found.

    Raises:
        ValueError: no candidates.
    """

    def __init__(self, candidates: Sequence[str]):
        if not candidates:
            raise ValueError("expected at least one candidate, got none")
        counts = [_count_words(text) for text in candidates]
        in_texts = Counter(word for words in counts for word in words)
        self.size = len(candidates)
        self.idf = {word: math.log((1 + self.size) / (1 + df)) + 1 for word, df in in_texts.items()}
        postings: dict[str, tuple[list[int], list[float]]] = {word: ([], []) for word in self.idf}
        for i, words in enumerate(counts):
            for word, weight in self._weights(words).items():
                postings[word][0].append(i)
                postings[word][1].append(weight)
        self._postings = {word: (np.array(ids), np.array(w)) for word, (ids, w) in postings.items()}

    def scores(self, query: str) -> np.ndarray:
        """(C,) float64 cosines of a text with every candidate; 0 where no word is shared."""
        result = np.zeros(self.size)
        for word, weight in self._weights(_count_words(query)).items():
            candidates, weights = self._postings[word]
            result[candidates] += weight * weights
        return result

    def _weights(self, words: Counter[str]) -> dict[str, float]:
        weights = {w: (1 + math.log(n)) * self.idf[w] for w, n in words.items() if w in self.idf}
        length = math.sqrt(sum(weight**2 for weight in weights.values()))
        return {word: weight / length for word, weight in weights.items()}


def tfidf_baseline(
    queries: Sequence[str],
    candidates: Sequence[str],
    target: Any = None,
    *,
    relevance: Relevance | None = None,
    ks: Sequence[int] = DEFAULT_KS,
) -> dict[str, float]:
    """The metrics of `TfIdf`; arguments as in `metrics`, with texts in place of embeddings."""
    if relevance is None:
        relevance = _targets(target, len(queries), len(candidates))
    index = TfIdf(candidates)
    return rank_metrics(map(index.scores, queries), len(candidates), relevance, ks)


@dataclass
class Pool:
    """Queries, the candidates they share, and which of them are right.

    Args:
        queries: Q.
        candidates: C, each of them once.
        relevance: for each query, candidate -> gain.
    """

    queries: list[Document]
    candidates: list[Document]
    relevance: list[dict[int, float]]

    @classmethod
    def of_pairs(cls, pairs: Sequence[Pair]) -> Pool:
        """Every query against all positives. Equal queries are one, with several right candidates.

        Raises:
            ValueError: no pairs.
        """
        if not pairs:
            raise ValueError("expected at least one pair, got none")
        queries, candidates = _Unique(), _Unique()
        relevance: list[dict[int, float]] = []
        for pair in pairs:
            query, candidate = queries(pair.query), candidates(pair.positive)
            if query == len(relevance):
                relevance.append({})
            relevance[query][candidate] = 1.0
        return cls(queries.items, candidates.items, relevance)

    def prompted(self, query: str, document: str) -> Pool:
        """The same with a prompt around every query, and another around every candidate."""
        queries = [prompted(item, query) for item in self.queries]
        return Pool(queries, [prompted(item, document) for item in self.candidates], self.relevance)

    def evaluate(self, embed: Embed, ks: Sequence[int] = DEFAULT_KS) -> dict[str, float]:
        """The metrics of a model; ``embed`` turns documents into (N, D) embeddings."""
        query, candidate = embed(self.queries), embed(self.candidates)
        return metrics(query, candidate, relevance=self.relevance, ks=ks)

    def tfidf(self, ks: Sequence[int] = DEFAULT_KS) -> dict[str, float] | None:
        """The metrics of TF-IDF, or None when a query or a candidate has no text at all."""
        texts = [[_text(item) for item in items] for items in (self.queries, self.candidates)]
        if not all(text for side in texts for text in side):
            return None
        return tfidf_baseline(*texts, relevance=self.relevance, ks=ks)


def candidate_precision(embed: Embed, pairs: Sequence[Pair]) -> dict[str, float]:
    """Precision@1 of the positive against the query's own negatives, as in MMEB.

    Args:
        embed: turns documents into (N, D) embeddings; sees each document once.
        pairs: the queries with their candidates.

    Returns:
        ``precision@1`` and, beside it, ``chance``.

    Raises:
        ValueError: no pairs, or an embedding that is not finite.
    """
    if not pairs:
        raise ValueError("expected at least one query, got none")
    documents = _Unique()
    rows = [
        (documents(pair.query), [documents(item) for item in (pair.positive, *pair.negatives)])
        for pair in pairs
    ]
    embeddings = _matrix(embed(documents.items), "embedding")
    right = expected = 0.0
    for query, candidates in rows:
        scores = embeddings[candidates] @ embeddings[query]
        # A second copy of the right candidate is no rival.
        rivals = [i for i, number in enumerate(candidates) if number != candidates[0]]
        right += bool((scores[rivals] < scores[0] - TIE).all())
        expected += 1 / (1 + len(rivals))
    return {"precision@1": right / len(rows), "chance": expected / len(rows)}


class _Unique:
    """Numbers documents in the order of their first appearance."""

    def __init__(self) -> None:
        self.items: list[Document] = []
        self._numbers: dict[bytes, int] = {}

    def __call__(self, document: Document) -> int:
        number = self._numbers.setdefault(document.key(), len(self.items))
        if number == len(self.items):
            self.items.append(document)
        return number


def _text(document: Document) -> str:
    return document.text.replace(IMAGE_MARKER, " ").strip()


def _count_words(text: str) -> Counter[str]:
    return Counter(_WORD.findall(text.lower()))


def _matrix(values: Any, name: str) -> np.ndarray:
    """A (N, D) float64 array of finite numbers."""
    if hasattr(values, "detach"):
        values = values.detach().double().cpu().numpy()
    matrix = np.asarray(values, np.float64)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(f"{name} must be (rows, dimensions), not empty, got {matrix.shape}")
    bad = np.flatnonzero(~np.isfinite(matrix).all(axis=1))
    if len(bad):
        raise ValueError(
            f"{name}: {len(bad)} of {len(matrix)} rows are not finite, the first is row {bad[0]}"
        )
    return matrix


def _targets(target: Any, queries: int, candidates: int) -> list[dict[int, float]]:
    numbers = np.arange(queries) if target is None else np.asarray(target)
    if numbers.shape != (queries,) or numbers.dtype.kind not in "iu":
        raise ValueError(
            f"target must be ({queries},) integers, got shape {numbers.shape} of {numbers.dtype}"
        )
    if numbers.size and (numbers.min() < 0 or numbers.max() >= candidates):
        raise ValueError(
            f"target must be from 0 to {candidates - 1}, got {numbers.min()} to {numbers.max()}"
        )
    return [{number: 1.0} for number in numbers.tolist()]


def _row(scores: Any, candidates: int, query: int) -> np.ndarray:
    """A query's (C,) float64 scores, none of them NaN: that has no rank."""
    row = np.asarray(scores, np.float64)
    if row.shape != (candidates,):
        raise ValueError(f"query {query}: expected ({candidates},) scores, got {row.shape}")
    nan = np.flatnonzero(np.isnan(row))
    if len(nan):
        raise ValueError(f"query {query}: expected scores, got NaN for candidate {nan[0]}")
    return row


def _check(candidates: int, relevance: Relevance, ks: Sequence[int]) -> None:
    if not ks or not all(_whole(k) and k >= 1 for k in ks):
        raise ValueError(f"ks must be whole numbers of at least 1, got {list(ks)}")
    if not relevance:
        raise ValueError("expected at least one query, got none")
    for number, gains in enumerate(relevance):
        known = all(_whole(i) and 0 <= i < candidates for i in gains)
        if not gains or not known or not all(0 < gain < math.inf for gain in gains.values()):
            raise ValueError(
                f"query {number}: expected relevant candidates from 0 to {candidates - 1} with "
                f"finite gains above 0, got {dict(gains)}"
            )


def _whole(number: object) -> bool:
    return isinstance(number, Integral) and not isinstance(number, bool)


def _means(totals: Mapping[str, float], queries: int, ks: Sequence[int]) -> dict[str, float]:
    names = [f"{name}@{k}" for name in ("recall", "ndcg") for k in ks] + ["mrr", "precision@1"]
    return {name: float(totals[name] / queries) for name in names}


def _dcg(gains: np.ndarray) -> float:
    """Discounted sum of the gains at ranks 1, 2 and so on."""
    return (gains / np.log2(np.arange(len(gains)) + 2)).sum()


def _first_hit(relevant: int, candidates: int) -> float:
    """Mean of 1 / rank of the first relevant candidate in a random order."""
    ranks = np.arange(1, candidates - relevant + 2)
    hit = relevant / (candidates - ranks + 1)  # at this rank, where no earlier one was
    missed = np.concatenate(([1.0], np.cumprod(1 - hit[:-1])))
    return (missed * hit / ranks).sum()


def _ranks(scores: np.ndarray, gains: Mapping[int, float]) -> tuple[np.ndarray, np.ndarray]:
    """Ranks of the relevant candidates, ascending, and the gain of each."""
    relevant = np.fromiter(gains, np.int64, len(gains))
    values = np.fromiter(gains.values(), np.float64, len(gains))
    # Equal scores: the smaller gain stands first.
    order = np.lexsort((values, -scores[relevant]))
    relevant, values = relevant[order], values[order]
    others = np.sort(np.delete(scores, relevant))
    ahead = len(others) - np.searchsorted(others, scores[relevant] - TIE)
    return ahead + np.arange(1, len(relevant) + 1), values
