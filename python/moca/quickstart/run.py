"""`moca quickstart`: from nothing to a trained, evaluated and searchable model, and a report.

Every stage leaves its result in the run folder, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from moca.checkpoint import is_leftover, write_file
from moca.config import (
    ConfigError,
    ContrastConfig,
    CptConfig,
    EmbedConfig,
    QuickstartConfig,
    load_config,
    save_config,
)
from moca.contrast import contrast
from moca.data.images import ImageSettings
from moca.data.records import Pair
from moca.data.sources import load_pairs
from moca.embed import Embedder, build_index
from moca.evaluate import Pool
from moca.model import build_model, tiny_config
from moca.pretrain import pretrain
from moca.quickstart.baseline import BaselineSettings, run_baseline
from moca.quickstart.compare import SCARCE, compare, read_comparison
from moca.quickstart.corpora import load_corpora
from moca.quickstart.findings import gather
from moca.quickstart.prepare import write_corpora
from moca.quickstart.report import write_report
from moca.retrieval import Scores, evaluate_pool
from moca.run import CONFIG, Interrupted
from moca.saving import build_tokenizer

# The miniature: small enough for two cores, large enough to learn from 50,000 pictures and names.
IMAGES = ImageSettings(patch_size=8, merge_size=2, min_pixels=4 * 16**2, max_pixels=20 * 16**2)
VOCABULARY = 1024
BRANCH_SCALE = 0.01  # texts with words in common are alike from the start
CPT_STEPS, CONTRAST_STEPS = 50, 700
CPT_COST = 8192  # of a batch of stage 1
TRAINING: dict[str, Any] = {
    "optimizer": "muon",
    # Gentle: the random weights that training starts from already tell which words texts share.
    "lr": 1e-3,
    "muon_lr": 2e-3,
    "weight_decay": 0.01,
    "flip": 0.25,
    "rotate": 8.0,
    "shift": 0.08,
    "cache_images": True,
    "max_length": 128,
    "save_every": 100,
    "keep_checkpoints": 1,
}
BATCH = 128
# Glosses are short and cheap, so their batches are larger.
TASK_BATCHES = {"gloss": 2 * BATCH}
# Share of the steps.
TASK_WEIGHTS = {"title-section": 0.12, "caption-figure": 0.3, "emoji": 0.33, "gloss": 0.25}
# Captions are few, and learned by heart: every other word is left out.
TOKEN_DROPOUT, TASK_TOKEN_DROPOUT = 0.2, {"caption-figure": 0.5}
# One gloss in so many is a document of stage 1: there are 70 times as many as sections.
GLOSS_STRIDE = 8
# Of the CNN, on each task; bounds its share of the time.
BASELINE = BaselineSettings(steps=250)
IMAGE_TASKS = ("caption-figure", "emoji")
TIMES = "times.json"


class Quickstart:
    """One run: its folder, and how long each stage took, over all its starts.

    Settings may change until the data are there.

    Raises:
        ConfigError: the folder holds a run with other settings, a finished one, or something else.
    """

    def __init__(self, config: QuickstartConfig) -> None:
        self.config = config
        self.folder = Path(config.output)
        path = self.folder / CONFIG
        if path.exists():
            earlier = self._earlier(path)
            if earlier != config and self._begun():
                raise ConfigError(
                    f"output: {self.folder} holds a run with other settings "
                    f"({_differ(earlier, config)}); give another output, or remove it"
                )
            if self.report.exists():
                raise ConfigError(
                    f"output: {self.folder} holds a finished run, its report is {self.report}; "
                    "give another output, or remove it"
                )
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise ConfigError(f"output: {self.folder} exists and is no quickstart run")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_file(path, lambda temporary: save_config(config, temporary))
        self.times: dict[str, float] = self._read(TIMES) or {}

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    def _earlier(self, path: Path) -> QuickstartConfig:
        try:
            return load_config(QuickstartConfig, path)
        except ConfigError:  # of another command, say
            raise ConfigError(
                f"output: {self.folder} exists and is no quickstart run: its {CONFIG} holds other "
                "keys; give another output"
            ) from None

    def _begun(self) -> bool:
        """Whether the folder holds more than what is written before any data are."""
        names = {path.name for path in self.folder.iterdir() if not is_leftover(path)}
        return bool(names - {CONFIG, TIMES})

    def stage(self, name: str, result: str, work: Callable[[], Any]) -> Any:
        """Run `work` unless `result` (a JSON file) exists; returns what it returned then or now."""
        if (done := self._read(result)) is not None:
            return done
        with self.timed(name):
            value = work()
        self.write(result, value)
        return value

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        tqdm.write(f"== {name}")
        began = time.monotonic()
        try:
            yield
        finally:
            self.times[name] = self.times.get(name, 0.0) + time.monotonic() - began
            self.write(TIMES, self.times)

    def write(self, name: str, value: Any) -> None:
        text = json.dumps(value, indent=1)
        write_file(self.folder / name, lambda path: path.write_text(text, encoding="utf-8"))

    def _read(self, name: str) -> Any:
        path = self.folder / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def prepare(self) -> None:
        """The data in published schemas, a tokenizer trained on it, a model with random weights."""
        if (self.folder / "data").exists() and (self.folder / "init").exists():
            return
        with self.timed("data, tokenizer, random model"):
            corpora = load_corpora(self.config.cache, self.config.docs or None)
            if "gloss" in corpora.documents:
                corpora.documents["gloss"] = corpora.documents["gloss"][::GLOSS_STRIDE]
            write_corpora(corpora, self.folder / "data", IMAGES, _progress)
            tokenizer = build_tokenizer(corpora.tokenizer_texts, VOCABULARY)
            model = build_model(
                tiny_config(tokenizer),
                tokenizer,
                IMAGES,
                branch_scale=BRANCH_SCALE,
                seed=self.config.seed,
            )
            model.save_pretrained(self.folder / "init")

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks that are evaluated."""
        summary = self._read("data/summary.json")
        return [task["name"] for task in summary["tasks"]]

    def train_stage1(self) -> None:
        output = self.folder / "cpt"
        if (output / "model").exists():
            return
        documents = sorted(str(p) for p in (self.folder / "data/documents").glob("*.parquet"))
        config = CptConfig(
            model=str(self.folder / "init"),
            output=str(output),
            documents=documents,
            batch_cost=CPT_COST,
            steps=self.cpt_steps,
            resume=(output / CONFIG).exists(),
            seed=self.config.seed,
            **TRAINING,
        )
        with self.timed("stage 1: continual pre-training"):
            pretrain(config)

    def train_stage2(self, name: str, model: str, steps: int, part: str = "train") -> None:
        """Contrastive training of `model` into `name`, unless it is there."""
        output = self.folder / name
        if (output / "model").exists():
            return
        distinct = self._read("data/summary.json")["distinct"]
        if part == "scarce":
            distinct = {task: count // SCARCE for task, count in distinct.items()}
            distinct = {task: count for task, count in distinct.items() if count >= 4}
        tasks = list(distinct)
        config = ContrastConfig(
            model=str(self.folder / model),
            output=str(output),
            pairs={task: str(self.folder / "data" / part / f"{task}.jsonl") for task in tasks},
            steps=steps,
            resume=(output / CONFIG).exists(),
            seed=self.config.seed,
            # No more than half of what a task has, so that batches differ from one another.
            task_batch_sizes={
                task: max(2, min(TASK_BATCHES.get(task, BATCH), count // 2))
                for task, count in distinct.items()
            },
            task_weights={task: TASK_WEIGHTS[task] for task in tasks},
            temperature=0.05,
            token_dropout=TOKEN_DROPOUT,
            task_token_dropout={
                task: TASK_TOKEN_DROPOUT[task] for task in tasks if task in TASK_TOKEN_DROPOUT
            },
            **TRAINING,
        )
        stage = "stage 2: contrastive training" if name == "contrast" else f"comparison: {name}"
        with self.timed(stage):
            contrast(config)

    @property
    def cpt_steps(self) -> int:
        return max(1, round(CPT_STEPS * self.config.scale))

    @property
    def steps(self) -> int:
        """Contrastive steps."""
        return max(1, round(CONTRAST_STEPS * self.config.scale))

    @property
    def source(self) -> str:
        return self.config.docs or "the GIMP manual, emoji and WordNet"

    def test_pairs(self, task: str) -> list[Pair]:
        return list(load_pairs(self.folder / "data/test" / f"{task}.jsonl", task=task))

    def evaluate(self, model: str) -> Scores:
        embedder = Embedder.from_pretrained(self.folder / model, max_length=TRAINING["max_length"])
        return {
            task: evaluate_pool(Pool.of_pairs(self.test_pairs(task)), embedder.encode)
            for task in _progress(self.tasks, "held-out pairs")
        }

    def baseline(self) -> dict[str, dict[str, float]]:
        """The CNN + n-gram baseline on the tasks that look for pictures."""
        results = {}
        for task in self.tasks:
            if task in IMAGE_TASKS:
                train = load_pairs(self.folder / "data/train" / f"{task}.jsonl", task=task)
                settings = dataclasses.replace(BASELINE, seed=self.config.seed)
                results[task] = run_baseline(list(train), self.test_pairs(task), settings)
        return results

    def index(self) -> None:
        """The manual's sections as an index that `moca search` looks in."""
        output = self.folder / "index"
        if not output.exists():
            with self.timed("index"):
                build_index(EmbedConfig(
                    model=str(self.folder / "contrast/model"),
                    source=str(self.folder / "data/documents/manual.parquet"),
                    output=str(output),
                    max_length=TRAINING["max_length"],
                ))  # fmt: skip


def quickstart(config: QuickstartConfig) -> Path:
    """Run every stage that is not done yet; returns the path of the report.

    Raises:
        ConfigError: as `Quickstart`.
        Interrupted: stopped by a signal; the same call goes on from there.
    """
    run = Quickstart(config)
    try:
        _run_stages(run)
    except Interrupted as stop:
        # What a stage says of itself holds for `moca cpt` and `moca contrast`.
        what, _, _ = str(stop).partition(";")
        raise Interrupted(f"{what}; call the same command again: it goes on from there") from None
    return run.report


def _run_stages(run: Quickstart) -> None:
    config = run.config
    run.prepare()
    run.stage("evaluation before training", "untrained.json", lambda: run.evaluate("init"))
    run.train_stage1()
    run.train_stage2("contrast", "cpt/model", run.steps)
    run.stage("evaluation", "metrics.json", lambda: run.evaluate("contrast/model"))
    if config.baseline:
        run.stage("CNN + n-gram baseline", "baseline.json", run.baseline)
    run.index()
    if config.compare:
        compare(run)
    with run.timed("report"):
        run.write("recipe.json", {"max_length": TRAINING["max_length"]})
        tests = {task: run.test_pairs(task) for task in run.tasks}
        summary = (
            f"A miniature Qwen2.5-VL trained from scratch on {run.source}: stage 1 for "
            f"{run.cpt_steps} steps, stage 2 for {run.steps} steps."
        )
        report = gather(config, summary, time.strftime("%Y-%m-%d %H:%M"), tests)
        report.comparison = read_comparison(run.folder)
        write_report(run.report, report)


def _differ(earlier: QuickstartConfig, now: QuickstartConfig) -> str:
    pairs = zip(dataclasses.asdict(earlier).items(), dataclasses.asdict(now).values(), strict=True)
    return ", ".join(f"{name}: {old!r}, now {new!r}" for (name, old), new in pairs if old != new)


def _progress(items: Any, label: str) -> Any:
    return tqdm(items, label, leave=False)
