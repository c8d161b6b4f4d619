"""The command line: every command on a miniature, and what it says when it cannot."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
from moca.cli import main
from moca.embed import search
from moca.quickstart.run import Quickstart
from moca.run import Interrupted


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    paths = {name: str(path) for name, path in tiny.write_data(folder).items()}
    return {**paths, "model": str(tiny.write_model(folder / "model"))}


def test_embed_search_eval(data, tmp_path, capsys):
    index = tmp_path / "index"
    source = f"source={data['documents']}"
    assert main(["embed", f"model={data['model']}", source, f"output={index}"]) == 0
    table = pq.read_table(index / "embeddings.parquet")
    assert table.num_rows == len(tiny.names()) + 1
    vectors = np.stack(table["embedding"].to_pylist())
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    capsys.readouterr()
    assert main(["search", str(index), "a red square", "-k", "3"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line[:1] != " " * 8]
    scores = [float(line.split()[0]) for line in lines if not line.startswith("        ")]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True)
    shown = Path(data["documents"]).with_name("red-square.png")
    shutil.move(data["model"], tmp_path / "moved")
    try:
        assert main(["search", str(index), str(shown), "--model", str(tmp_path / "moved")]) == 0
    finally:
        shutil.move(tmp_path / "moved", data["model"])
    told = capsys.readouterr()
    assert f"the query is the picture {shown}" in told.err
    best = search(index, shown, model=data["model"])
    assert told.out == "".join(
        f"{hit.score:6.3f}  {hit.name}\n        {hit.text}\n" for hit in best
    )
    assert main(["search", str(tmp_path), "a" * 300]) == 2
    assert "is no index: expected embeddings.parquet" in capsys.readouterr().err
    result = tmp_path / "metrics.json"
    pairs = [f"pairs.words={data['words']}", f"pairs.pictures={data['pictures']}"]
    assert main(["eval", f"model={data['model']}", *pairs, f"output={result}"]) == 0
    scores = json.loads(result.read_text())
    assert set(scores["words"]) == {"model", "chance", "tf-idf"}
    assert set(scores["pictures"]) == {"model", "chance"}
    assert scores["pictures"]["chance"]["recall@10"] == pytest.approx(10 / len(tiny.names()))
    assert "tf-idf" in capsys.readouterr().out


def test_train_both_stages(data, tmp_path, capsys):
    common = ["steps=2", "precision=fp32", "max_length=128"]
    cpt = tmp_path / "cpt"
    settings = [f"model={data['model']}", f"documents=[{data['documents']}]", f"output={cpt}"]
    assert main(["cpt", *settings, "batch_cost=600", *common]) == 0
    path = tmp_path / "contrast.yaml"
    path.write_text(f"model: {cpt}/model\noutput: {tmp_path}/cl\npairs: {{w: {data['words']}}}\n")
    assert main(["contrast", str(path), "batch_size=4", *common]) == 0
    assert (tmp_path / "cl/model/model.safetensors").exists()
    assert "hard_negatives: 2" in (tmp_path / "cl/config.yaml").read_text()


def test_pairs_of_the_hub_are_evaluated_on_their_test_split(data, tmp_path, monkeypatch, caplog):
    """And their relative image paths are taken from the root that is given."""
    pairs = [json.loads(line) for line in Path(data["pictures"]).read_text().splitlines()]
    splits = []

    def load_dataset(name, subset, split):
        splits.append(split)
        return datasets.Dataset.from_list(pairs)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    root = f"image_root={Path(data['pictures']).parent}"
    settings = [f"model={data['model']}", root, "precision=fp32"]
    assert main(["eval", *settings, "pairs.t=owner/name", "pairs.u=owner/name@train"]) == 0
    assert splits == ["test", "train"]
    assert caplog.messages == [
        "owner/name@test is read, for the source names no split; owner/name@SPLIT reads another"
    ]
    source = "owner/name:subset@validation"
    training = [f"output={tmp_path}/cl", f"pairs.t={source}", "steps=1", "batch_size=4"]
    assert main(["contrast", *settings, *training]) == 0
    assert splits[2:] == ["validation"]
    pairs[:] = [{"text": "<image>", "images": [row["pos_image_path"]]} for row in pairs]
    assert main(["embed", *settings, f"output={tmp_path}/i", f"source={source}"]) == 0
    training = [f"output={tmp_path}/cpt", f"documents={source}", "steps=1"]
    assert main(["cpt", *settings, *training]) == 0


def test_a_budget_below_the_cost_of_a_record_is_named(data, tmp_path, capsys):
    settings = [f"model={data['model']}", f"documents={data['documents']}", "precision=fp32"]
    assert main(["cpt", *settings, f"output={tmp_path}/o", "steps=2", "batch_cost=10"]) == 2
    told = capsys.readouterr().err
    assert re.search(r"batch_cost: expected at least \d+, the cost of documents\.jsonl line \d+, "
                     "got 10", told)  # fmt: skip
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["cpt", "modle=x"], 2, "unknown key 'modle'; did you mean 'model'?"),
        (["cpt", "nowhere.yaml"], 2, "nowhere.yaml"),
        (["contrast", "model=m"], 2, "missing key 'output'"),
        (["search", "nowhere", "query"], 2, "nowhere is no index"),
        (["eval", "model=m"], 2, "expected pairs, mmeb or beir"),
        (["embed", "model=m", "source=s", "output=o", "on_error=ignore"], 2, "on_error"),
        (["eval", "model=m", "pairs.t=a/b", "image_root=no"], 2, "image_root: expected a folder"),
    ],
)
def test_errors(arguments, status, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == status
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_embed_refuses_a_folder_that_exists(data, tmp_path, capsys):
    (tmp_path / "index").mkdir()
    arguments = [f"model={data['model']}", f"source={data['documents']}"]
    assert main(["embed", *arguments, f"output={tmp_path}/index"]) == 2
    assert "exists; give another folder" in capsys.readouterr().err


def test_missing_source_is_named(data, tmp_path, capsys):
    arguments = [f"model={data['model']}", f"source={tmp_path}/no.jsonl", f"output={tmp_path}/i"]
    assert main(["embed", *arguments]) != 0
    assert "no.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "i").exists()


def test_the_help_of_eval_names_all_it_does(capsys):
    with pytest.raises(SystemExit):
        main(["eval", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "held-out pairs, MMEB tasks and BEIR folders" in told


def test_a_quickstart_without_data_takes_other_settings(tmp_path, capsys):
    settings = ["quickstart", f"output={tmp_path}/run"]
    for docs in ("absent", "typo"):
        assert main([*settings, f"docs={tmp_path}/{docs}"]) == 1
        assert f"HTML folder not found: {tmp_path}/{docs}" in capsys.readouterr().err
    (tmp_path / "run/data").mkdir()
    assert main([*settings, f"docs={tmp_path}/third"]) == 2
    assert "holds a run with other settings (docs: " in capsys.readouterr().err


def test_a_quickstart_refuses_the_folder_of_another_command(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("model: m\noutput: o\n")
    assert main(["quickstart", f"output={tmp_path}"]) == 2
    assert f"{tmp_path} exists and is no quickstart run: its config.yaml" in capsys.readouterr().err


def test_a_quickstart_that_was_stopped_says_how_it_goes_on(tmp_path, capsys, monkeypatch):
    def stop(run):
        raise Interrupted("stopped after step 86; go on with resume=true output=x/contrast")

    monkeypatch.setattr(Quickstart, "prepare", stop)
    assert main(["quickstart", f"output={tmp_path}/run"]) == 130
    assert capsys.readouterr().err == (
        "moca: stopped after step 86; call the same command again: it goes on from there\n"
    )


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
@pytest.mark.parametrize("goal", ["quickstart", "compare"])
def test_make_takes_a_folder_with_a_blank(goal):
    command = ["make", "--dry-run", "--always-make", goal, "DOCS=my dir"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert '"docs=my dir"' in done.stdout
