"""The Markdown of `python -m benchmarks.gpu`: what ran, what failed, what was skipped and why, what
is proven, the tiles that were best; then the numbers, as in docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks import report

MOST_PROBLEMS = 60  # told one by one
MOST_TEXT = 300  # characters of a message in a table


def markdown(saved: Mapping[str, Any]) -> str:
    machine = saved["machine_info"]
    parts = [f"# {machine.get('gpu', 'No GPU: the stages tried out')}", provenance(saved)]
    parts += [stages(saved), problems(saved), skipped(saved), proven(saved), tuned(saved)]
    if saved["benchmarks"]:
        parts.append(report.section(report.Run("gpu", dict(saved)), []))
    return "\n\n".join(part for part in parts if part) + "\n"


def provenance(saved: Mapping[str, Any]) -> str:
    machine, commit = saved["machine_info"], saved["commit_info"]
    changed = " with uncommitted changes" if commit["dirty"] else ""
    named = {
        "architecture": "", "driver": "driver", "cuda": "CUDA", "torch": "torch",
        "triton": "Triton", "transformers": "transformers", "python_version": "Python",
    }  # fmt: skip
    versions = [f"{word} {machine[key]}".strip() for key, word in named.items() if machine.get(key)]
    tiny = "" if machine["size"] == "full" else " Sizes are tiny: these numbers say nothing."
    return (
        f"Commit {commit['id'][:10]}{changed}; {', '.join(versions)}; {saved['datetime'][:10]}."
        f"{tiny} Made by `python -m benchmarks.gpu`."
    )


def stages(saved: Mapping[str, Any]) -> str:
    rows = [
        [name, "ok" if found["right"] else "**wrong**", f"{found['seconds']:.0f}", found["summary"]]
        for name, found in saved["stages"].items()
    ]
    return report.table(["stage", "", "seconds", "found"], rows)


def problems(saved: Mapping[str, Any]) -> str:
    rows = [
        [stage, f"`{problem['name']}`", _cell(problem["message"])]
        for stage, found in saved["stages"].items()
        for problem in found["problems"]
    ]
    if not rows:
        return ""
    more = len(rows) - MOST_PROBLEMS
    rest = f"\n\n{more} more are in gpu.json." if more > 0 else ""
    shown = report.table(["stage", "what", "why"], rows[:MOST_PROBLEMS])
    return f"## Problems\n\nTracebacks are in gpu.json.\n\n{shown}{rest}"


def skipped(saved: Mapping[str, Any]) -> str:
    rows = [
        [stage, _cell(reason), str(count)]
        for stage, found in saved["stages"].items()
        for reason, count in found["skipped"].items()
        if count
    ]
    return "## Skipped\n\n" + report.table(["stage", "why", "how many"], rows) if rows else ""


def proven(saved: Mapping[str, Any]) -> str:
    rows = [
        [op, backend, architecture]
        for op, backends in saved["verified"].items()
        for backend, architectures in backends.items()
        for architecture in architectures
    ]
    if not rows:
        return ""
    return (
        "## Proven\n\nAll tests of these passed; `python -m moca_fast --record verified.json` lets "
        '"auto" take them.\n\n' + report.table(["op", "backend", "architecture"], rows)
    )


def tuned(saved: Mapping[str, Any]) -> str:
    results = saved["stages"].get("tune", {}).get("results", [])
    parts = []
    for result in results:
        rows = [
            [trial["tiles"], report.number(1e3 * trial["seconds"]), trial["used"]]
            for trial in result["tried"]
        ]
        heads = ["rows, columns, warps, stages", "ms", ""]
        parts.append(f"### {result['kernel']}, {result['work']}\n\n{report.table(heads, rows)}")
    return "## Tiles of attention\n\n" + "\n\n".join(parts) if parts else ""


def _cell(text: str) -> str:
    """Fit for a table."""
    line = " ".join(text.split()).replace("|", "\\|")
    return line if len(line) <= MOST_TEXT else f"{line[:MOST_TEXT]} ..."
