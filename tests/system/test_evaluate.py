"""Metrics against their definitions, TF-IDF against scikit-learn, and the published forms."""

import io
import json
import math
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from moca import evaluate
from moca.data.records import IMAGE_MARKER, Document, Pair
from moca.evaluate import Pool, TfIdf, candidate_precision, chance, metrics, tfidf_baseline
from moca.suites import load_beir, load_mmeb
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import ndcg_score

# Three candidates on the axes; a query is then its own list of scores.
AXES = np.eye(3)


def png(colour: str) -> bytes:
    target = io.BytesIO()
    PIL.Image.new("RGB", (8, 8), colour).save(target, "PNG")
    return target.getvalue()


def pair(query: str, positive: str, *negatives: str) -> Pair:
    return Pair(Document(query), Document(positive), tuple(map(Document, negatives)))


def letter_embedding(documents: list[Document]) -> np.ndarray:
    """Counts of the letters a to e: enough to rank a few words."""
    return np.array([[document.text.count(c) for c in "abcde"] for document in documents], float)


def test_metrics_follow_their_definitions():
    queries = [[0.9, 0.5, 0.1], [0.9, 0.5, 0.1], [0.9, 0.5, 0.1]]
    found = metrics(queries, AXES, [0, 1, 2], ks=(1, 2))
    assert found["recall@1"] == pytest.approx(1 / 3)
    assert found["recall@2"] == pytest.approx(2 / 3)
    assert found["precision@1"] == pytest.approx(1 / 3)
    assert found["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert found["ndcg@1"] == pytest.approx(1 / 3)
    assert found["ndcg@2"] == pytest.approx((1 + 1 / math.log2(3)) / 3)


def test_default_target_is_the_diagonal():
    assert metrics(AXES, AXES)["recall@1"] == 1
    assert metrics(AXES, AXES[::-1])["recall@1"] == pytest.approx(1 / 3)


def test_ties_count_against_the_model():
    same = np.ones((4, 8), np.float32) / 3
    assert metrics(same, same, ks=(3, 4)) == pytest.approx(
        {
            "recall@3": 0,
            "recall@4": 1,
            "ndcg@3": 0,
            "ndcg@4": 1 / math.log2(5),
            "mrr": 1 / 4,
            "precision@1": 0,
        }
    )


def test_many_relevant_candidates_agree_with_scikit_learn():
    random = np.random.default_rng(0)
    queries, documents = random.normal(size=(20, 6)), random.normal(size=(30, 6))
    gains = random.integers(0, 4, (20, 30)) * (random.random((20, 30)) < 0.2)
    gains[:, 0] = 1
    relevance = [{int(c): float(row[c]) for c in np.flatnonzero(row)} for row in gains]
    found = metrics(queries, documents, relevance=relevance, ks=(5, 30))
    scores = queries @ documents.T
    for k in (5, 30):
        assert found[f"ndcg@{k}"] == pytest.approx(ndcg_score(gains, scores, k=k))
    first = np.argsort(-scores, axis=1)[:, :5]
    hits = np.take_along_axis(gains > 0, first, axis=1).sum(1) / (gains > 0).sum(1)
    assert found["recall@5"] == pytest.approx(hits.mean())


def test_scores_are_computed_in_blocks(monkeypatch):
    random = np.random.default_rng(1)
    queries, documents = random.normal(size=(11, 4)), random.normal(size=(7, 4))
    target = random.integers(0, 7, 11)
    whole = metrics(queries, documents, target)
    monkeypatch.setattr(evaluate, "_SCORES_AT_A_TIME", 20)
    assert metrics(queries, documents, target) == pytest.approx(whole)


def test_tensors_of_any_dtype_are_taken():
    values = torch.eye(3, dtype=torch.bfloat16, requires_grad=True)
    assert metrics(values, values, torch.arange(3))["recall@1"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": np.ones((3, 4))}, "same number of dimensions"),
        ({"target": [0, 1]}, r"\(3,\) integers"),
        ({"target": [0.0, 1.0, 2.0]}, "float64"),
        ({"target": [0, 1, 3]}, "from 0 to 2, got 0 to 3"),
        ({"query": AXES * [np.nan, 1, 1]}, "3 of 3 rows are not finite"),
        ({"query": np.ones(3)}, "rows, dimensions"),
        ({"ks": (0,)}, "at least 1"),
        ({"target": None, "relevance": [{0: 1}, {}, {1: 1}]}, "query 1"),
        ({"relevance": [{0: 1}] * 3}, "not both"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"query": AXES, "document": AXES, "target": [0, 1, 2]} | change
    query, document = arguments.pop("query"), arguments.pop("document")
    with pytest.raises(ValueError, match=message):
        metrics(query, document, arguments.pop("target"), **arguments)


def test_chance_is_the_mean_over_all_orders():
    relevance = [{0: 1.0}] * 4
    orders = [np.roll([4.0, 3.0, 2.0, 1.0], shift) for shift in range(4)]
    expected = evaluate.rank_metrics(orders, 4, relevance, ks=(1, 3, 10))
    assert chance(4, ks=(1, 3, 10)) == pytest.approx(expected)
    with pytest.raises(ValueError, match="at least one candidate"):
        chance(0)


TEXTS = [
    "The cat sat on the mat, the mat was flat.",
    "A dog and a cat",
    "",
    "Über die Brücke: 3 Ziegen",
    "mat mat mat",
]


@pytest.mark.parametrize(
    "query", ["the cat", "Brücke 3 über nothing", "unknown words", "mat the mat"]
)
def test_tfidf_agrees_with_scikit_learn(query):
    peer = TfidfVectorizer(sublinear_tf=True, token_pattern=r"\w+").fit(TEXTS)
    expected = (peer.transform(TEXTS) @ peer.transform([query]).T).toarray()[:, 0]
    np.testing.assert_allclose(TfIdf(TEXTS).scores(query), expected, atol=1e-12)


def test_tfidf_baseline_gives_nothing_for_no_common_word():
    found = tfidf_baseline(["cat dog", "zebra"], ["a dog", "a horse"], ks=(1,))
    assert found["recall@1"] == 0.5


def test_pool_merges_equal_queries_and_candidates():
    pool = Pool.of_pairs([pair("a", "aa"), pair("a", "ab"), pair("b", "bb"), pair("c", "bb")])
    assert [item.text for item in pool.queries] == ["a", "b", "c"]
    assert [item.text for item in pool.candidates] == ["aa", "ab", "bb"]
    assert pool.relevance == [{0: 1.0, 1: 1.0}, {2: 1.0}, {2: 1.0}]
    assert pool.evaluate(letter_embedding, ks=(1, 2))["recall@2"] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="at least one pair"):
        Pool.of_pairs([])


def test_pool_has_a_tfidf_baseline_only_where_there_is_text():
    words = Pool.of_pairs([pair("red cat", "the cat"), pair("dog", "a dog")])
    assert words.tfidf(ks=(1,))["recall@1"] == 1
    image = Document(IMAGE_MARKER, (png("red"),))
    assert Pool.of_pairs([Pair(Document("red"), image)]).tfidf() is None


def test_candidate_precision_counts_ties_and_copies():
    rows = [
        pair("a", "aab", "b", "c"),
        pair("b", "ac", "bb"),
        pair("d", "d", "d e"),
        pair("e", "e", "e", "a"),
    ]
    found = candidate_precision(letter_embedding, rows)
    # The third is a tie with another text; the copy of the right one in the fourth is no rival.
    assert found["precision@1"] == pytest.approx(2 / 4)
    assert found["chance"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 2 + 1 / 2) / 4)


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


MMEB_ROWS = [
    {
        "qry_text": "<|image_1|>What is it?",
        "qry_img_path": "it.png",
        "tgt_text": ["a cat", "a dog"],
        "tgt_img_path": ["", ""],
    },
    {
        "qry_text": "Find a cat",
        "qry_img_path": "",
        "tgt_text": ["<|image_1|>", "<|image_1|>", "<|image_1|>"],
        "tgt_img_path": ["it.png", "b.png", "c.png"],
    },
]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_mmeb_rows(tmp_path, suffix):
    path = tmp_path / f"Set.{suffix}"
    if suffix == "jsonl":
        write_jsonl(path, MMEB_ROWS)
    else:
        pq.write_table(pa.Table.from_pylist(MMEB_ROWS), path)
    first, second = load_mmeb(path)
    assert first.query.text == f"{IMAGE_MARKER}What is it?"
    assert first.query.images == (tmp_path / "it.png",)
    assert [item.text for item in (first.positive, *first.negatives)] == ["a cat", "a dog"]
    assert second.query.images == () and second.task == "Set"
    shown = [item.images[0].name for item in (second.positive, *second.negatives)]
    assert shown == ["it.png", "b.png", "c.png"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tgt_text": "['a cat']"}, "Set.jsonl:1: tgt_text must be a list, got str"),
        ({"tgt_text": [], "tgt_img_path": []}, "both empty"),
        ({"tgt_img_path": [""]}, "2 tgt_text but 1 tgt_img_path"),
    ],
)
def test_bad_mmeb_rows_are_named(tmp_path, change, message):
    path = write_jsonl(tmp_path / "Set.jsonl", [MMEB_ROWS[0] | change])
    with pytest.raises(ValueError, match=message):
        load_mmeb(path)


def test_mmeb_errors_name_the_line(tmp_path):
    path = tmp_path / "Set.jsonl"
    path.write_text(json.dumps(MMEB_ROWS[0]) + "\n{broken\n")
    with pytest.raises(ValueError, match=r"Set\.jsonl:2: no JSON"):
        load_mmeb(path)
    with pytest.raises(FileNotFoundError, match="absent"):
        load_mmeb(tmp_path / "absent.jsonl")


def test_beir_json_lines(tmp_path):
    write_jsonl(
        tmp_path / "corpus.jsonl",
        [{"_id": "x", "title": "A", "text": "aa"}, {"_id": "y", "title": "", "text": "bb"}],
    )
    write_jsonl(tmp_path / "queries.jsonl", [{"_id": "1", "text": "b"}, {"_id": "2", "text": "c"}])
    qrels = tmp_path / "qrels" / "test.tsv"
    qrels.parent.mkdir()
    qrels.write_text("query-id\tcorpus-id\tscore\n1\ty\t2\n1\tx\t0\n")
    (tmp_path / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\n2\tx\t1\n")
    pool = load_beir(tmp_path)
    assert [item.text for item in pool.candidates] == ["A\naa", "bb"]
    assert [item.text for item in pool.queries] == ["b"]
    assert pool.relevance == [{1: 2.0}]
    assert pool.evaluate(letter_embedding, ks=(5,))["ndcg@5"] == 1
    dev = load_beir(tmp_path, split="dev")
    assert [item.text for item in dev.queries] == ["c"] and dev.relevance == [{0: 1.0}]


def test_beir_parquet_pages(tmp_path):
    parts = {
        "corpus": [
            {"corpus-id": 7, "image": {"bytes": png("red"), "path": None}},
            {"corpus-id": 9, "image": {"bytes": png("blue"), "path": None}},
        ],
        "queries": [{"query-id": 3, "query": "blue?"}],
        "qrels": [{"query-id": 3, "corpus-id": 9, "score": 1}],
    }
    for part, rows in parts.items():
        (tmp_path / part).mkdir()
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / part / "test-00000-of-00001.parquet")
    pool = load_beir(tmp_path)
    assert [item.images for item in pool.candidates] == [(png("red"),), (png("blue"),)]
    assert pool.relevance == [{1: 1.0}]


def test_bad_beir_folders_are_named(tmp_path):
    write_jsonl(tmp_path / "corpus.jsonl", [{"_id": "x", "text": "a"}])
    write_jsonl(tmp_path / "queries.jsonl", [{"_id": "1", "text": "b"}])
    with pytest.raises(FileNotFoundError, match="qrels"):
        load_beir(tmp_path)
    write_jsonl(tmp_path / "qrels.jsonl", [{"query-id": "1", "corpus-id": "z", "score": 1}])
    with pytest.raises(ValueError, match=r"qrels\.jsonl:1: document 'z'"):
        load_beir(tmp_path)
    write_jsonl(tmp_path / "corpus.jsonl", [{"_id": "x", "text": "a"}, {"_id": "x", "text": "b"}])
    with pytest.raises(ValueError, match=r"corpus\.jsonl:2: id 'x' occurs twice"):
        load_beir(tmp_path)
