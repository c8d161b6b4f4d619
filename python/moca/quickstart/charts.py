"""The report's charts: curves of a log, as inline SVG, and a bar of shares.

Colours are variables of the page's style, so that charts follow light and dark mode.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from moca.quickstart.page import duration, esc, missing, number

PALETTE = 8

_WIDTH, _HEIGHT = 280, 180
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 10, 34
# Points drawn of one curve; more cannot be told apart at the width of a chart.
_POINTS = 600
# Share of a curve that its smoothing looks at.
_SMOOTHING = 0.08


def curve(
    title: str,
    steps: Sequence[float],
    values: Sequence[float],
    *,
    tone: int,
    digits: int = 3,
    smoothing: bool = True,
) -> str:
    """A figure with a value over steps: the raw line, faint, and a smoothed one.

    Args:
        title: what the value is, with its unit.
        steps, values: of equal length; where a value is not finite the line has a gap and a mark.
        tone: number of the colour.
        digits: after the point, in the caption.
        smoothing: False for a value that has no noise: one line, as it is.
    """
    x, y = np.asarray(steps, np.float64), np.asarray(values, np.float64)
    x, y = x[np.isfinite(x)], y[np.isfinite(x)]
    finite = np.isfinite(y)
    if not finite.any():
        what = "no values were logged" if not len(y) else f"none of {len(y)} values is finite"
        return _figure(title, what, missing(f"{esc(title)}: {what}."))
    smooth = smoothed(y[finite]) if smoothing else y[finite]
    low, high = _limits(y[finite], smooth)
    left, right = float(x.min()), float(x.max())
    to_x = _scale(left, right, _LEFT, _WIDTH - _RIGHT)
    to_y = _scale(low, high, _HEIGHT - _BOTTOM, _TOP)
    inner = _line("smooth", to_x(x[finite]), to_y(smooth))
    if smoothing:
        inner = _line("raw", to_x(x), to_y(np.where(finite, y, np.nan))) + inner
    end = to_x(x[finite])[-1], to_y(smooth)[-1]
    marks = "".join(
        f'<text class="broken" x="{place:.1f}" y="{_TOP + 12}" text-anchor="middle">×</text>'
        for place in to_x(x[~finite])[:_POINTS]
    )
    # A nested svg cuts off what is outside the plot.
    plot = (
        f'<svg x="{_LEFT}" y="{_TOP}" width="{_WIDTH - _RIGHT - _LEFT}" '
        f'height="{_HEIGHT - _BOTTOM - _TOP}" viewBox="{_LEFT} {_TOP} '
        f'{_WIDTH - _RIGHT - _LEFT} {_HEIGHT - _BOTTOM - _TOP}">{inner}</svg>'
        f'<circle class="dot" cx="{end[0]:.1f}" cy="{end[1]:.1f}" r="3"/>{marks}'
    )
    shown = [number(value, digits) for value in (smooth[0], smooth.max(), smooth[-1])]
    note = f"{shown[0]} → {shown[2]}" if smoothing else f"at most {shown[1]}"
    broken = int((~finite).sum())
    if broken:
        note += f"; {broken} not finite (×)"
    label = f"{title} over steps {left:.0f} to {right:.0f}: {note}"
    axes = _axes((left, right), (low, high), to_x, to_y)
    svg = (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{esc(label)}" '
        f'style="--line: var(--c{tone % PALETTE})">{axes}{plot}</svg>'
    )
    return _figure(title, note, svg)


def smoothed(values: np.ndarray) -> np.ndarray:
    """(n,) weighted means of the neighbours of each value; the weights fall off linearly."""
    reach = min(len(values) - 1, max(1, round(len(values) * _SMOOTHING)))
    weights = np.concatenate([np.arange(1, reach + 2), np.arange(reach, 0, -1)]).astype(float)
    total = np.convolve(values, weights)[reach : reach + len(values)]
    share = np.convolve(np.ones(len(values)), weights)[reach : reach + len(values)]
    return total / share


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers from low to high."""
    span = high - low
    if not (math.isfinite(span) and span > 0):
        return [low]
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_text(value: float) -> str:
    """A tick's number, short."""
    size = abs(value)
    if 0 < size < 0.01:
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-").replace("-", "−")
    unit, name = next(u for u in ((1e9, "G"), (1e6, "M"), (1e3, "k"), (0.0, "")) if size >= u[0])
    return f"{value / (unit or 1):.4g}{name}".replace("-", "−")


def _figure(title: str, note: str, body: str) -> str:
    caption = f"<figcaption><b>{esc(title)}</b> {esc(note)}</figcaption>"
    return f'<figure class="chart">{caption}{body}</figure>\n'


def _limits(raw: np.ndarray, smooth: np.ndarray) -> tuple[float, float]:
    """What the vertical axis spans: all of the smoothed line, the raw one without outliers."""
    low, high = np.percentile(raw, [1, 99]) if len(raw) >= 50 else (raw.min(), raw.max())
    low, high = min(low, smooth.min()), max(high, smooth.max())
    if 0 < low < 0.35 * high:
        low = 0.0
    margin = 0.04 * (high - low) or 0.05 * abs(high) or 1.0
    return float(low - margin * (low != 0)), float(high + margin)


def _scale(low: float, high: float, start: float, end: float):
    """The linear map of low..high to start..end; the middle when both are one."""
    if high <= low:
        return lambda values: np.full(np.shape(values), (start + end) / 2)
    return lambda values: start + (np.asarray(values) - low) / (high - low) * (end - start)


def _line(name: str, x: np.ndarray, y: np.ndarray) -> str:
    """A path through points, broken where y is not finite."""
    stride = max(1, math.ceil(len(x) / _POINTS))
    keep = np.arange(len(x)) % stride == 0
    keep[-1] = True
    parts, pen = [], "M"
    for place, value in zip(x[keep], y[keep], strict=True):
        if not math.isfinite(value):
            pen = "M"
            continue
        parts.append(f"{pen}{place:.1f} {value:.1f}")
        pen = "L"
    return f'<path class="{name}" d="{"".join(parts)}"/>' if parts else ""


def _axes(x_range: tuple[float, float], y_range: tuple[float, float], to_x, to_y) -> str:
    floor = _HEIGHT - _BOTTOM
    parts = []
    for value in nice_ticks(*y_range):
        y = float(to_y(value))
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick_text(value)}</text>'
        )
    for value in nice_ticks(*x_range):
        x = float(to_x(value))
        parts.append(
            f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{floor}" y2="{floor + 4}"/>'
            f'<text x="{x:.1f}" y="{floor + 16}" text-anchor="middle">{tick_text(value)}</text>'
        )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(
        f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{floor}" y2="{floor}"/>'
        f'<text x="{middle}" y="{_HEIGHT - 4}" text-anchor="middle">step</text>'
    )
    return "".join(parts)


def share_bar(seconds: Mapping[str, float]) -> str:
    """A bar of parts as wide as their share; parts that are not finite or below 0 are left out."""
    shown = {
        name: (value, number_of)
        for number_of, (name, value) in enumerate(seconds.items())
        if math.isfinite(value) and value > 0
    }
    if not shown:
        return ""
    label = ", ".join(f"{name} {duration(value)}" for name, (value, _) in shown.items())
    parts = "".join(
        f'<span style="flex: {value:.6g} 0 0; background: var(--c{place % PALETTE})" '
        f'title="{esc(name)}: {duration(value)}"></span>'
        for name, (value, place) in shown.items()
    )
    return f'<div class="bar" role="img" aria-label="{esc(label)}">{parts}</div>'
