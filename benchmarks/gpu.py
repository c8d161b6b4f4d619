"""`python -m benchmarks.gpu`: everything that is to be known about a machine with a GPU.

Stages: `build` for its GPU, `test` every kernel (and look for bad memory accesses), `bench` them
beside their peers, `tune` the tiles of attention. Results go into one folder: gpu.json and gpu.md,
verified.json (what may be recorded as proven), gpu.log (what was printed). A stage that runs again
replaces its own part of them. What cannot run is named with the reason; nothing stops the rest.

`--device cpu` tries all of this out where there is no GPU: Triton interpreted, tiny sizes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_stages
from benchmarks.gpu_report import markdown
from benchmarks.gpu_stages import Plan
from benchmarks.machine import ROOT, commit, machine

STAGES: dict[str, Callable[[Plan], dict[str, Any]]] = {
    "build": gpu_stages.build,
    "test": gpu_stages.test,
    "bench": gpu_stages.bench,
    "tune": gpu_stages.tune,
}
DEFAULT_STAGES = ("build", "test", "bench")
# Of what is left of the time when it starts, the most a stage may take; the last one takes all.
SHARES = {"build": 0.5, "test": 0.45, "bench": 1.0, "tune": 1.0}
SECONDS = 570  # of all stages, and the machine is often lent for ten minutes


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the stages; returns 1 if one of them found something wrong."""
    options = _options(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    ends = time.time() + options.seconds
    results = options.output / "gpu.json"
    saved = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
    stages = [name for name in STAGES if name in (options.stage or DEFAULT_STAGES)]
    right = True
    for name in stages:
        share = 1.0 if name == stages[-1] else SHARES[name]
        now = time.time()
        plan = Plan(
            output=options.output.resolve(),
            device=options.device,
            deadline=now + share * (ends - now),
            select=options.select,
            machine=machine(),
            commit=_commit(options.commit),
        )
        print(f"== {name}: at most {plan.seconds_left():.0f} s", flush=True)
        found = STAGES[name](plan)
        found["seconds"] = time.time() - now
        print(f"{found['summary']} ({found['seconds']:.0f} s)", flush=True)
        right &= found["right"]
        saved = merged(saved, name, found, plan)
        write(saved, options.output)
        if name == "build" and not found["right"]:
            break
    print(f"{options.output / 'gpu.md'}: the report", flush=True)
    return 0 if right else 1


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--stage", action="append", choices=tuple(STAGES),
        help=f"to run; may be given several times (default: {', '.join(DEFAULT_STAGES)})",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, default=ROOT / "runs" / "gpu", help="folder of the results"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all (%(default)s)")
    parser.add_argument("--select", default="", metavar="EXPRESSION", help="of pytest's -k")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--commit", help="the commit, where the source is a copy without git")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; --device cpu tries this out without one")
    return options


def _commit(given: str | None) -> dict[str, str | bool]:
    return {"id": given, "dirty": False} if given else commit()


def merged(saved: dict[str, Any], stage: str, found: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """The results with those of a stage in place of its older ones.

    `benchmarks` and `datetime` are as pytest-benchmark saves them, so that benchmarks.report reads
    the file; numbers and proofs of another commit or GPU are not kept.
    """
    same = (saved.get("commit_info"), _hardware(saved)) == (plan.commit, plan.machine.get("gpu"))
    kept = saved if same else {}
    stages = {**kept.get("stages", {}), stage: found}
    return {
        "machine_info": {**plan.machine, "size": plan.size},
        "commit_info": plan.commit,
        "datetime": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "benchmarks": found.pop("benchmarks", kept.get("benchmarks", [])),
        "verified": found.pop("verified", kept.get("verified", {})),
        "stages": stages,
    }


def _hardware(saved: dict[str, Any]) -> str | None:
    return saved.get("machine_info", {}).get("gpu")


def write(saved: dict[str, Any], folder: Path) -> None:
    """gpu.json, gpu.md, and verified.json if there is anything in it."""
    (folder / "gpu.json").write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")
    (folder / "gpu.md").write_text(markdown(saved), encoding="utf-8")
    if saved["verified"]:
        text = json.dumps(saved["verified"], indent=2, sort_keys=True)
        (folder / "verified.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
