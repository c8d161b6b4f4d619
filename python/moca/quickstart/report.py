"""The quickstart's report: one HTML file that carries its style, charts and pictures.

It needs no script and makes no request, so it can be kept, mailed and opened anywhere.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence

from moca.checkpoint import write_file
from moca.quickstart.charts import PALETTE, curve, share_bar
from moca.quickstart.heatmap import heat_map
from moca.quickstart.page import (
    MISSING,
    definitions,
    duration,
    esc,
    missing,
    number,
    page,
    picture,
    shorten,
    table,
)
from moca.quickstart.report_data import (
    Hit,
    Item,
    Report,
    Search,
    TaskData,
    TaskScores,
)

_COLUMNS = {
    "recall@1": "R@1",
    "recall@5": "R@5",
    "recall@10": "R@10",
    "mrr": "MRR",
    "ndcg@10": "nDCG@10",
}
_HEADLINE = "recall@10"
_LOSS_NAMES = {"loss_mlm": "MLM loss", "loss_mae": "MAE loss"}
_SNIPPET = 220


def write_report(path: str | os.PathLike, report: Report) -> None:
    """Write `report` as one HTML file; it is there whole or not at all.

    The same report gives the same bytes. Values that are not finite are shown as such, pictures
    that cannot be read are named, and empty parts say what is missing.
    """
    text = render_report(report)
    write_file(os.fspath(path), lambda file: file.write_text(text, encoding="utf-8"))


def render_report(report: Report) -> str:
    """The HTML of `write_report`."""
    sections = [
        ("Results", _results(report)),
        ("Loss curves", _curves(report)),
        ("Masked and reconstructed", _reconstructions(report)),
        ("Similarity", _similarities(report)),
        ("Top hits", _searches(report)),
        ("What stage 1 is worth", _comparison(report)),
        ("Where the time went", _times(report)),
        ("Data", _data(report)),
        ("How to go on", _commands(report)),
    ]
    footer = '<p class="soft small">Made by <code>moca quickstart</code>.</p>'
    return page("MoCa quickstart", _header(report), sections, footer)


def _header(report: Report) -> str:
    machine = report.machine
    cores = "1 core" if machine.cores == 1 else f"{machine.cores} cores"
    memory = f"{number(machine.memory_gib, 0)} GiB of memory"
    about = f"{machine.cpu}, {cores}, {machine.instruction_set}, {memory}"
    rows = [("Machine", about), *report.facts.items()]
    if report.versions:
        rows.append(("Versions", ", ".join(f"{k} {v}" for k, v in report.versions.items())))
    tiles = "".join(_tile(task) for task in report.tasks)
    return (
        f"<h1>MoCa quickstart</h1><p>{esc(report.summary)}</p>"
        f'<p class="soft">{esc(report.date)} · total time {duration(report.seconds)}</p>'
        f'<div class="tiles">{tiles}</div>{definitions(rows)}'
    )


def _tile(task: TaskScores) -> str:
    (_, model), *others = task.systems.items() or [("", None)]
    beside = [
        f"{esc(name)} {number(scores.get(_HEADLINE), 1, 100)}"
        for name, scores in others
        if scores is not None
    ]
    return (
        f'<div class="tile"><span>{_direction(task)}</span>'
        f"<b>{number((model or {}).get(_HEADLINE), 1, 100)}</b>"
        f'<span class="soft">R@10 of {number(task.candidates, 0)}'
        f"{''.join(f' · {text}' for text in beside)}</span></div>"
    )


def _direction(task: TaskScores | TaskData) -> str:
    return esc((task.direction or task.name).replace("->", "→"))


def _results(report: Report) -> str:
    if not report.tasks:
        return missing("No task was evaluated.")
    targets = any(task.target is not None for task in report.tasks)
    head = ["System", *_COLUMNS.values()] + ["Target R@10"] * targets
    body = "".join(_task_rows(task, len(head), targets) for task in report.tasks)
    caption = (
        "All values × 100, over held-out items. R@k: share of queries whose right answer is among "
        "the first k; MRR: mean of 1 / its rank; nDCG@10: mean of 1 / log2(1 + its rank), 0 past "
        f"the first 10. {MISSING} is a baseline that does not apply or was not run. "
    )
    return table(head, body, caption + esc(report.metrics_note))


def _task_rows(task: TaskScores, width: int, targets: bool) -> str:
    rows = [
        f'<tr><th colspan="{width}" scope="colgroup"><div>{_direction(task)} '
        f"<small>· {number(task.queries, 0)} queries, {number(task.candidates, 0)} candidates"
        f"</small></div></th></tr>"
    ]
    for place, (system, scores) in enumerate(task.systems.items()):
        values = [number((scores or {}).get(name), 1, 100) for name in _COLUMNS]
        if targets:
            values.append("" if place else _target(task, scores))
        cells = "".join(f"<td>{value}</td>" for value in values)
        first = ' class="first"' if place == 0 else ""
        rows.append(f'<tr{first}><th scope="row">{esc(system)}</th>{cells}</tr>\n')
    return "".join(rows)


def _target(task: TaskScores, scores: Mapping[str, float] | None) -> str:
    if task.target is None:
        return MISSING
    reached = (scores or {}).get(_HEADLINE, math.nan) >= task.target
    mark = '<span class="good">✓ reached</span>' if reached else '<span class="bad">✗ missed</span>'
    return f"{number(task.target, 1, 100)} {mark}"


def _curves(report: Report) -> str:
    parts = [
        "<p>Faint: as logged. Strong: smoothed. Each panel has its own scale; under its name, "
        "the first and last smoothed value.</p>"
    ]
    known = dict.fromkeys([*_LOSS_NAMES, *(f"loss_{task.name}" for task in report.tasks)])
    stages = (
        ("Stage 1, pre-training", report.stage1, 0),
        ("Stage 2, contrastive", report.stage2, 2),
    )
    for name, lines, tone in stages:
        parts.append(f"<h3>{name}</h3>")
        if not lines:
            parts.append(missing(f"{name}: no log."))
            continue
        logged = {key for line in lines for key in line if key.startswith("loss_")}
        names = [key for key in known if key in logged] + sorted(logged.difference(known))
        panels = [
            _panel(lines, key, _LOSS_NAMES.get(key, f"loss, {key.removeprefix('loss_')}"), tone + i)
            for i, key in enumerate(names or ["loss"])
        ]
        grey = PALETTE - 1
        panels.append(_panel(lines, "lr", "learning rate", grey, digits=5, smoothing=False))
        panels.append(_panel(lines, "tokens_per_second", "tokens per second", grey, digits=0))
        last = lines[-1]
        parts.append(
            f'<p class="soft small">{number(last.get("step"), 0)} steps in '
            f'{duration(last.get("seconds"))}.</p><div class="charts">{"".join(panels)}</div>'
        )
    return "".join(parts)


def _panel(
    lines: Sequence[Mapping[str, float]],
    key: str,
    title: str,
    tone: int,
    *,
    digits: int = 3,
    smoothing: bool = True,
) -> str:
    # A log's JSON has null where another writer had no number.
    seen = [line for line in lines if line.get(key) is not None and line.get("step") is not None]
    steps, values = [line["step"] for line in seen], [line[key] for line in seen]
    return curve(title, steps, values, tone=tone, digits=digits, smoothing=smoothing)


def _reconstructions(report: Report) -> str:
    if not report.reconstructions:
        return missing("No images were reconstructed.")
    names = ("masked", "reconstructed", "original")
    figures = []
    for shown in report.reconstructions:
        three = "".join(
            f"<div>{picture(getattr(shown, name), f'{shown.caption}, {name}', 192, enlarge=True)}"
            f"<span>{name}</span></div>"
            for name in names
        )
        caption = f"<figcaption>{esc(shorten(shown.caption, 120))}</figcaption>"
        figures.append(f'<figure><div class="three">{three}</div>{caption}</figure>')
    return (
        "<p>What stage 1 sees of an image, what it makes of the hidden patches, and the image "
        f'itself.</p><div class="triplets">{"".join(figures)}</div>'
    )


def _similarities(report: Report) -> str:
    if not report.similarities:
        return missing("No similarities were computed.")
    return (
        "<p>Held-out queries (rows) against documents (columns): the stronger the colour, the "
        "higher the cosine. The right answers are on the diagonal.</p>"
    ) + "".join(heat_map(similarity) for similarity in report.similarities)


def _searches(report: Report) -> str:
    if not report.searches:
        return missing("No queries were searched.")
    return "".join(_search(search) for search in report.searches)


def _search(search: Search) -> str:
    if search.rank is None:
        place = ""
    else:
        of = "" if search.candidates is None else f" of {number(search.candidates, 0)}"
        place = f" · right answer at rank {number(search.rank, 0)}{of}"
    query = search.query
    pictures = "".join(picture(shown, "query") for shown in query.pictures[:1])
    text = esc(shorten(query.text, _SNIPPET)) if query.text else "" if pictures else "(empty)"
    hits = [_hit(hit, place) for place, hit in enumerate(search.hits, 1)]
    if search.answer is not None and not any(hit.right for hit in search.hits):
        rank = MISSING if search.rank is None else number(search.rank, 0)
        hits.append(_card(search.answer, "hit yes answer", f"{rank} · right answer", ""))
    kind = "" if any(hit.item.pictures for hit in search.hits) else " texts"
    found = f'<ol class="hits{kind}">{"".join(hits)}</ol>' if hits else missing("No hits.")
    return (
        f'<div class="search"><p class="soft small">{esc(search.task)}{place}</p>'
        f'<div class="query">{pictures}<span class="text" dir="auto">{text}</span></div>'
        f"{found}</div>\n"
    )


def _hit(hit: Hit, place: int) -> str:
    right = ' <span class="good">✓ right</span>' if hit.right else ""
    name = "hit yes" if hit.right else "hit"
    return _card(hit.item, name, f"{place}{right}", number(hit.score, 3))


def _card(item: Item, name: str, head: str, score: str) -> str:
    pictures = (
        picture(item.pictures[0], item.text or item.name or "document") if item.pictures else ""
    )
    text = shorten(item.text, _SNIPPET)
    snippet = f'<div class="snippet" dir="auto">{esc(text)}</div>' if text else ""
    return (
        f'<li class="{name}"><header><span>{head}</span><span>{score}</span></header>'
        f"{pictures}{snippet}</li>"
    )


def _comparison(report: Report) -> str:
    comparison = report.comparison
    if comparison is None or not comparison.rows:
        return missing(
            "Training without stage 1 was not run beside it; "
            f"<code>{esc(report.comparison_command)}</code> does that and fills this table."
        )
    head = ["Training", *(f"R@10 {task}" for task in comparison.tasks), "Seconds", "Steps"]
    body, group = [], ""
    for row in comparison.rows:
        if row.group and row.group != group:
            body.append(
                f'<tr><th colspan="{len(head)}" scope="colgroup">{esc(row.group)}</th></tr>'
            )
        group = row.group
        values = [number(row.recall.get(task), 1, 100) for task in comparison.tasks]
        values += [number(row.seconds, 0), number(row.steps, 0)]
        cells = "".join(f"<td>{value}</td>" for value in values)
        body.append(f'<tr><th class="wrap" scope="row">{esc(row.name)}</th>{cells}</tr>\n')
    caption = "R@10 × 100; seconds of both stages together; contrastive steps. "
    return table(head, "".join(body), caption + esc(comparison.caption))


def _times(report: Report) -> str:
    if not report.times:
        return missing("No times were taken.")
    times = report.times
    total = sum(value for value in times.values() if math.isfinite(value) and value > 0)
    rows = "".join(
        f'<tr><th class="wrap" scope="row"><span class="swatch" '
        f'style="background: var(--c{place % PALETTE})"></span>{esc(name)}</th>'
        f"<td>{number(value)}</td><td>{number(value / total if total else None, 1, 100)} %</td>"
        "</tr>\n"
        for place, (name, value) in enumerate(times.items())
    )
    rows += (
        f'<tr class="first"><th scope="row">Total</th><td>{number(total)}</td><td>100.0 %</td></tr>'
    )
    return share_bar(times) + table(["Part", "Seconds", "Share"], rows)


def _data(report: Report) -> str:
    parts = []
    if report.data:
        rows = "".join(
            f'<tr><th class="wrap" scope="row">{esc(task.name)}<br><small>{_direction(task)}'
            f"</small></th><td>{number(task.train, 0)}</td><td>{number(task.test, 0)}</td>"
            f'<td class="left wrap">{_reasons(task.dropped)}</td></tr>\n'
            for task in report.data
        )
        parts.append(table(["Task", "Training pairs", "Held out", "Left out"], rows))
    else:
        parts.append(missing("No pairs were loaded."))
    if report.documents:
        counts = ", ".join(f"{esc(k)} {number(v, 0)}" for k, v in report.documents.items())
        parts.append(f"<p>Documents of stage 1: {counts}.</p>")
    if report.notes:
        items = "".join(f"<li>{esc(note)}</li>" for note in report.notes)
        parts.append(f'<h3>Notes</h3><ul class="plain">{items}</ul>')
    return "".join(parts)


def _reasons(dropped: Mapping[str, int]) -> str:
    if not dropped:
        return "nothing"
    return "<br>".join(f"{number(count, 0)} × {esc(reason)}" for reason, count in dropped.items())


def _commands(report: Report) -> str:
    if not report.commands:
        return missing("No commands were given.")
    return "".join(
        f"<div>{esc(each.purpose)}</div><pre>{esc(each.command)}</pre>" for each in report.commands
    )
