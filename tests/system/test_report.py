"""The quickstart's report: whole, escaped, self-contained, and robust to missing values."""

import base64
import dataclasses
import io
import math

import lxml.etree
import lxml.html
import numpy as np
import PIL.Image
import pytest
from moca.data.records import IMAGE_MARKER, Document
from moca.quickstart.charts import curve, nice_ticks, smoothed, tick_text
from moca.quickstart.heatmap import MAX_ROWS, heat_map
from moca.quickstart.page import duration, number, shorten
from moca.quickstart.report import render_report, write_report
from moca.quickstart.report_data import (
    Command,
    Comparison,
    ComparisonRow,
    Hit,
    Item,
    Machine,
    Reconstruction,
    Report,
    Search,
    Similarity,
    TaskData,
    TaskScores,
)

HOSTILE = "<script>alert(1)</script>\"'><img src=http://evil.example/x>&amp;\x00\ud800"
NAN, INF = math.nan, math.inf
MACHINE = Machine("Some CPU", 2, "AVX2", 7.8)
EMPTY = Report("Nothing was run.", "2026-01-02", MACHINE, 12.0)


def pixels(seed=0, height=8, width=12):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def png(seed=0):
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels(seed)).save(buffer, "PNG")
    return buffer.getvalue()


def metrics(value):
    names = ("recall@1", "recall@5", "recall@10", "mrr", "ndcg@10")
    return {name: value * (i + 1) for i, name in enumerate(names)}


def full_report(word="caption", value=0.1):
    """A report with all its parts; `word` stands for every text, `value` for every number."""
    log = [{"step": i + 1, "seconds": i * 2.0, "lr": 1e-3, "tokens_per_second": value * 1e4}
           for i in range(60)]  # fmt: skip
    stage1 = [line | {"loss_mlm": value + 1 / (i + 1), "loss_mae": value}
              for i, line in enumerate(log)]  # fmt: skip
    stage2 = [line | {("loss_b" if i % 2 else f"loss_{word}"): value} for i, line in enumerate(log)]
    text, image = Item(f"{word} text", (), word), Item(pictures=(png(1),), name=word)
    hits = [Hit(image, value), Hit(text, value / 2, right=True), Hit(image, -value)]
    scores = np.full((3, 3), value) + np.eye(3)
    return Report(
        summary=f"A {word} was run.",
        date="2026-01-02",
        machine=MACHINE,
        seconds=100.0,
        versions={"torch": word},
        facts={word: word},
        tasks=[
            TaskScores(word, f"{word} -> figure", 5, 7,
                       {"model": metrics(value), "chance": metrics(value / 2), word: None}, 0.2),
            TaskScores("b", "", 5, 7, {"model": metrics(value)}),
        ],
        metrics_note=word,
        stage1=stage1,
        stage2=stage2,
        reconstructions=[Reconstruction(pixels(1), pixels(2), pixels(3), word)],
        similarities=[Similarity(word, [text, image, Item()], [image, text, image], scores)],
        searches=[
            Search(word, text, hits, 2, 7),
            Search(word, image, hits[:1], 6, 7, answer=text),
            Search(word, Item(), []),
        ],
        times={word: 30.0, "training": 60.0},
        comparison=Comparison(
            [word, "b"],
            [
                ComparisonRow(word, {word: value}, value, 10, word),
                ComparisonRow("x", {}, None, None),
            ],
            word,
        ),
        data=[TaskData(word, word, 10, 5, {word: 3})],
        documents={word: 12},
        notes=[word],
        commands=[Command(word, f"moca search {word}")],
    )  # fmt: skip


def parse(report):
    return lxml.html.document_fromstring(render_report(report))


def section(tree, name):
    return tree.get_element_by_id(name).text_content()


def test_every_part_is_there():
    tree = parse(full_report())
    links = [a.get("href") for a in tree.xpath("//nav/a")]
    assert len(links) == 9
    assert [f"#{each.get('id')}" for each in tree.xpath("//main/section")] == links
    assert [each.text_content() for each in tree.find_class("missing")] == ["No hits."]
    header = tree.xpath("//body/header")[0].text_content()
    for part in ("A caption was run.", "2026-01-02", "Some CPU, 2 cores, AVX2", "1 min 40 s"):
        assert part in header
    assert "moca search caption" in section(tree, "how-to-go-on")
    assert "12" in section(tree, "data")


def test_tags_are_balanced():
    # XML is strict where HTML is lenient: what is open is closed, attributes are quoted.
    text = render_report(full_report()).removeprefix("<!DOCTYPE html>\n")
    for void in ("meta", "img", "br"):
        parts = text.split(f"<{void}")
        text = parts[0] + "".join(
            f"<{void}" + part.replace(">", "/>", 1) for part in parts[1:]
        )  # fmt: skip
    assert lxml.etree.fromstring(text.encode()).tag == "html"


def test_metrics_and_targets():
    tree = parse(full_report())
    rows = {
        row[0].text_content(): [cell.text_content() for cell in row[1:]]
        for row in tree.xpath("//section[@id='results']//tbody/tr[td]")[:3]
    }
    assert rows["model"] == ["10.0", "20.0", "30.0", "40.0", "50.0", "20.0 ✓ reached"]
    assert rows["chance"][:2] == ["5.0", "10.0"]
    assert rows["caption"][:5] == ["—"] * 5
    assert "caption → figure" in section(tree, "results")
    assert "5 queries, 7 candidates" in section(tree, "results")
    missed = parse(full_report(value=0.01))
    assert "✗ missed" in section(missed, "results")


def test_nothing_is_fetched_and_nothing_runs():
    tree = parse(full_report(word=HOSTILE))
    assert not tree.xpath("//script | //link | //iframe | //object | //embed | //base | //form")
    for element in tree.iter():
        for name, value in element.attrib.items():
            assert not name.lower().startswith("on"), (element.tag, name)
            if name in ("src", "href", "xlink:href", "action", "poster"):
                assert value.startswith(("data:image/png;base64,", "#")), value[:60]
    style = "".join(tree.xpath("//style/text()"))
    assert "url(" not in style and "@import" not in style
    policy = tree.xpath("//meta[@http-equiv='Content-Security-Policy']/@content")
    assert policy and "default-src 'none'" in policy[0]


def test_hostile_text_is_shown_as_text():
    page = render_report(full_report(word=HOSTILE))
    assert "<script" not in page and "<img src=http" not in page
    assert page.count("&lt;script&gt;alert(1)") > 20
    assert "\x00" not in page
    page.encode("utf-8")
    assert "<script>alert(1)</script>\"'>" in section(parse(full_report(word=HOSTILE)), "data")


def test_empty_report_says_what_is_missing():
    tree = parse(EMPTY)
    for each in tree.xpath("//main/section"):
        assert each.find_class("missing"), each.get("id")
    assert "moca quickstart compare=true" in section(tree, "what-stage-1-is-worth")


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_values_that_are_not_finite(value):
    report = full_report(value=value)
    report.seconds = value
    report.times = {"a": value, "b": 1.0, "c": -1.0}
    tree = parse(report)
    shown = number(value)
    for name in ("results", "top-hits", "what-stage-1-is-worth", "where-the-time-went"):
        assert shown in section(tree, name), name
    assert "none of 60 values is finite" in section(tree, "loss-curves")
    assert "×" in section(tree, "similarity")
    assert "✓ reached" not in section(tree, "results") or value == INF


def test_numbers_left_out_of_a_log():
    report = dataclasses.replace(EMPTY, stage1=[{"step": 1, "loss_mlm": None}, {"seconds": 3.0}])
    assert "no values were logged" in section(parse(report), "loss-curves")
    report = dataclasses.replace(EMPTY, stage1=[{"step": 7, "seconds": 3.0, "loss": 2.5}])
    assert "2.500" in section(parse(report), "loss-curves")


def test_every_picture_has_a_text_and_the_pixels_given():
    tree = parse(full_report())
    for image in tree.xpath("//img"):
        assert image.get("alt")
    for chart in tree.xpath("//*[@role='img']"):
        assert chart.get("aria-label")
    originals = tree.xpath("//img[@alt='caption, original']/@src")
    data = base64.b64decode(originals[0].partition(",")[2])
    shown = np.asarray(PIL.Image.open(io.BytesIO(data)))
    times = 192 // 12
    np.testing.assert_array_equal(shown, pixels(3).repeat(times, 0).repeat(times, 1))


@pytest.mark.parametrize(
    "picture", [b"no image", "no/such/file.png", np.zeros((2, 2, 3)), np.zeros((0, 4, 3), np.uint8)]
)
def test_pictures_that_cannot_be_shown_are_named(picture):
    broken = Item(pictures=(picture,))
    report = dataclasses.replace(
        EMPTY,
        searches=[Search("task", broken, [Hit(broken, 0.5)])],
        similarities=[Similarity("task", [broken], [broken], np.ones((1, 1)))],
    )
    tree = parse(report)
    assert section(tree, "top-hits").count("picture cannot be shown") == 2
    assert "query 1" in section(tree, "similarity")


def test_searches_mark_the_right_answer():
    tree = parse(full_report())
    first, second, third = tree.xpath("//div[@class='search']")
    assert [hit.get("class") for hit in first.xpath(".//li")] == ["hit", "hit yes", "hit"]
    assert "✓ right" in first.xpath(".//li")[1].text_content()
    assert "right answer at rank 2 of 7" in first.text_content()
    assert "right answer" in second.xpath(".//li")[-1].text_content()
    assert "No hits." in third.text_content()


def test_heat_map():
    count = MAX_ROWS + 6
    items = [Item(f"item {i}") for i in range(count)]
    scores = np.eye(count)
    scores[0, 1] = 2.0
    tree = lxml.html.fromstring(f"<div>{heat_map(Similarity('x', items, items, scores))}</div>")
    assert len(tree.find_class("cell")) == MAX_ROWS**2
    assert f"{MAX_ROWS - 1} of {MAX_ROWS} queries" in tree.text_content()
    assert max(float(cell.get("fill-opacity")) for cell in tree.find_class("cell")) == 1.0
    assert "no heat-map" in heat_map(Similarity("x", items, items, np.ones((2, 3))))
    assert "no heat-map" in heat_map(Similarity("x", [], [], np.ones((0, 0))))


def test_curve_breaks_where_a_value_is_missing():
    figure = curve("loss", range(5), [1.0, 2.0, NAN, 2.0, 1.0], tone=0)
    raw = lxml.html.fromstring(figure).find_class("raw")[0]
    assert raw.get("d").count("M") == 2
    assert "1 not finite" in figure


def test_smoothing_keeps_a_constant_and_evens_out_noise():
    np.testing.assert_allclose(smoothed(np.full(40, 3.0)), 3.0)
    noise = np.random.default_rng(0).normal(size=400)
    assert smoothed(noise).std() < 0.4 * noise.std()
    assert smoothed(np.array([5.0])).tolist() == [5.0]


def test_ticks_and_numbers():
    np.testing.assert_allclose(nice_ticks(0, 1), [0, 0.25, 0.5, 0.75, 1])
    assert nice_ticks(3, 3) == [3]
    texts = [tick_text(v) for v in (0, 0.0005, 0.25, -2, 9500, 2e6)]
    assert texts == ["0", "5e−4", "0.25", "−2", "9.5k", "2M"]
    assert [number(v) for v in (None, NAN, -INF, -1.25)] == ["—", "NaN", "−∞", "−1.2"]
    assert [duration(v) for v in (3, 59.99, 61, 7260)] == [
        "3.0 s",
        "60.0 s",
        "1 min 1 s",
        "2 h 1 min",
    ]
    assert shorten("笑顔のネコ", 6) == "笑顔…"
    assert shorten("short  text", 20) == "short text"


def test_item_of_document():
    document = Document(f"a {IMAGE_MARKER} b", (png(),), "page")
    assert Item.of(document) == Item("a b", document.images, "page")


def test_same_report_same_bytes(tmp_path):
    write_report(tmp_path / "a" / "report.html", full_report())
    write_report(tmp_path / "b.html", full_report())
    first = (tmp_path / "a" / "report.html").read_bytes()
    assert first == (tmp_path / "b.html").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b.html"]
