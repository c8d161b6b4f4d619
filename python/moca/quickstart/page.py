"""The report's page: its style, and how text, numbers, tables and pictures become HTML."""

from __future__ import annotations

import base64
import html
import io
import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image

from moca.data.images import decode
from moca.quickstart.report_data import Item, Picture

MISSING = "—"
# Control characters and lone surrogates have no place in an HTML file.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")

_STYLE = """
:root { color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1b1f24; --soft: #57606a; --rule: #d5dae0;
  --accent: #1f5fbf; --good: #17703a; --good-fill: #e3f4e8; --bad: #b42318; --heat: #0b4a8f;
  --c0: #1f5fbf; --c1: #b3530b; --c2: #177a5b; --c3: #8a3ab0; --c4: #b3244f; --c5: #6d6a12;
  --c6: #0f7490; --c7: #6b7280; }
@media (prefers-color-scheme: dark) { :root {
  --page: #111417; --card: #191d22; --ink: #e8eaed; --soft: #a3adb8; --rule: #343b43;
  --accent: #7db2ff; --good: #63d188; --good-fill: #16301f; --bad: #ff9186; --heat: #8cc0ff;
  --c0: #7db2ff; --c1: #f5a25d; --c2: #5fcfa8; --c3: #cf9bec; --c4: #ff8fa9; --c5: #d3cd5a;
  --c6: #62c8e4; --c7: #a3adb8; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans",
  sans-serif; }
main, header, nav { max-width: 1120px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 32px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 8px; letter-spacing: -.01em; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 0 0 6px; }
h3 { font-size: 1.02rem; margin: 22px 0 8px; }
p { margin: 6px 0 12px; max-width: 75ch; }
.soft, figcaption, th small { color: var(--soft); }
.small, figcaption { font-size: .875rem; }
a { color: var(--accent); }
nav { padding-top: 4px; font-size: .9rem; }
nav a { display: inline-block; padding: 4px 14px 4px 0; }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
  padding: 20px 22px; margin: 18px 0; }
code, pre { font: .86rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono",
  monospace; }
pre { background: var(--page); border: 1px solid var(--rule); border-radius: 6px; margin: 4px 0
  14px; padding: 10px 12px; overflow-x: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; width: 100%; }
.scroll + p { margin-top: 10px; }
th, td { padding: 6px 10px; text-align: right; border-bottom: 1px solid var(--rule);
  font-variant-numeric: tabular-nums; vertical-align: top; white-space: nowrap; }
th { font-weight: 600; }
th:first-child, td:first-child, .left { text-align: left; }
#data th:last-child { text-align: left; }
.wrap { white-space: normal; min-width: 11em; }
th[colspan] { padding-top: 16px; white-space: normal; }
th[colspan] div { position: sticky; left: 10px; width: fit-content;
  max-width: min(100%, calc(100vw - 72px)); }
.first td, .first th { background: color-mix(in srgb, var(--accent) 9%, transparent); }
tbody th[scope=row] { font-weight: 400; } .first th[scope=row] { font-weight: 600; }
.good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; }
.tiles { display: grid; gap: 12px; margin: 18px 0 10px;
  grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); }
.tile { background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
  padding: 12px 16px; font-size: .875rem; }
.tile { display: flex; flex-direction: column; } .tile span:first-child { flex: 1; }
.tile b { display: block; font-size: 1.9rem; line-height: 1.25; font-weight: 650; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 12px 0;
  font-size: .92rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 0; }
.charts { display: grid; gap: 18px 22px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 235px), 1fr)); }
.chart svg, .heat svg { display: block; width: 100%; height: auto; }
.chart figcaption b { color: var(--ink); display: block; }
svg text { font-family: inherit; fill: var(--soft); font-size: 11px; }
.axis { stroke: var(--soft); } .grid { stroke: var(--rule); }
.raw { fill: none; stroke: var(--line); stroke-width: 1; opacity: .38; }
.smooth { fill: none; stroke: var(--line); stroke-width: 2.2; stroke-linejoin: round; }
.dot { fill: var(--line); }
svg .broken { fill: var(--bad); font-size: 13px; }
.heat svg { min-width: 780px; }
.cell { fill: var(--heat); stroke: var(--rule); stroke-width: .5; }
.right { fill: none; stroke: var(--c1); stroke-width: 2; }
.best { fill: var(--card); stroke: var(--ink); stroke-width: 1; }
.triplets { display: grid; gap: 18px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 310px), 1fr)); }
.three { display: grid; grid-template-columns: repeat(3, 1fr); gap: 6px; }
.three span { display: block; font-size: .8rem; color: var(--soft); text-align: center; }
.three img { width: 100%; height: auto; border: 1px solid var(--rule); image-rendering: pixelated;
  display: block; }
.search { border-top: 1px solid var(--rule); padding: 14px 0; }
.search:first-of-type { border-top: 0; }
.query { display: flex; gap: 12px; align-items: center; margin-bottom: 10px; }
.query .text { font-size: 1.05rem; font-weight: 600; overflow-wrap: anywhere; }
.hits { display: grid; gap: 10px; list-style: none; margin: 0; padding: 0;
  grid-template-columns: repeat(auto-fill, minmax(min(46%, 150px), 1fr)); }
.hits.texts { grid-template-columns: repeat(auto-fill, minmax(min(100%, 190px), 1fr)); }
.hit { border: 1px solid var(--rule); border-radius: 8px; padding: 8px 10px; font-size: .85rem;
  overflow: hidden; overflow-wrap: anywhere; }
.hit.yes { border: 2px solid var(--good); background: var(--good-fill); padding: 7px 9px; }
.hit.answer { border-style: dashed; }
.hit header { all: unset; display: flex; justify-content: space-between; gap: 4px 8px;
  flex-wrap: wrap; color: var(--soft); font-variant-numeric: tabular-nums; margin-bottom: 6px; }
.hit img, .query img { display: block; width: auto; height: auto; max-width: 100%;
  max-height: 110px; margin: 0 auto 6px;
  background: #fff; border: 1px solid var(--rule); border-radius: 4px; }
.query img { margin: 0; flex: none; }
.snippet { display: -webkit-box; -webkit-line-clamp: 5; -webkit-box-orient: vertical;
  overflow: hidden; }
.bar { display: flex; gap: 2px; height: 30px; margin: 8px 0 14px; border-radius: 6px;
  overflow: hidden; }
.bar span { min-width: 2px; }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: 2px;
  margin-right: .55em; }
.missing { border: 1px dashed var(--rule); border-radius: 6px; padding: 10px 12px;
  color: var(--soft); }
ul.plain { margin: 4px 0; padding-left: 1.2em; }
footer { max-width: 1120px; margin: 0 auto; padding: 0 20px 40px; }
@media (max-width: 560px) { main, header, nav, footer { padding-left: 12px; padding-right: 12px; }
  section { padding: 16px 14px; } h1 { font-size: 1.55rem; } th, td { padding: 5px 7px; }
  .tiles { grid-template-columns: 1fr 1fr; } .tile { padding: 10px 12px; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: 6px; } }
@media print { section { break-inside: avoid; } nav { display: none; } }
"""

# The page may show what it carries and nothing else: no script, no request.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(title: str, header: str, sections: Sequence[tuple[str, str]], footer: str) -> str:
    """The whole file from HTML parts; sections are (title, body)."""
    links = "".join(f'<a href="#{_anchor(name)}">{esc(name)}</a>' for name, _ in sections)
    parts = "".join(
        f'<section id="{_anchor(name)}"><h2>{esc(name)}</h2>\n{body}</section>\n'
        for name, body in sections
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{esc(_POLICY)}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{esc(title)}</title>\n<style>{_STYLE}</style></head>\n<body>\n"
        f'<header>{header}</header>\n<nav aria-label="Sections">{links}</nav>\n'
        f"<main>\n{parts}</main>\n<footer>{footer}</footer>\n</body></html>\n"
    )


def _anchor(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def esc(value: Any) -> str:
    """Text that shows as it is, in HTML and in attributes."""
    return html.escape(_UNPRINTABLE.sub("\ufffd", str(value)), quote=True)


def missing(sentence: str) -> str:
    """A box that says what is not there; the sentence is HTML."""
    return f'<p class="missing">{sentence}</p>'


def number(value: float | None, digits: int = 1, factor: float = 1.0) -> str:
    """A number as text: a dash for None, in words when it is not finite."""
    if value is None:
        return MISSING
    value = float(value) * factor
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:,.{digits}f}".replace("-", "−")


def duration(seconds: float | None) -> str:
    """Seconds as a person would say them."""
    if seconds is None or not math.isfinite(seconds) or seconds < 60:
        shown = number(seconds)
        return shown if shown == MISSING else f"{shown} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def shorten(value: str, width: int) -> str:
    """One line of at most `width` columns; wide characters count twice."""
    line = " ".join(value.split())
    used = 0
    for place, character in enumerate(line):
        used += 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if used > width:
            return line[: max(0, place - 1)].rstrip() + "…"
    return line


def table(head: Sequence[str], body: str, caption: str = "") -> str:
    """A table from column titles, rows and what is said below it; rows and caption are HTML."""
    cells = "".join(f'<th scope="col">{esc(title)}</th>' for title in head)
    below = f'<p class="soft small">{caption}</p>' if caption else ""
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{cells}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>{below}"
    )


def definitions(rows: Sequence[tuple[str, str]]) -> str:
    """A list of names with what they stand for."""
    return "<dl>" + "".join(f"<dt>{esc(k)}</dt><dd>{esc(v)}</dd>" for k, v in rows) + "</dl>"


def picture(shown: Picture, alt: str, side: int = 160, *, enlarge: bool = False) -> str:
    """An `<img>` that carries its picture, or a sentence why it cannot be shown.

    Args:
        shown: the picture.
        alt: what it shows.
        side: longest side in pixels; larger pictures are reduced.
        enlarge: repeat the pixels of smaller ones up to that side.
    """
    try:
        image = _open(shown)
    except (ValueError, OSError) as error:
        return missing(f"picture cannot be shown: {esc(error)}")
    uri, width, height = data_uri(image, side, enlarge=enlarge)
    return f'<img src="{uri}" alt="{esc(alt)}" width="{width}" height="{height}">'


def thumbnail(item: Item, side: int) -> str | None:
    """The first picture of an item as a data URI, or None when there is none that can be read."""
    for shown in item.pictures[:1]:
        try:
            return data_uri(_open(shown), side)[0]
        except (ValueError, OSError):
            return None
    return None


def data_uri(image: PIL.Image.Image, side: int, *, enlarge: bool = False) -> tuple[str, int, int]:
    """A PNG as a data URI, with its width and height."""
    longest = max(image.size)
    if longest > side:
        image = image.copy()
        image.thumbnail((side, side), PIL.Image.Resampling.LANCZOS)
    elif enlarge and side >= 2 * longest:
        times = side // longest
        size = (image.width * times, image.height * times)
        image = image.resize(size, PIL.Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f"data:image/png;base64,{encoded}", image.width, image.height


def _open(shown: Picture) -> PIL.Image.Image:
    if not isinstance(shown, np.ndarray):
        return decode(shown)
    grey_or_colour = shown.ndim == 2 or (shown.ndim == 3 and shown.shape[2] == 3)
    if shown.dtype != np.uint8 or not grey_or_colour or 0 in shown.shape:
        raise ValueError(
            f"expected (H, W, 3) or (H, W) of uint8, got {shown.shape} of {shown.dtype}"
        )
    return PIL.Image.fromarray(shown).convert("RGB")
