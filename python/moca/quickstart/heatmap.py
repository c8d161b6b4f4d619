"""The report's heat-map: cosines of queries with documents, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moca.quickstart.page import esc, missing, number, shorten, thumbnail
from moca.quickstart.report_data import Item, Similarity

MAX_ROWS = 24

# Pixels: the cells of all columns together, the largest cell, room for texts before the rows,
# above the columns and, as those slant, past the last one.
_SIDE, _MAX_CELL = 640, 32
_ROW_TEXT, _COLUMN_TEXT, _SLANT = 232, 118, 72
_LEGEND = 52


@dataclass(frozen=True)
class _Grid:
    """Where cells are: `left` and `top` of the first one and the side of each, in pixels."""

    rows: int
    cell: int
    left: int
    top: int

    @classmethod
    def of(cls, queries: Sequence[Item], documents: Sequence[Item]) -> _Grid:
        cell = min(_MAX_CELL, _SIDE // len(queries))
        texts = [any(item.text.strip() for item in side) for side in (queries, documents)]
        left, top = _ROW_TEXT if texts[0] else 90, _COLUMN_TEXT if texts[1] else cell + 8
        return cls(len(queries), cell, left, top)

    def x(self, column: float) -> float:
        return self.left + column * self.cell

    def y(self, row: float) -> float:
        return self.top + row * self.cell


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
    scores, finite = scores[:rows, :rows], np.isfinite(scores[:rows, :rows])
    queries, documents = similarity.queries[:rows], similarity.documents[:rows]
    grid = _Grid.of(queries, documents)
    low, high = (scores[finite].min(), scores[finite].max()) if finite.any() else (0.0, 1.0)
    best = np.where(finite, scores, -np.inf).argmax(axis=1)
    found = int(((best == np.arange(rows)) & finite.any(axis=1)).sum())
    said = f"{found} of {rows} queries have their own document first"
    parts = [_row_label(grid, item, i) for i, item in enumerate(queries)]
    parts += [_column_label(grid, item, i) for i, item in enumerate(documents)]
    parts += [
        _cell(grid, row, column, scores[row, column], low, high)
        for row in range(rows)
        for column in range(rows)
    ]
    parts += [
        f'<rect class="right" x="{grid.x(i) + 1}" y="{grid.y(i) + 1}" width="{grid.cell - 2}" '
        f'height="{grid.cell - 2}"/>'
        for i in range(rows)
    ]
    parts += [
        f'<circle class="best" cx="{grid.x(best[i] + 0.5)}" cy="{grid.y(i + 0.5)}" r="3.5"/>'
        for i in range(rows)
        if finite[i].any()
    ]
    parts.append(_legend(grid, low, high))
    label = f"{similarity.name}: cosine of {rows} queries with {rows} documents; {said}"
    width, height = grid.x(rows) + _SLANT, grid.y(rows) + _LEGEND
    return (
        f"<h3>{esc(similarity.name)}</h3>"
        f'<figure class="heat"><figcaption>{said}.</figcaption><div class="scroll" tabindex="0">'
        f'<svg viewBox="0 0 {width} {height}" style="max-width: {width}px" role="img" '
        f'aria-label="{esc(label)}">{"".join(parts)}</svg></div></figure>'
    )


def _cell(grid: _Grid, row: int, column: int, score: float, low: float, high: float) -> str:
    title = f"<title>query {row + 1}, document {column + 1}: {number(score, 3)}</title>"
    if not math.isfinite(score):
        x, y = grid.x(column + 0.5), grid.y(row + 0.5) + 5
        return f'<text class="broken" x="{x}" y="{y}" text-anchor="middle">×{title}</text>'
    depth = (score - low) / (high - low) if high > low else 0.5
    return (
        f'<rect class="cell" x="{grid.x(column)}" y="{grid.y(row)}" width="{grid.cell}" '
        f'height="{grid.cell}" fill-opacity="{depth:.3f}">{title}</rect>'
    )


def _row_label(grid: _Grid, item: Item, row: int) -> str:
    name = f"query {row + 1}"
    if not item.text.strip() and (uri := thumbnail(item, 2 * grid.cell)):
        return _image(grid, uri, grid.left - 6 - grid.cell, grid.y(row), name)
    text = item.text.strip() or name
    return (
        f'<text x="{grid.left - 6}" y="{grid.y(row + 0.5) + 4}" text-anchor="end">'
        f"<title>{esc(text)}</title>{esc(shorten(text, 36))}</text>"
    )


def _column_label(grid: _Grid, item: Item, column: int) -> str:
    name = f"document {column + 1}"
    if not item.text.strip() and (uri := thumbnail(item, 2 * grid.cell)):
        return _image(grid, uri, grid.x(column), grid.top - grid.cell - 2, name)
    text = item.text.strip() or name
    return (
        f'<text transform="translate({grid.x(column + 0.5) + 4} {grid.top - 5}) rotate(-50)">'
        f"<title>{esc(text)}</title>{esc(shorten(text, 22))}</text>"
    )


def _image(grid: _Grid, uri: str, x: float, y: float, name: str) -> str:
    side = grid.cell - 2
    return (
        f'<image x="{x + 1}" y="{y + 1}" width="{side}" height="{side}" href="{uri}" '
        f'role="img" aria-label="{name}"/>'
    )


def _legend(grid: _Grid, low: float, high: float) -> str:
    """The colours from the lowest to the highest score, and what the marks mean."""
    blocks, width = 24, 6
    left, y = grid.left, grid.y(grid.rows) + 18
    end = left + blocks * width
    colours = "".join(
        f'<rect x="{left + i * width}" y="{y}" width="{width}" height="12" fill="var(--heat)" '
        f'fill-opacity="{i / (blocks - 1):.3f}" shape-rendering="crispEdges"/>'
        for i in range(blocks)
    )
    return (
        f'{colours}<rect class="grid" x="{left}" y="{y}" width="{blocks * width}" height="12" '
        f'fill="none"/><text x="{left - 6}" y="{y + 10}" text-anchor="end">cosine</text>'
        f'<text x="{left}" y="{y + 26}">{number(low, 2)}</text>'
        f'<text x="{end}" y="{y + 26}" text-anchor="end">{number(high, 2)}</text>'
        f'<rect class="right" x="{end + 20}" y="{y - 1}" width="14" height="14"/>'
        f'<text x="{end + 40}" y="{y + 10}">right answer</text>'
        f'<circle class="best" cx="{end + 128}" cy="{y + 6}" r="3.5"/>'
        f'<text x="{end + 138}" y="{y + 10}">best of its row</text>'
    )
