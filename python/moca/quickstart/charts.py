"""The report's charts, as inline SVG: curves of a log, a heat-map, and a bar of shares.

Colours are variables of the page's style, so that charts follow light and dark mode.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from moca.quickstart.page import duration, esc, missing, number, shorten, thumbnail
from moca.quickstart.report_data import Item, Similarity

PALETTE = 8
MAX_ROWS = 24

_WIDTH, _HEIGHT = 360, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 12, 10, 34
# Points drawn of one curve; more cannot be told apart at the width of a chart.
_POINTS = 600
# Share of a curve that its smoothing looks at.
_SMOOTHING = 0.08


def curve(
    title: str, steps: Sequence[float], values: Sequence[float], *, tone: int, digits: int = 3
) -> str:
    """A figure with a value over steps: the raw line, faint, and a smoothed one.

    Args:
        title: what the value is, with its unit.
        steps, values: of equal length; where a value is not finite the line has a gap and a mark.
        tone: number of the colour.
        digits: after the point, in the caption.
    """
    x, y = np.asarray(steps, np.float64), np.asarray(values, np.float64)
    x, y = x[np.isfinite(x)], y[np.isfinite(x)]
    finite = np.isfinite(y)
    if not finite.any():
        what = "no values were logged" if not len(y) else f"none of {len(y)} values is finite"
        return _figure(title, what, missing(f"{esc(title)}: {what}."))
    smooth = smoothed(y[finite])
    low, high = _limits(y[finite], smooth)
    left, right = float(x.min()), float(x.max())
    to_x = _scale(left, right, _LEFT, _WIDTH - _RIGHT)
    to_y = _scale(low, high, _HEIGHT - _BOTTOM, _TOP)
    inner = _line("raw", to_x(x), to_y(np.where(finite, y, np.nan)))
    inner += _line("smooth", to_x(x[finite]), to_y(smooth))
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
    note = f"{number(smooth[0], digits)} → {number(smooth[-1], digits)}"
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
    if size >= 1e6:
        return f"{value / 1e6:g}M"
    if size >= 1e4:
        return f"{value / 1e3:g}k"
    if size < 1e-12:
        return "0"
    return f"{value:.3g}".replace("e-0", "e-").replace("-", "−")


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


_CELL, _ROW_LABEL, _COLUMN_LABEL, _OVERHANG = 24, 232, 112, 84


def heat_map(similarity: Similarity) -> str:
    """A figure with the cosines of queries (rows) and documents (columns).

    The cell of the right answer is outlined, the best of each row has a dot.
    """
    scores = np.asarray(similarity.scores, np.float64)
    rows = min(len(similarity.queries), len(similarity.documents), MAX_ROWS)
    if scores.ndim != 2 or min(scores.shape) < rows or not rows:
        return missing(
            f"{esc(similarity.name)}: no heat-map, {len(similarity.queries)} queries and "
            f"{len(similarity.documents)} documents with scores of shape {scores.shape}."
        )
    scores = scores[:rows, :rows]
    finite = np.isfinite(scores)
    low, high = (scores[finite].min(), scores[finite].max()) if finite.any() else (0.0, 1.0)
    depth = (scores - low) / (high - low) if high > low else np.where(finite, 0.5, np.nan)
    best = np.where(finite, scores, -np.inf).argmax(axis=1)
    found = int(((best == np.arange(rows)) & finite.any(axis=1)).sum())
    said = f"{found} of {rows} queries have their own document first"
    side = rows * _CELL
    width, height = _ROW_LABEL + side + _OVERHANG, _COLUMN_LABEL + side + 52
    parts = [_row_label(item, i) for i, item in enumerate(similarity.queries[:rows])]
    parts += [_column_label(item, i) for i, item in enumerate(similarity.documents[:rows])]
    for row in range(rows):
        parts += [_cell(row, column, scores, depth) for column in range(rows)]
        if finite[row].any():
            x, y = _ROW_LABEL + (best[row] + 0.5) * _CELL, _COLUMN_LABEL + (row + 0.5) * _CELL
            parts.append(f'<circle class="best" cx="{x}" cy="{y}" r="3.5"/>')
    parts += [
        f'<rect class="right" x="{_ROW_LABEL + i * _CELL + 1}" y="{_COLUMN_LABEL + i * _CELL + 1}" '
        f'width="{_CELL - 2}" height="{_CELL - 2}"/>'
        for i in range(rows)
    ]
    label = f"{similarity.name}: cosine of {rows} queries with {rows} documents; {said}"
    return (
        f"<h3>{esc(similarity.name)}</h3>"
        f'<figure class="heat"><figcaption>{said}.</figcaption><div class="scroll" tabindex="0">'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{esc(label)}">'
        f"{''.join(parts)}{_legend(low, high, _COLUMN_LABEL + side + 18)}</svg></div></figure>"
    )


def _cell(row: int, column: int, scores: np.ndarray, depth: np.ndarray) -> str:
    x, y = _ROW_LABEL + column * _CELL, _COLUMN_LABEL + row * _CELL
    value = scores[row, column]
    title = f"<title>query {row + 1}, document {column + 1}: {number(value, 3)}</title>"
    if not math.isfinite(value):
        return (
            f'<text class="broken" x="{x + _CELL / 2}" y="{y + 17}" text-anchor="middle">'
            f"×{title}</text>"
        )
    return (
        f'<rect class="cell" x="{x}" y="{y}" width="{_CELL}" height="{_CELL}" '
        f'fill-opacity="{depth[row, column]:.3f}">{title}</rect>'
    )


def _row_label(item: Item, row: int) -> str:
    y = _COLUMN_LABEL + row * _CELL
    head = f'<text x="{_ROW_LABEL - 6}" y="{y + 16}" text-anchor="end">'
    if item.text.strip():
        return f"{head}<title>{esc(item.text)}</title>{esc(shorten(item.text, 36))}</text>"
    uri = thumbnail(item, 2 * _CELL)
    if uri:
        return _image(uri, _ROW_LABEL - 6 - _CELL, y, f"query {row + 1}")
    return f"{head}query {row + 1}</text>"


def _column_label(item: Item, column: int) -> str:
    x, y = _ROW_LABEL + column * _CELL, _COLUMN_LABEL - 5
    if not item.text.strip():
        uri = thumbnail(item, 2 * _CELL)
        if uri:
            return _image(uri, x, y - _CELL + 2, f"document {column + 1}")
    shown = item.text.strip() or f"document {column + 1}"
    return (
        f'<text transform="translate({x + _CELL / 2 + 4} {y}) rotate(-50)">'
        f"<title>{esc(shown)}</title>{esc(shorten(shown, 22))}</text>"
    )


def _image(uri: str, x: float, y: float, name: str) -> str:
    side = _CELL - 2
    return (
        f'<image x="{x + 1}" y="{y + 1}" width="{side}" height="{side}" href="{uri}" '
        f'role="img" aria-label="{name}"/>'
    )


def _legend(low: float, high: float, y: int) -> str:
    """The colours from the lowest to the highest score, and what the marks mean."""
    blocks = 24
    parts = [
        f'<rect x="{_ROW_LABEL + i * 6}" y="{y}" width="6" height="12" fill="var(--heat)" '
        f'fill-opacity="{i / (blocks - 1):.3f}"/>'
        for i in range(blocks)
    ]
    end = _ROW_LABEL + blocks * 6
    parts.append(
        f'<rect x="{_ROW_LABEL}" y="{y}" width="{blocks * 6}" height="12" fill="none" '
        f'class="grid"/>'
        f'<text x="{_ROW_LABEL - 6}" y="{y + 10}" text-anchor="end">cosine</text>'
        f'<text x="{_ROW_LABEL}" y="{y + 26}">{number(low, 2)}</text>'
        f'<text x="{end}" y="{y + 26}" text-anchor="end">{number(high, 2)}</text>'
        f'<rect class="right" x="{end + 20}" y="{y - 1}" width="14" height="14"/>'
        f'<text x="{end + 40}" y="{y + 10}">right answer</text>'
        f'<circle class="best" cx="{end + 128}" cy="{y + 6}" r="3.5"/>'
        f'<text x="{end + 138}" y="{y + 10}">best of its row</text>'
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
