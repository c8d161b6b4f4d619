"""Metrics against their definitions, TF-IDF against scikit-learn, and the published forms."""

import io
import itertools
import json
import math
from pathlib import Path
from typing import ClassVar

import numpy as np
import PIL.Image
import pytest
import torch
from moca import evaluate, retrieval
from moca.config import ConfigError, EvalConfig
from moca.data.records import IMAGE_MARKER, Document, Pair
from moca.data.sources import check_images
from moca.evaluate import Pool, TfIdf, candidate_precision, chance, metrics, tfidf_baseline
from moca.retrieval import evaluate_model, evaluate_pool
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
        ({"ks": (True,)}, r"whole numbers of at least 1, got \[True\]"),
        ({"ks": (1.5,)}, r"whole numbers of at least 1, got \[1.5\]"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"query": AXES, "document": AXES, "target": [0, 1, 2]} | change
    query, document = arguments.pop("query"), arguments.pop("document")
    with pytest.raises(ValueError, match=message):
        metrics(query, document, arguments.pop("target"), **arguments)


@pytest.mark.parametrize(
    "gains", [{0: math.nan, 1: 0.5}, {1: 0.5, 0: math.nan}, {0: math.inf}, {0.5: 1.0}, {True: 1.0}]
)
def test_gains_that_are_none_are_refused(gains):
    relevance = [{np.int64(0): 1.0}, gains]
    message = r"query 1: expected relevant candidates from 0 to 2 with finite gains above 0, got \{"
    with pytest.raises(ValueError, match=message):
        metrics(AXES[:2], AXES, relevance=relevance)
    with pytest.raises(ValueError, match=message):
        chance(3, relevance)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([math.nan, 0.5], "expected scores, got NaN for candidate 0"),
        ([0.5, math.nan], "expected scores, got NaN for candidate 1"),
        ([0.5], r"expected \(2,\) scores, got \(1,\)"),
        ([0.5, 0.4, 0.3], r"expected \(2,\) scores, got \(3,\)"),
    ],
)
def test_scores_without_a_rank_are_refused(row, message):
    with pytest.raises(ValueError, match=f"query 1: {message}"):
        evaluate.rank_metrics([[1.0, 0.0], row], 2, [{0: 1.0}] * 2)


def test_infinite_scores_have_a_rank():
    rows = [[math.inf, 0.5], [-math.inf, 0.5], [-math.inf, -math.inf]]
    found = evaluate.rank_metrics(rows, 2, [{0: 1.0}] * 3)
    assert found["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 2) / 3)


def test_chance_is_the_mean_over_all_orders():
    relevance = [{0: 1.0}, {1: 1.0, 4: 1.0, 0: 1.0}, {2: 3.0, 3: 0.5}, dict.fromkeys(range(5), 2.0)]
    scores = np.array(list(itertools.permutations(range(5))), float)
    orders = [
        evaluate.rank_metrics([row] * len(relevance), 5, relevance, ks=(1, 3, 10)) for row in scores
    ]
    expected = {name: np.mean([found[name] for found in orders]) for name in orders[0]}
    assert chance(5, relevance, ks=(1, 3, 10)) == pytest.approx(expected)
    with pytest.raises(ValueError, match="at least one query"):
        chance(5, [])
    with pytest.raises(ValueError, match="query 1: expected relevant candidates from 0 to 4"):
        chance(5, [{0: 1.0}, {}])


def test_the_row_of_chance_knows_how_many_are_right():
    pool = Pool.of_pairs([pair("a", "b" * (1 + i)) for i in range(5)])
    pool.candidates += [Document("c" * (1 + i)) for i in range(5)]
    found = evaluate_pool(pool, letter_embedding)["chance"]
    assert found["precision@1"] == pytest.approx(0.5)
    assert found["mrr"] == pytest.approx(0.7047, abs=1e-4)
    assert found["ndcg@10"] == pytest.approx(0.7705, abs=1e-4)


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


@pytest.fixture
def beir(tmp_path) -> Path:
    """A folder of one query; the second document is empty."""
    (tmp_path / "corpus.jsonl").write_text('{"_id": "x", "text": "a"}\n{"_id": "y", "text": ""}\n')
    (tmp_path / "queries.jsonl").write_text('{"_id": "1", "text": "a"}\n')
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n1\tx\t1\n")
    return tmp_path


@pytest.fixture
def no_model(monkeypatch):
    """Instead of a model, the letters of the documents; called with what is told of them."""
    told = []

    class Letters:
        counts: ClassVar[dict[str, int]] = {}

        def encode(self, documents, progress):
            for tell in told:
                tell(documents)
            return letter_embedding(documents)

    monkeypatch.setattr(retrieval, "checkers", lambda *_: [check_images, check_images])
    monkeypatch.setattr(retrieval.Embedder, "from_pretrained", lambda *_, **__: Letters())
    return told.append


def test_bad_rows_of_an_evaluation_are_skipped(beir, no_model, caplog):
    found = evaluate_model(EvalConfig(model="m", beir={"b": str(beir)}, on_error="skip"))
    assert found["b"]["model"]["precision@1"] == 1 and "skipped 1 of 2" in caplog.text
    with pytest.raises(ValueError, match=r"corpus\.jsonl line 2"):
        evaluate_model(EvalConfig(model="m", beir={"b": str(beir)}))
    empty = beir / "Set.jsonl"
    empty.write_text("{}\n")
    with pytest.raises(ConfigError, match=r"mmeb\.m: .*Set\.jsonl holds no rows"):
        evaluate_model(EvalConfig(model="m", mmeb={"m": str(empty)}, on_error="skip"))


def test_prompts_are_around_what_the_model_embeds(beir, no_model, tmp_path):
    """Of every kind of task, and not of what TF-IDF compares."""
    seen = []
    no_model(seen.append)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"qry": "a", "pos_text": "b", "neg_text": []}\n')
    rows = tmp_path / "Set.jsonl"
    row = {"qry_inst": "Name", "qry_text": "a", "tgt_text": ["b", "c"], "tgt_img_path": ["", ""]}
    rows.write_text(json.dumps(row) + "\n")
    sources = {"pairs": {"p": str(pairs)}, "mmeb": {"m": str(rows)}, "beir": {"b": str(beir)}}
    config = EvalConfig(
        "m", **sources, on_error="skip", query_prompt="Find: ", document_prompt="({text}){image}"
    )
    config.check()
    plain = evaluate_model(EvalConfig("m", **sources, on_error="skip"))
    seen.clear()
    scores = evaluate_model(config)
    assert scores["b"]["tf-idf"] == plain["b"]["tf-idf"]
    assert [[document.text for document in documents] for documents in seen] == [
        *(["Find: a"], ["(b)"]),
        *(["Find: a"], ["(a)"]),
        ["Find: Name a", "(b)", "(c)"],
    ]
    with pytest.raises(ConfigError, match=r"document_prompt: expected wording .* got '\{text\}'"):
        EvalConfig("m", **sources, document_prompt="{text}").check()


def test_an_output_that_cannot_be_made_is_refused_first(beir):
    output = beir / "corpus.jsonl" / "x.json"
    with pytest.raises(ConfigError, match=r"x\.json cannot be made: .*corpus\.jsonl: Not a dir"):
        evaluate_model(EvalConfig(model="nowhere", beir={"b": "nowhere"}, output=str(output)))


def test_scores_are_shown_where_they_cannot_be_written(beir, no_model, monkeypatch, capsys):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(retrieval, "write_file", full_disk)
    config = EvalConfig(
        model="m", beir={"b": str(beir)}, on_error="skip", output=str(beir / "x.json")
    )
    with pytest.raises(OSError, match=r"x\.json could not be written: .*No space left"):
        evaluate_model(config)
    assert "ndcg@10" in capsys.readouterr().out
