"""`python -m benchmarks.report [FILE.json ...]`: saved runs to docs/performance.md and its plots.

Every number comes from a file of `pytest benchmarks/ --benchmark-json=FILE`; without arguments,
from all in benchmarks/results/. A file is a section; what is to be said about its targets stands in
a file beside it whose name ends in -notes.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
OUTPUT = ROOT / "docs" / "performance.md"
SYSTEM = ("cpt", "contrast", "encode")  # titles of the end-to-end works begin with one of these
PREAMBLE = """# Performance

Made by `python -m benchmarks.report` from runs of `pytest benchmarks/`; no number in a table is
written by hand. Each case was checked against float64 before it was timed. Times are medians; *x*
is a peer's time divided by ours, in the same run. GFLOP/s count the operations the result needs (an
attention backward is 2.5 forwards, by convention), GB/s the bytes that forward and backward must
each read and write at least. *Limit* is the fraction of the roofline: of the processor's
multiply-adds (of its bfloat16 dot product for bfloat16; of torch's matrix product on a GPU) or of
copied bytes, whichever is less. *Extra* is the peak memory of a call beyond its inputs and results.
*System* is the share of the processors' time that the operating system took: mostly it clears the
pages of fresh results, which is no work of the kernel. Times on a GPU are of its own clock, with a
cold cache, and leave out the gaps between launches.
"""
BEST = "best"  # of harness.py, which needs the native module


@dataclass(frozen=True)
class Case:
    """A timed case: the group it is compared in, its median in seconds, what was saved with it."""

    group: str
    median: float
    rounds: int
    info: dict[str, Any]

    @property
    def runner(self) -> str:
        return self.info["runner"]

    @property
    def op(self) -> str:
        return self.info["title"].split()[0]


class Run:
    """A saved run.

    Args:
        name: of the file; plots are named after it.
        saved: what pytest-benchmark wrote.
        notes: Markdown about the targets.

    Raises:
        ValueError: a file of something else than these benchmarks.
    """

    def __init__(self, name: str, saved: dict[str, Any], notes: str = "") -> None:
        self.name, self.notes = name, notes.strip()
        self.machine, self.commit = saved["machine_info"], saved["commit_info"]
        self.date = saved["datetime"][:10]
        self.stages = saved.get("stages", {})  # of benchmarks.gpu
        self.cases = []
        for case in saved["benchmarks"]:
            info, stats = case["extra_info"], case["stats"]
            if "runner" not in info:
                raise ValueError(f"{name}: {case['fullname']} is no case of these benchmarks")
            self.cases.append(Case(case["group"], stats["median"], stats["rounds"], info))
        if not self.cases:
            raise ValueError(f"{name}: holds no cases")

    @cached_property
    def groups(self) -> dict[str, list[Case]]:
        groups: dict[str, list[Case]] = {}
        for case in self.cases:
            groups.setdefault(case.group, []).append(case)
        return groups

    def ours(self) -> list[Case]:
        return [case for case in self.cases if case.info["ours"]]

    def peers(self, case: Case) -> list[Case]:
        return [other for other in self.groups[case.group] if not other.info["ours"]]

    def rival(self, case: Case, over: str) -> Case | None:
        """The peer that a target speaks of: by name, BEST, or "" for the yardstick; None if it did
        not run."""
        peers = self.peers(case)
        if over == BEST:
            return min(peers, key=lambda peer: peer.median, default=None)
        fits = (p for p in peers if (p.runner == over if over else p.info["yardstick"]))
        return next(fits, None)


def read(path: Path) -> Run:
    notes = path.with_name(f"{path.stem}-notes.md")
    said = notes.read_text(encoding="utf-8") if notes.exists() else ""
    return Run(path.stem, json.loads(path.read_text(encoding="utf-8")), said)


def section(run: Run, plots: Sequence[str]) -> str:
    """Everything about one run, in Markdown. `plots`: paths from the document."""
    parts = [f"## {machine_name(run)}", provenance(run), limits(run), targets(run), run.notes]
    parts += [f"![{Path(plot).stem}]({plot})" for plot in plots]
    ops = dict.fromkeys(case.op for case in run.ours() if case.op not in SYSTEM)
    parts += [op_table(run, op) for op in ops]
    parts += [system_table(run), profiles(run), failures(run)]
    return "\n\n".join(part for part in parts if part) + "\n"


def machine_name(run: Run) -> str:
    if any(case.info["device"] != "cpu" for case in run.cases):
        return run.machine.get("gpu", "unnamed GPU")
    cpu = run.machine.get("cpu", {})
    brand = cpu.get("brand_raw", run.machine.get("machine", "some CPU"))
    threads = run.machine["threads"]
    return f"{brand}, {threads} thread{'s' * (threads != 1)}"


def provenance(run: Run) -> str:
    changed = " with uncommitted changes" if run.commit.get("dirty") else ""
    small = (
        "; sizes are tiny, so these numbers say nothing" if run.machine["size"] != "full" else ""
    )
    fewest = min(case.rounds for case in run.cases)
    driver = f", driver {run.machine['driver']}" if "driver" in run.machine else ""
    return (
        f"moca-fast {run.machine['moca_fast']} at commit {run.commit['id'][:10]}{changed}, torch "
        f"{run.machine['torch']}{driver}, Python {run.machine['python_version']}, instruction set "
        f"{run.cases[0].info['isa']}, {run.date}; at least {fewest} rounds a case{small}."
    )


def limits(run: Run) -> str:
    """The machine's own rates, measured in this run."""
    shown: dict[str, str] = {}
    for case in run.cases:
        info = case.info
        if info["device"] == "cpu" and info["threads"] != run.machine["threads"]:
            continue
        shown["multiply-add float32, GFLOP/s"] = number(info["limit_multiply_add"])
        shown["dot product bfloat16, GFLOP/s"] = number(info["limit_dot_product"])
        shown[f"torch GEMM {info['dtype']}, GFLOP/s"] = number(info["limit_gemm"])
        shown["copy, GB/s"] = number(info["limit_copy"])
    return table(["the machine's limit", "measured"], [row for row in shown.items() if row[1]])


def targets(run: Run) -> str:
    rows = []
    for case in run.ours():
        memory = None
        if case.info["avoided_bytes"]:
            memory = case.info["extra_bytes"] / case.info["avoided_bytes"]
        for target in case.info["targets"]:
            peer = run.rival(case, target["over"])
            rows.append([
                case.group,
                case.runner,
                peer.runner if peer else target["over"],
                judged(peer.median / case.median if peer else None, target["speedup"], "x"),
                judged(memory, target["memory"], "%", at_most=True),
                judged(case.info["fraction_of_limit"], target["limit"], "%"),
                amount(case.info.get("system_share"), "%"),
                amount(peer.info.get("system_share") if peer else None, "%"),
            ])  # fmt: skip
    heads = ["work", "", "peer", "times as fast", "extra memory of the array avoided", "limit"]
    heads += ["system", "peer's system"]
    return "### Targets\n\n" + table(heads, rows) if rows else ""


def judged(value: float | None, target: float | None, unit: str, at_most: bool = False) -> str:
    """A value beside its target; empty where there is no target."""
    if target is None:
        return ""
    if value is None:
        return f"not measured (target {amount(target, unit)})"
    reached = value <= target if at_most else value >= target
    sign, verdict = ("≤" if at_most else "≥"), ("reached" if reached else "**missed**")
    return f"{amount(value, unit)} ({sign} {amount(target, unit)} {verdict})"


def op_table(run: Run, op: str) -> str:
    """A row a work, with every peer's ratio; attention has its tile efficiency too."""
    cases = [case for case in run.ours() if case.op == op]
    peers = list(dict.fromkeys(p.runner for case in cases for p in run.peers(case)))
    tiled = any("tile_efficiency" in case.info for case in cases)
    heads = ["work", "", "ms", *(f"x {peer}" for peer in peers), "GFLOP/s", "GB/s", "limit"]
    heads += ["extra MB", *(f"extra MB {peer}" for peer in peers)] + ["tiles"] * tiled
    rows = []
    for case in cases:
        others = {peer.runner: peer for peer in run.peers(case)}
        info = case.info
        row = [case.group.removeprefix(op).strip(), case.runner, number(1e3 * case.median)]
        row += [amount(others[p].median / case.median, "x") if p in others else "" for p in peers]
        row += [number(info["gflops"]), number(info["gbytes"])]
        row += [amount(info["fraction_of_limit"], "%"), number(info["extra_bytes"] / 1e6)]
        row += [number(others[p].info["extra_bytes"] / 1e6) if p in others else "" for p in peers]
        row += [amount(info.get("tile_efficiency"), "%")] * tiled
        rows.append(row)
    return f"### {op}\n\n" + table(heads, rows)


def system_table(run: Run) -> str:
    cases = [case for case in run.ours() if case.op in SYSTEM]
    peers = list(dict.fromkeys(p.runner for case in cases for p in run.peers(case)))
    rows = []
    for case in cases:
        others = {peer.runner: peer for peer in run.peers(case)}
        row = [case.group, case.runner, number(case.info["tokens_per_second"])]
        for peer in peers:
            other = others.get(peer)
            row += [number(other.info["tokens_per_second"]) if other else ""]
            row += [amount(other.median / case.median, "x") if other else ""]
        rows.append([*row, amount(case.info["fraction_of_limit"], "%")])
    heads = ["work", "", "tokens/s"]
    heads += [head for peer in peers for head in (f"{peer}, tokens/s", f"x {peer}")]
    return "### The whole system\n\n" + table([*heads, "limit"], rows) if rows else ""


def profiles(run: Run) -> str:
    """Where the time of the end-to-end cases goes."""
    parts = []
    for case in run.ours():
        if "profile" in case.info:
            shares = ", ".join(
                f"`{n}` {amount(share, '%')}" for n, share, _ in case.info["profile"]
            )
            parts.append(f"- {case.group}: {shares}")
    return "Where the time goes (torch.profiler, own time):\n\n" + "\n".join(parts) if parts else ""


def failures(run: Run) -> str:
    """Cases that were wrong, ran out of memory or did not run at all, with the reason."""
    problems = run.stages.get("bench", {}).get("problems", [])
    lines = [f"- `{problem['name']}`: {problem['message']}" for problem in problems]
    return "Without a time:\n\n" + "\n".join(lines) if lines else ""


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; columns that are empty throughout are left out."""
    rows = [list(row) for row in rows]
    keep = [i for i in range(len(heads)) if any(row[i] for row in rows)]
    lines = [[heads[i] for i in keep], ["---"] * len(keep)]
    lines += [[row[i] for i in keep] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None) -> str:
    """Three digits, and no exponent; empty for nothing."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def amount(value: float | None, unit: str) -> str:
    """A ratio (x) or a fraction in percent (%)."""
    if value is None:
        return ""
    return f"{value:.2f}x" if unit == "x" else f"{100 * value:.3g} %"


def write(runs: Sequence[Run], output: Path) -> None:
    """The document, and its plots in a folder beside it that has its name."""
    from benchmarks.plots import roofline, scaling

    folder = output.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    parts = [PREAMBLE]
    for run in runs:
        drawn = {"roofline": roofline(run), "scaling": scaling(run)}
        plots = []
        for name, svg in drawn.items():
            if svg:
                path = folder / f"{run.name}-{name}.svg"
                path.write_text(svg, encoding="utf-8")
                plots.append(f"{folder.name}/{path.name}")
        parts.append(section(run, plots))
    output.write_text("\n".join(parts), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="saved runs")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the document (%(default)s)")
    options = parser.parse_args(arguments)
    files = options.files or sorted(RESULTS.glob("*.json"))
    if not files:
        parser.error(f"no saved runs in {RESULTS}; make one with `make bench`")
    write([read(path) for path in files], options.output)
    print(options.output)


if __name__ == "__main__":
    main()
