"""`moca eval`: a saved model over held-out pairs, MMEB tasks and BEIR folders, with baselines."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from moca.checkpoint import new_output, write_file
from moca.config import ConfigError, EvalConfig
from moca.console import say
from moca.data.prompts import prompted_pair
from moca.data.records import Document, Pair
from moca.data.rows import read_rows
from moca.data.sources import Records, load_pairs
from moca.embed import Embedder, checkers
from moca.evaluate import Embed, Pool, candidate_precision, chance
from moca.suites import load_beir, load_mmeb

# Task -> who ("model", "chance", "tf-idf") -> metric -> value from 0 to 1.
Scores = dict[str, dict[str, dict[str, float]]]


def evaluate_model(config: EvalConfig) -> Scores:
    """Every task of the configuration; written to `config.output` too if that is set.

    Raises:
        ConfigError: the output exists, cannot be made or is being made by another process, or a
            source is empty.
        OSError: the scores could not be written; they have been printed then.
    """
    if not config.output:
        return _evaluate(config)
    with new_output(Path(config.output), "file"):
        scores = _evaluate(config)
        text = json.dumps(scores, indent=1) + "\n"
        try:
            write_file(config.output, lambda path: path.write_text(text, encoding="utf-8"))
        except OSError as error:
            say(format_table(scores))
            raise OSError(f"{config.output} could not be written: {error}") from error
    return scores


def _evaluate(config: EvalConfig) -> Scores:
    pools, choices = _read_sources(config)
    embedder = Embedder.from_pretrained(
        config.model,
        max_length=config.max_length,
        batch_tokens=config.batch_tokens,
        precision=config.precision,
    )

    def embed(documents: list[Document]):
        return embedder.encode(documents, progress=True)

    prompts = config.query_prompt, config.document_prompt
    scores: Scores = {task: evaluate_pool(pool, embed, *prompts) for task, pool in pools.items()}
    for task, pairs in choices.items():
        result = candidate_precision(embed, [prompted_pair(pair, *prompts) for pair in pairs])
        scores[task] = {
            "model": {"precision@1": result["precision@1"]},
            "chance": {"precision@1": result["chance"]},
        }
    for reason, count in sorted(embedder.counts.items()):
        say(f"{count} {reason} at max_length {config.max_length}")
    return scores


def _read_sources(config: EvalConfig) -> tuple[dict[str, Pool], dict[str, list[Pair]]]:
    """What is ranked among all of a task, and what among the candidates of a row.

    All is checked here, queries and documents with the wording of their side, so that none stops
    the embedding.
    """
    prompts = config.query_prompt, config.document_prompt
    check_query, check_document = checkers(config.model, config.max_length, *prompts)

    def later(document: Document) -> None:
        """The check of a pair's document, whose side only the pair tells."""

    def checked(pair: Pair) -> Pair:
        check_query(pair.query)
        for document in (pair.positive, *pair.negatives):
            check_document(document)
        return pair

    def read(task: str, pairs: Records[Pair]) -> list[Pair]:
        bar = tqdm(pairs, f"checking {task}", unit="pair")
        rows = ((pair.name, partial(checked, pair)) for pair in bar)
        return list(read_rows(pairs.source, rows, config.on_error, Counter()))

    options: dict[str, Any] = {
        "split": "test",
        "image_root": config.image_root or None,
        "on_error": config.on_error,
    }
    pools, choices = {}, {}
    for task, source in config.pairs.items():
        pairs = read(task, load_pairs(source, task=task, **options, check=later))
        if not pairs:
            raise ConfigError(f"pairs.{task}: {source} holds no pairs")
        pools[task] = Pool.of_pairs(pairs)
    for task, folder in config.beir.items():
        pools[task] = load_beir(folder, **options, check=check_document)
        for query in pools[task].queries:
            check_query(query)
        if config.on_error == "raise":  # to skip, loading has checked already
            for document in tqdm(pools[task].candidates, f"checking {task}", unit="doc"):
                check_document(document)
    for task, source in config.mmeb.items():
        choices[task] = read(task, load_mmeb(source, **options, check=later))
        if not choices[task]:
            raise ConfigError(f"mmeb.{task}: {source} holds no rows")
    return pools, choices


def evaluate_pool(
    pool: Pool, embed: Embed, query_prompt: str = "", document_prompt: str = ""
) -> dict[str, dict[str, float]]:
    """A model's metrics over a pool with chance and, where both sides have text, TF-IDF.

    The prompts are for the model alone; see `moca.data.prompts`.
    """
    result = {
        "model": pool.prompted(query_prompt, document_prompt).evaluate(embed),
        "chance": chance(len(pool.candidates), pool.relevance),
    }
    if tfidf := pool.tfidf():
        result["tf-idf"] = tfidf
    return result


def format_table(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """The scores as text, in percent; a dash where a metric does not apply."""
    names = ("recall@1", "recall@5", "recall@10", "mrr", "ndcg@5", "ndcg@10", "precision@1")
    width = max([len("task"), *map(len, scores)])
    lines = [f"{'task':<{width}}  {'':<8}" + "".join(f"{name:>12}" for name in names)]
    for task, rows in scores.items():
        for who, metrics in rows.items():
            cells = (f"{100 * metrics[n]:12.1f}" if n in metrics else f"{'-':>12}" for n in names)
            lines.append(f"{task:<{width}}  {who:<8}" + "".join(cells))
    return "\n".join(lines)
