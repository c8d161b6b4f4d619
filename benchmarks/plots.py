"""The report's plots, as SVG: the roofline, and how rates grow with tokens, documents, threads."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from benchmarks.report import Case, Run

# Text stays text, and the same data gives the same file.
STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "moca-fast", "font.size": 9}
MARKERS = "osD^vP*X"


def roofline(run: Run) -> str | None:
    """GFLOP/s over operations a byte, ours and the peers', under the machine's limits."""
    cases = [case for case in run.cases if case.info["traffic"] and case.info["gflops"]]
    cases = [case for case in cases if not case.info["axis"]]
    if not cases:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(7.5, 4.2))
        axes = figure.subplots()
        intensity = np.geomspace(0.05, 2 * max(map(_intensity, cases)), 200)
        for color, dtype in enumerate(dict.fromkeys(case.info["dtype"] for case in cases)):
            some = next(case.info for case in cases if case.info["dtype"] == dtype)
            roof = np.minimum(some["limit_peak"], intensity * some["limit_copy"])
            axes.plot(intensity, roof, color=f"C{color}", label=f"limit, {dtype}")
            axes.axhline(some["limit_gemm"], color=f"C{color}", linewidth=0.7, linestyle=":")
            for case in (case for case in cases if case.info["dtype"] == dtype):
                _mark(axes, case, f"C{color}", cases)
        ops = list(dict.fromkeys(case.op for case in cases))
        for place, op in enumerate(ops):
            axes.plot([], [], color="grey", linestyle="", marker=MARKERS[place], label=op)
        axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="GFLOP/s")
        axes.set_title("filled: ours, hollow: peers; dotted: torch's GEMM", fontsize=9)
        axes.legend(fontsize=7, loc="lower right")
        return _svg(figure)


def _mark(axes: Axes, case: Case, color: str, cases: list[Case]) -> None:
    marker = MARKERS[list(dict.fromkeys(other.op for other in cases)).index(case.op)]
    face = color if case.info["ours"] else "none"
    axes.plot(
        _intensity(case),
        case.info["gflops"],
        marker=marker,
        color=color,
        markerfacecolor=face,
        markersize=5,
    )


def _intensity(case: Case) -> float:
    return case.info["flops"] / case.info["traffic"]


def scaling(run: Run) -> str | None:
    """GFLOP/s of every runner over what grows."""
    cases = [case for case in run.cases if case.info["axis"] and case.info["gflops"]]
    names = list(dict.fromkeys(case.info["axis"][0] for case in cases))
    if not cases:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(3 * len(names), 3))
        panels = figure.subplots(1, len(names), squeeze=False)
        for axes, name in zip(panels[0], names, strict=True):
            for runner in dict.fromkeys(case.runner for case in cases):
                points = sorted(
                    (case.info["axis"][1], case.info["gflops"])
                    for case in cases
                    if case.runner == runner and case.info["axis"][0] == name
                )
                axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=runner)
            axes.set(xlabel=name, ylim=(0, None))
            axes.set_xscale("log", base=2)
        panels[0][0].set_ylabel("GFLOP/s")
        panels[0][0].legend(fontsize=7)
        figure.suptitle("attention, forward, bfloat16, 8 heads of 64", fontsize=9)
        return _svg(figure)


def _svg(figure: Figure) -> str:
    figure.tight_layout()
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
