"""What stage 1 is worth: the same model with and without it, at equal steps, at equal time, and
with a tenth of the pairs. Reported as it comes out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from moca.checkpoint import replacing
from moca.quickstart.report_data import Comparison, ComparisonRow

if TYPE_CHECKING:
    from moca.quickstart.run import Quickstart

FILE = "comparison.json"
SCARCE = 10  # one pair in so many is kept
STAGE1, STAGE2 = "stage 1: continual pre-training", "stage 2: contrastive training"


def compare(run: Quickstart) -> None:
    """Train and evaluate the comparisons that are not there yet; writes comparison.json."""
    stage1, stage2 = run.times[STAGE1], run.times[STAGE2]
    longer = round(run.steps * (stage1 + stage2) / stage2)
    few = max(1, run.steps // 2)  # a tenth of the pairs is seen often enough in half the steps
    _write_scarce(run)
    # name, shown as, group, from, steps, pairs, whether stage 1's time belongs to it
    plans = [
        ("contrast", "stage 1 + stage 2", "", "cpt/model", run.steps, "train", True),
        ("same-steps", "stage 2 alone, equal steps", "", "init", run.steps, "train", False),
        ("same-time", "stage 2 alone, equal time", "", "init", longer, "train", False),
        ("scarce-both", "stage 1 + stage 2", "10 % of the pairs", "cpt/model", few, "scarce", True),
        ("scarce-alone", "stage 2 alone, equal steps", "10 % of the pairs", "init", few, "scarce",
         False),
    ]  # fmt: skip
    rows = []
    for name, shown, group, start, steps, part, pretrained in plans:
        run.train_stage2(name, start, steps, part)
        metrics = run.stage(
            f"comparison: evaluate {name}",
            "metrics.json" if name == "contrast" else f"{name}.json",
            partial(run.evaluate, f"{name}/model"),
        )
        seconds = run.times[STAGE2 if name == "contrast" else f"comparison: {name}"]
        rows.append({
            "name": shown,
            "group": group,
            "steps": steps,
            "seconds": seconds + (stage1 if pretrained else 0.0),
            "recall": {task: scores["model"]["recall@10"] for task, scores in metrics.items()},
        })  # fmt: skip
    run.write(FILE, rows)


def read_comparison(folder: Path) -> Comparison | None:
    """What `compare` wrote, or None."""
    path = folder / FILE
    if not path.exists():
        return None
    rows: list[Mapping] = json.loads(path.read_text(encoding="utf-8"))
    return Comparison(
        list(rows[0]["recall"]),
        [ComparisonRow(**row) for row in rows],
        "Equal time gives stage 2 alone the seconds that stage 1 took; seconds are of one machine.",
    )


def _write_scarce(run: Quickstart) -> None:
    """Every tenth training pair of each task, beside the full files."""
    target = run.folder / "data/scarce"
    if target.exists():
        return
    with replacing(target) as folder:
        for path in sorted((run.folder / "data/train").glob("*.jsonl")):
            lines = path.read_text("utf-8").splitlines(True)
            (folder / path.name).write_text("".join(lines[::SCARCE]), encoding="utf-8")
