"""What a finished quickstart has to show, read from the folder of a miniature one."""

import json
import shlex
from pathlib import Path

import pytest
import tiny
from moca.config import EvalConfig, QuickstartConfig, load_config
from moca.data.sources import load_pairs
from moca.quickstart import run
from moca.quickstart.findings import TARGETS, gather
from moca.quickstart.run import Quickstart

TASK = "title-section"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The files that a run leaves, of one task without pictures."""
    folder = tmp_path_factory.mktemp("a run")
    tiny.write_model(folder / "contrast/model")
    words = tiny.write_data(folder / "data/test")["words"]
    words.rename(words.with_name(f"{TASK}.jsonl"))
    (folder / "cpt").mkdir()
    for stage in ("cpt", "contrast"):
        (folder / stage / "log.jsonl").write_text("")
    rows = {name: dict.fromkeys(("recall@10",), 0.5) for name in ("model", "chance", "tf-idf")}
    task = {"name": TASK, "direction": "", "train": 1, "test": 1, "dropped": {}}
    files = {
        "data/summary.json": {"tasks": [task], "documents": {}, "notes": []},
        "times.json": {"all": 1.0},
        "recipe.json": {"max_length": 32},
        "metrics.json": {TASK: rows},
        "untrained.json": {TASK: rows},
    }
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value))
    return folder


def report(config: QuickstartConfig):
    pairs = list(load_pairs(Path(config.output) / f"data/test/{TASK}.jsonl", task=TASK))
    return gather(config, "summary", "date", {TASK: pairs})


def test_targets_are_those_of_the_default_corpora(folder):
    of_default, of_docs = (
        report(QuickstartConfig(output=str(folder), docs=docs)) for docs in ("", "pages")
    )
    assert [task.target for task in of_default.tasks] == [TARGETS[TASK]]
    assert [task.target for task in of_docs.tasks] == [None]
    assert of_docs.machine.memory_gib > 0


def test_commands_are_of_what_is_there(folder, monkeypatch):
    """They can be called as they are shown, also where a folder's name has a blank."""
    config = QuickstartConfig(output=str(folder), docs="my pages", scale=0.5, seed=3)
    shown = report(config)
    search, _, again = (shlex.split(command.command) for command in shown.commands)
    assert search == ["moca", "search", f"{folder}/index", "red square"]
    evaluation = load_config(EvalConfig, overrides=again[2:])
    assert Path(evaluation.model).is_dir() and list(evaluation.pairs) == [TASK]
    assert all(Path(source).is_file() for source in evaluation.pairs.values())
    moca, quickstart, *settings = shlex.split(shown.comparison_command)
    assert (moca, quickstart) == ("moca", "quickstart")
    other = load_config(QuickstartConfig, overrides=settings)
    expected = QuickstartConfig(
        output=f"{folder}-compare", docs="my pages", scale=0.5, seed=3, compare=True
    )
    assert other == expected
    monkeypatch.chdir(folder.parent)
    Quickstart(other)  # an output of its own


def test_the_baseline_has_the_seed_of_the_run(folder, monkeypatch):
    seeds = []
    monkeypatch.setattr(run, "IMAGE_TASKS", (TASK,))
    monkeypatch.setattr(run, "load_pairs", lambda *_, **__: [])
    monkeypatch.setattr(
        run, "run_baseline", lambda train, test, settings: seeds.append(settings.seed)
    )
    config = QuickstartConfig(output=str(folder / "seeded"), seed=7)
    started = Quickstart(config)
    (folder / "seeded/data").mkdir()
    (folder / "seeded/data/summary.json").write_text(json.dumps({"tasks": [{"name": TASK}]}))
    started.baseline()
    assert seeds == [7]
