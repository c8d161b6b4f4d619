"""The stages of `python -m benchmarks.gpu`. Each returns what it found, ready to be saved: `right`
(bool), `summary` (a line), `problems` and `skipped`, and what is its own.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import jobs
from benchmarks.jobs import Done, Job
from benchmarks.machine import ROOT
from benchmarks.outcomes import (
    FAILED,
    OUT_OF_TIME,
    PASSED,
    SKIPPED,
    STARTED,
    WAITING,
    Outcome,
    read,
)

GPU_BACKENDS = ("cuda", "triton")
MOST_PROCESSES = 12  # that share the GPU while tests run
GRACE = 20.0  # seconds that a test or a case may take beyond its deadline
# Modules of benchmarks in the order in which they run, and their shares of the time.
BENCHES = {
    "attention": 9,
    "linear_cross_entropy": 3,
    "info_nce": 3,
    "cpt_step": 7,
    "masked_patch_mse": 2,
    "pool": 2,
    "mrope": 2,
    "patchify": 1,
}
# compute-sanitizer's exit status where it found something, and what it prints on machines (such as
# gVisor's) whose GPU it cannot reach.
FOUND = 99
NOT_REACHED = ("Device not supported", "before first instrumented API call")
VERSIONS = ("gpu", "driver", "torch", "triton", "cuda")  # kept with what is proven
STOPPED = "still ran when time was up"
LIMIT = 100  # seconds of a test on a GPU, with all that it compiles: a kernel may never end
CRASHED = f"took its process down: it crashed, or took more than {LIMIT} s"
TAIL = 3000  # characters of a failed command's output


@dataclass
class Plan:
    """What a stage is given.

    Args:
        output: folder of the results.
        device: "cuda", or "cpu" to try the stage out.
        deadline: seconds since 1970 when it must have ended.
        select: only tests and cases that match this expression (pytest's -k).
        machine, commit: of benchmarks.machine.
    """

    output: Path
    device: str
    deadline: float
    select: str
    machine: dict[str, Any]
    commit: dict[str, Any]

    @property
    def size(self) -> str:
        return "full" if self.device == "cuda" else "tiny"

    @property
    def log(self) -> Path:
        return self.output / "gpu.log"

    def seconds_left(self) -> float:
        return max(0.0, self.deadline - time.time())

    def environment(self) -> dict[str, str]:
        """Of every process: the sources of this tree, and the programs beside this Python."""
        roots = [str(ROOT / folder) for folder in ("", "python", "kernels")]
        path = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
        return {
            "PYTHONPATH": os.pathsep.join(filter(None, [*roots, os.environ.get("PYTHONPATH")])),
            "PATH": os.pathsep.join(path),
            "PYTHONUNBUFFERED": "1",
            "TRITON_INTERPRET": "0" if self.device == "cuda" else "1",
            "TOKENIZERS_PARALLELISM": "false",
        }

    def pytest(self, name: str, outcomes: Path, deadline: float, *arguments: str) -> Job:
        """pytest with results in a file, going on after a crash."""
        command = [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
            "-p", "benchmarks.outcomes", f"--outcomes={outcomes}", f"--deadline={deadline}",
            *arguments,
        ]  # fmt: skip
        if self.select:
            command += ["-k", self.select]
        return Job(name, command, self.environment(), resumes=True)

    def run(self, work: Sequence[Job], parallel: int, deadline: float) -> dict[str, Done]:
        return jobs.run(work, parallel=parallel, deadline=deadline, log=self.log, folder=ROOT)


def build(plan: Plan) -> dict[str, Any]:
    """The package, with native kernels for this machine's GPU, in this tree."""
    command = [
        sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps",
        "--no-build-isolation", "--editable", ".",
    ]  # fmt: skip
    name = "pip install"
    done = plan.run([Job(name, command, build_environment(plan))], 1, plan.deadline)[name]
    right = done.status == 0
    how = "ran out of time" if done.status is None else f"exit status {done.status}"
    summary = "built and installed" if right else f"pip install: {how}"
    problems = [] if right else [_problem("pip install", summary, done.output)]
    report = plan.run(
        [Job("moca_fast", [sys.executable, "-m", "moca_fast"], plan.environment())],
        1,
        time.time() + GRACE,
    )["moca_fast"]
    return _found(right, summary, problems, {}, report=report.output)


def build_environment(plan: Plan) -> dict[str, str]:
    """What setup.py reads: CUDA where there is an nvcc, for the GPU that torch sees."""
    if plan.device == "cpu":
        return {**plan.environment(), "MOCA_CUDA": "0"}
    number = plan.machine["architecture"].removeprefix("sm_")
    arch = "90a" if number == "90" else number  # Hopper's own instructions
    archs = os.environ.get("MOCA_CUDA_ARCHS") or arch
    return {**plan.environment(), "MOCA_CUDA": "", "MOCA_CUDA_ARCHS": archs}


def test(plan: Plan) -> dict[str, Any]:
    """All tests marked gpu, and a small call of every kernel under compute-sanitizer."""
    ends = plan.deadline - GRACE
    shards = max(1, min(MOST_PROCESSES, _cores() - 2))
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{shard}.jsonl" for shard in range(shards)]
        limit = LIMIT if plan.device == "cuda" else 0  # Triton's interpreter is slow
        shared = ["-m", "gpu", "--continue-on-collection-errors", f"--limit={limit}"]
        shared += gpu_test_files()
        work = [
            plan.pytest(f"test {i}", file, ends, f"--shard={i}/{shards}", *shared)
            for i, file in enumerate(files)
        ]
        threads = {"OMP_NUM_THREADS": str(max(1, _cores() // shards))}
        work = [replace(job, environment={**job.environment, **threads}) for job in work]
        sanitizer = find_sanitizer() if plan.device == "cuda" else None
        checks = memory_checks(plan, sanitizer) if sanitizer else []
        done = plan.run([*work, *checks], _cores(), plan.deadline)
        each = [outcomes_of(file, done[job.name]) for file, job in zip(files, work, strict=True)]
    outcomes = list({outcome.id: outcome for some in each for outcome in some}.values())
    memory = {job.name: memory_verdict(done[job.name]) for job in checks}
    wrong_memory = {name: text for name, text in memory.items() if text.startswith("found")}
    problems = [_failure(outcome) for outcome in outcomes if _failed(outcome)]
    problems += [_problem(name, text, done[name].output) for name, text in wrong_memory.items()]
    skipped = skips(outcomes)
    for name, text in memory.items():
        if text != "clean" and name not in wrong_memory:
            skipped[f"{name}: {text}"] += 1
    if sanitizer is None:
        skipped["compute-sanitizer is not on this machine"] = 1
    passed = sum(outcome.outcome == PASSED for outcome in outcomes)
    right = passed > 0 and not problems
    clean = sum(text == "clean" for text in memory.values())
    summary = (
        f"{passed} tests passed, {len(problems)} problems, {sum(skipped.values())} skipped; "
        f"memory clean in {clean} of {len(memory)} kernels looked at"
    )
    verified = proven(outcomes, wrong_memory, plan) if plan.device == "cuda" else {}
    own = {"passed": passed, "memory": memory, "verified": verified}
    return _found(right, summary, problems, skipped, **own)


def gpu_test_files() -> list[str]:
    """Files with tests marked gpu: the others may import what is not installed."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    marked = [f for f in files if any(m in f.read_text() for m in ("GPU_BACKENDS", "mark.gpu"))]
    return [str(file.relative_to(ROOT)) for file in marked]


def find_sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )


def memory_checks(plan: Plan, sanitizer: str) -> list[Job]:
    """A job for each op and backend: a small call under memcheck."""
    # Each tensor has its own allocation, so that an access beyond its end is seen.
    environment = {**plan.environment(), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Job(
            f"memcheck {op} {backend}",
            [
                sanitizer, "--tool", "memcheck", f"--error-exitcode={FOUND}",
                sys.executable, "-m", "benchmarks.memory_check", op, backend,
            ],
            environment,
        )
        for op in op_names()
        for backend in GPU_BACKENDS
    ]  # fmt: skip


def memory_verdict(done: Done) -> str:
    """ "clean", "found ..." or why nothing was looked at."""
    if done.status is None:
        return OUT_OF_TIME
    lines = done.output.splitlines()
    if "checked 0 calls" in lines:
        return next(line for line in lines if line.startswith("not checked: "))
    if done.status == 0:
        return "clean"
    if any(text in done.output for text in NOT_REACHED):
        return "compute-sanitizer does not reach this GPU"
    found = [line for line in lines if "ERROR SUMMARY" in line]
    if done.status == FOUND and found:
        return f"found {found[-1].partition('SUMMARY: ')[2]}"
    return f"found exit status {done.status}"


def op_names() -> list[str]:
    return sorted(path.parent.name for path in (ROOT / "moca_fast" / "ops").glob("*/op.py"))


def op_of(test: str) -> str | None:
    """The op that a test is about, by the name of its file."""
    stem = Path(test.partition("::")[0]).stem.removeprefix("test_")
    fitting = [op for op in op_names() if stem == op or stem.startswith(f"{op}_")]
    return max(fitting, key=len, default=None)


def proven(outcomes: Iterable[Outcome], wrong_memory: Iterable[str], plan: Plan) -> dict[str, Any]:
    """The entries of moca_fast/verified.json: op x backend x architecture whose tests all passed.

    A test that names no backend speaks for all of its op's.
    """
    passed, doubtful = set(), set()
    for outcome in outcomes:
        op = op_of(outcome.id)
        if op is None:
            continue
        for backend in [outcome.backend] if outcome.backend else GPU_BACKENDS:
            if outcome.outcome == PASSED and outcome.backend:
                passed.add((op, backend))
            elif _failed(outcome) or outcome.message == OUT_OF_TIME:
                doubtful.add((op, backend))
    for name in wrong_memory:
        _, op, backend = name.split()
        doubtful.add((op, backend))
    machine = plan.machine
    entry = {
        "date": datetime.date.today().isoformat(),
        **{name: str(machine.get(name, "")) for name in VERSIONS},
        "commit": str(plan.commit["id"]),
    }
    table: dict[str, Any] = {}
    for op, backend in sorted(passed - doubtful):
        table.setdefault(op, {})[backend] = {machine["architecture"]: entry}
    return table


def bench(plan: Plan) -> dict[str, Any]:
    """Every case of a GPU beside its peers, a process for each module, one after another."""
    present = {name: share for name, share in BENCHES.items() if _bench_file(name).exists()}
    outcomes: list[Outcome] = []
    late: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for place, (name, share) in enumerate(present.items()):
            rest = sum(list(present.values())[place:])
            deadline = time.time() + (plan.seconds_left() - GRACE) * share / rest
            file = Path(folder) / f"{name}.jsonl"
            job = plan.pytest(
                f"bench {name}", file, deadline, str(_bench_file(name)), f"--device={plan.device}",
                f"--size={plan.size}", "--peers", "--benchmark-columns=median,rounds",
                *([] if plan.device == "cuda" else ["--backend=triton"]),
            )  # fmt: skip
            done = plan.run([job], 1, min(deadline + GRACE, plan.deadline))[job.name]
            late[f"{job.name}: {STOPPED}"] += done.status is None
            outcomes += outcomes_of(file, done)
    cases = [outcome.case for outcome in outcomes if outcome.case]
    problems = [_failure(o) for o in outcomes if _failed(o) and o.message != STOPPED]  # in `late`
    skipped = skips(outcomes) + late
    ours_wrong = [p for p in problems if "moca_fast[" in p["name"]]
    summary = (
        f"{len(cases)} cases measured, {len(problems)} problems ({len(ours_wrong)} of ours), "
        f"{sum(skipped.values())} skipped"
    )
    return _found(bool(cases) and not ours_wrong, summary, problems, skipped, benchmarks=cases)


def tune(plan: Plan) -> dict[str, Any]:
    """The best tiles of attention for this GPU."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tune.json"
        command = [
            sys.executable, "-m", "benchmarks.tune_attention", f"--output={file}",
            f"--device={plan.device}", f"--deadline={plan.deadline - GRACE}",
        ]  # fmt: skip
        done = plan.run([Job("tune", command, plan.environment())], 1, plan.deadline)["tune"]
        results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    right = done.status == 0 and bool(results)
    problems = [] if right else [_problem("tune", f"exit status {done.status}", done.output)]
    tried = sum(len(result["tried"]) for result in results)
    summary = f"{tried} variants of attention's kernels timed"
    return _found(right, summary, problems, {}, results=results)


def _bench_file(name: str) -> Path:
    return ROOT / "benchmarks" / f"bench_{name}.py"


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _failed(outcome: Outcome) -> bool:
    return outcome.outcome in (FAILED, STARTED)


def _failure(outcome: Outcome) -> dict[str, str]:
    return _problem(outcome.id, outcome.message, outcome.detail)


def outcomes_of(file: Path, done: Done) -> list[Outcome]:
    """What became of the tests of a job, of those too that did not come to their end."""
    found = list(read(file).values())
    for outcome in found:
        if outcome.outcome == WAITING:
            outcome.outcome, outcome.message = SKIPPED, OUT_OF_TIME
        elif outcome.outcome == STARTED:
            outcome.message = STOPPED if done.status is None else CRASHED
    return found


def skips(outcomes: Iterable[Outcome]) -> Counter[str]:
    """How many were skipped, by the reason."""
    return Counter(outcome.message for outcome in outcomes if outcome.outcome == SKIPPED)


def _problem(name: str, message: str, detail: str) -> dict[str, str]:
    return {"name": name, "message": message, "detail": detail[-TAIL:]}


def _found(
    right: bool,
    summary: str,
    problems: Sequence[Mapping[str, str]],
    skipped: Mapping[str, int],
    **own: Any,
) -> dict[str, Any]:
    return {
        "right": right,
        "summary": summary,
        "problems": list(problems),
        "skipped": dict(skipped),
        **own,
    }
