"""HTML folders: sections, figures, captions of several generators, and pages that are broken."""

import logging

import numpy as np
import PIL.Image
import pytest
from moca.data.html import (
    REPEATED_PAGES,
    caption_figure_pairs,
    clean_title,
    read_html_folder,
    title_section_pairs,
)
from moca.data.records import IMAGE_MARKER

LONG = "This text is long enough to be worth finding by its title."


def picture(folder, name, width=60, height=50):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(name.encode())
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(path)
    return path


def read(folder, body, name="page.html", title="Page"):
    page = folder / name
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(f"<html><head><title>{title}</title></head><body>{body}</body></html>")
    return read_html_folder(folder)


def captions(corpus):
    return [(figure.image.name, figure.caption) for figure in corpus.figures]


DOCBOOK = """
<div class="navheader"><table><tr><th>6.5. Flare</th><td><a href="n.html"><img src="a.png"
 alt="Next"/></a></td></tr></table></div>
<div class="sect2"><h3 class="title"><a id="x"></a>6.5. Gradient\u00a0Flare</h3>
<div class="sect3"><h4>6.5.1. Overview</h4>
<div class="figure"><p class="title"><strong>Figure 17.115. Example of a flare</strong></p>
<div class="figure-contents">
 <div class="mediaobject"><img src="a.png" alt="Example of a flare"/>
  <div class="caption"><p>Original image</p></div></div>
 <div class="mediaobject"><img src="b.png" alt="Example of a flare"/>
  <div class="caption"><p>Filter <span>applied</span></p></div></div>
</div></div>
<p>The effect looks like a photograph
   of a blinding light.</p>
<div class="note"><table><tr><td><img alt="[Note]" src="note.png"/></td><td><p>Mind.</p></td>
</tr></table></div>
<p>Press <span class="guiicon"><img src="wide.png"/></span> now.</p>
<div class="informalfigure"><div class="mediaobject"><img src="c.png"/>
<div class="caption"><p>Alone</p></div></div></div>
</div></div>
<div class="navfooter"><p>Prev Next</p></div>
"""


def test_docbook(tmp_path):
    for name in ("a.png", "b.png", "c.png", "note.png"):
        picture(tmp_path, name)
    picture(tmp_path, "wide.png", 200, 30)
    corpus = read(tmp_path, DOCBOOK)
    assert captions(corpus) == [
        ("a.png", "Example of a flare: Original image"),
        ("b.png", "Example of a flare: Filter applied"),
        ("c.png", "Alone"),
    ]
    [section] = corpus.sections
    assert (section.title, section.page_title) == ("Overview", "Gradient Flare")
    assert section.parents == ("Gradient Flare",)
    assert section.body.text.split("\n") == [
        "Figure 17.115. Example of a flare",
        IMAGE_MARKER,
        "Original image",
        IMAGE_MARKER,
        "Filter applied",
        "The effect looks like a photograph of a blinding light.",
        "Mind.",
        "Press now.",
        IMAGE_MARKER,
        "Alone",
    ]
    assert [path.name for path in section.body.images] == ["a.png", "b.png", "c.png"]
    assert section.document.text == "Overview\n" + section.body.text
    assert not corpus.skipped


@pytest.mark.parametrize(
    ("html", "caption"),
    [
        ("<figure><img src='a.png'><figcaption>A boat</figcaption></figure>", "A boat"),
        ("<figure><div><a href='x.html'><img src='a.png'></a></div>"
         "<figcaption><p>Fig. 3 \u2013 A boat</p></figcaption></figure>", "A boat"),
        ("<div class='figure align-center'><a class='reference internal image-reference' "
         "href='a.png'><img src='a.png'></a><p class='caption'><span class='caption-number'>"
         "Fig. 1 </span><span class='caption-text'>A boat</span>"
         "<a class='headerlink' href='#x'>\u00b6</a></p></div>", "A boat"),
        ("<div class='imageblock'><div class='content'><img src='a.png' alt='x'></div>"
         "<div class='title'>Figure 2. A boat</div></div>", "A boat"),
        ("<p><img src='a.png'></p><p class='caption'>A boat</p>", "A boat"),
        ("<p><img src='a.png'><br>\n<em>Figure 4: A boat</em></p>", "A boat"),
        ("<p><img src='a.png'></p><p>Figure 4. A boat</p>", "A boat"),
        ("<img src='a.png' alt='a red boat'>", "a red boat"),
        ("<figure><figure><img src='a.png'><figcaption>left</figcaption></figure>"
         "<figcaption>Boats.</figcaption></figure>", "Boats. left"),
        ("<figure><img src='a.png' alt='a red boat'></figure>", "a red boat"),
        ("<div class='thumb'><a href='big.html'><img src='a.png'></a><div class='thumbcaption'>"
         "<div class='magnify'><a href='big.html'>[*]</a></div>A boat</div></div>", "A boat"),
    ],
)  # fmt: skip
def test_captions(tmp_path, html, caption):
    picture(tmp_path, "a.png")
    corpus = read(tmp_path, f"<h1>Boats</h1>{html}<p>More text.</p>")
    assert captions(corpus) == [("a.png", caption)]


@pytest.mark.parametrize(
    "html",
    [
        "<p><img src='a.png' alt='boat'></p><p>Plain text.</p>",
        "<p><img src='boats/red_boat-1.png' alt='Red boat 1'></p><p>Plain text.</p>",
        "<p><img src='a.png' alt='a.png'></p><p>Figures 3 and 4 show nothing.</p>",
        "<p><img src='a.png'></p><p>Figure-like things are many.</p>",
    ],
)
def test_images_without_caption_stay_in_the_text(tmp_path, html):
    picture(tmp_path, "a.png")
    picture(tmp_path, "boats/red_boat-1.png")
    corpus = read(tmp_path, f"<h1>Boats</h1>{html}")
    assert captions(corpus) == [] and len(corpus.sections[0].body.images) == 1


@pytest.mark.parametrize(
    "html",
    [
        "<nav><img src='a.png'></nav>",
        "<header><img src='a.png'><a>menu</a></header>",
        "<footer><img src='a.png'></footer>",
        "<p><a href='next.html'><img src='a.png'></a></p>",
        "<p>Press <img src='icon.png'> to go.</p>",
        "<img src='dot.png'>",
        "<table><tr><td><img src='icon.png' alt='Rotate the boat'></td><td>R</td></tr></table>",
        "<div role='navigation'><img src='a.png'></div>",
        "<table><tr><td class='icon'><img src='a.png'></td></tr></table>",
        "<script>var x = '<img src=a.png>'</script>",
    ],
)
def test_decoration_is_left_out(tmp_path, html):
    picture(tmp_path, "a.png")
    picture(tmp_path, "icon.png", 40, 40)
    picture(tmp_path, "dot.png", 300, 10)
    corpus = read(tmp_path, f"<h1>Boats</h1>{html}<p>Text of the page.</p>")
    [section] = corpus.sections
    assert not section.body.images and not corpus.figures and not corpus.skipped
    assert "menu" not in section.body.text


def test_an_image_repeated_on_many_pages_is_an_ornament(tmp_path):
    picture(tmp_path, "logo.png")
    picture(tmp_path, "a.png")
    for i in range(REPEATED_PAGES):
        html = "<figure><img src='a.png'><figcaption>A boat</figcaption></figure>"
        body = f"<img src='logo.png' alt='Our fine logo'><h1>T {i}</h1><p>text {i}</p>{html}"
        corpus = read(tmp_path, body, f"p{i}.html")
    assert {caption for _, caption in captions(corpus)} == {"A boat"}
    assert all(len(section.body.images) == 1 for section in corpus.sections)
    assert corpus.skipped == {"ornament": REPEATED_PAGES}


def test_what_cannot_be_used_is_counted(tmp_path, odd_dds):
    folder = tmp_path / "manual"
    good = picture(folder, "good.png")
    picture(tmp_path, "outside.png")
    whole = good.read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    damaged = [f"damaged.{end}" for end in ("png", "gif", "jpg")]
    for name in damaged:
        content = picture(folder, name).read_bytes()
        half = len(content) // 2
        (folder / name).write_bytes(content[:half] + b"\xff\xc4\0\0" * 9 + content[half + 36 :])
    (folder / "garbage.png").write_bytes(b"garbage")
    (folder / "odd.dds").write_bytes(odd_dds)
    (folder / "drawing.svg").write_text("<svg/>")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    sources = ["good.png?x=1#y", "./sub/../good.png", "absent.png", "cut.png", "garbage.png"]
    sources += ["odd.dds", *damaged]
    sources += ["drawing.svg", "../outside.png", "../../../etc/hostname", "/etc/hostname"]
    sources += ["http://x.org/a.png", "//x.org/a.png", "data:image/png;base64,AAAA", "link.png"]
    sources += ["file:///etc/passwd", "", "http://[bad", "a\0b.png"]
    corpus = read(folder, "<h1>T</h1><p>text</p>" + "".join(f"<img src='{s}'>" for s in sources))
    assert {path.name for path in corpus.sections[0].body.images} == {"good.png"}
    assert corpus.skipped["image outside the folder"] == 4
    assert corpus.skipped["remote image"] == 3
    assert corpus.skipped["image embedded as data"] == 1
    assert corpus.skipped["broken image"] == 6
    assert corpus.skipped["image in a vector format"] == 1
    assert corpus.skipped["image without source"] == 1
    assert corpus.skipped["image with a malformed source"] == 1
    assert corpus.skipped["missing image"] >= 1
    assert corpus.skipped["undecodable characters of a page"] == 1
    assert sum(corpus.skipped.values()) == len(sources) - 2 + 1


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_images_beyond_the_limits_are_counted(tmp_path):
    sizes = {"large": (12000, 9000), "huge": (20000, 10000), "long": (9000, 40), "rule": (9000, 2)}
    for name, size in sizes.items():
        PIL.Image.new("1", size).save(tmp_path / f"{name}.png")
    picture(tmp_path, "good.png")
    names = [*sizes, "good"]
    figures = "".join(f"<figure><img src='{name}.png'></figure>" for name in names)
    corpus = read(tmp_path, f"<h1>T</h1><p>text</p>{figures}")
    assert [path.name for path in corpus.sections[0].body.images] == ["good.png"]
    assert corpus.skipped == {"image too large": 2, "image too long": 1}


def test_pages_that_are_broken_never_stop_the_reading(tmp_path):
    (tmp_path / "empty.html").write_text("")
    (tmp_path / "deep.html").write_text("<div>" * 9000 + "text")
    (tmp_path / "bytes.html").write_bytes(bytes(range(256)) * 4)
    (tmp_path / "frames.html").write_text(
        "<html><frameset><frame src='a.html'></frameset><noframes>No frames</noframes></html>"
    )
    (tmp_path / "open.htm").write_text("<h1>Open <b>tags<p>never closed <i>text")
    (tmp_path / "latin.html").write_bytes(
        "<meta charset=iso-8859-1><h1>Größe</h1><p>Über alles</p>".encode("latin-1")
    )
    (tmp_path / "wide.html").write_text("<h1>Größe</h1><p>Zwei</p>", encoding="utf-16")
    corpus = read(tmp_path, f"<h2>Good</h2><p>{LONG}</p>", "good.html")
    titles = {(section.page, section.title) for section in corpus.sections}
    assert {("good.html", "Good"), ("latin.html", "Größe"), ("wide.html", "Größe")} <= titles
    assert any(page == "open.htm" for page, _ in titles)
    assert {"empty.html", "frames.html"}.isdisjoint(page for page, _ in titles)
    assert corpus.skipped == {
        "page that cannot be parsed": 1,
        "page without text": 2,
        "rest of a page that cannot be parsed": 1,
        "undecodable characters of a page": 1,
    }
    assert [section.page for section in corpus.sections] == sorted(
        section.page for section in corpus.sections
    )


def test_tags_that_are_never_closed_and_long_texts_lose_nothing(tmp_path):
    items = "".join(f"<li><b>line {i}" for i in range(400))
    read(tmp_path, f"<h1>Old</h1>{items}", "deep.html")
    read(tmp_path, "<h1>" + "<i>a" * 1900, "heading.html")
    corpus = read(tmp_path, f"<h1>Long</h1>{'x' * 11_000_000}<p>end</p>", "long.html")
    deep, long = corpus.sections
    assert deep.body.text.split("\n") == [f"line {i}" for i in range(400)]
    assert long.body.text.endswith("x\nend") and len(long.body.text) > 11_000_000
    assert corpus.skipped == {"page without text": 1}


def test_the_beginning_of_a_page_that_breaks_off_is_kept(tmp_path):
    corpus = read(tmp_path, "<h1>A</h1>start" + "<div>" * 9000 + "lost")
    assert corpus.sections[0].body.text == "start"
    assert corpus.skipped == {"rest of a page that cannot be parsed": 1}


@pytest.mark.parametrize(
    "attributes",
    [
        "src='data:image/gif;base64,R0lG' data-src='a.png'",
        "srcset='a.png 1x, b.png 2x'",
        "src='a.png' srcset='b.png 2x' data-src='b.png'",
    ],
)
def test_images_that_scripts_load_late(tmp_path, attributes):
    picture(tmp_path, "a.png")
    corpus = read(tmp_path, f"<p>text</p><img {attributes}><noscript><img src='a.png'></noscript>")
    assert len(corpus.sections[0].body.images) == 1 and not corpus.skipped


def test_headings_without_text_are_counted(tmp_path):
    corpus = read(tmp_path, "<h1>A</h1><h2>B</h2><h3>C</h3>text<h2>D</h2><h2>E</h2>text<h2>F</h2>")
    assert [section.title for section in corpus.sections] == ["C", "E"]
    assert corpus.skipped == {"heading without text": 2}


def test_figures_never_closed_have_each_its_caption(tmp_path):
    picture(tmp_path, "a.png")
    picture(tmp_path, "b.png")
    html = "<figure><img src='a.png'><figcaption>One<figure><img src='b.png'><figcaption>Two"
    assert captions(read(tmp_path, html)) == [("a.png", "One"), ("b.png", "One: Two")]


def test_what_is_left_out_is_told(tmp_path, caplog):
    folder, elsewhere = tmp_path / "manual", tmp_path / "elsewhere"
    read(elsewhere, "<p>not read</p>")
    folder.mkdir()
    (folder / "link").symlink_to(elsewhere)
    with caplog.at_level(logging.WARNING):
        corpus = read(folder, f"<h1>T</h1><p>{LONG}</p><img src='absent.png'>")
    assert [section.page for section in corpus.sections] == ["page.html"]
    assert "manual: left out 1 linked folder, 1 missing image" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert not read_html_folder(elsewhere).skipped
    assert not caplog.records


def test_a_folder_without_pages_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        read_html_folder(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"no \.html"):
        read_html_folder(tmp_path)


def test_special_tokens_in_a_page_stay_text(tmp_path):
    corpus = read(
        tmp_path, f"<h1>{IMAGE_MARKER} T</h1><p>x {IMAGE_MARKER}</p>".replace("<|", "&lt;|")
    )
    [section] = corpus.sections
    assert "<|" not in section.document.text and not section.document.images


def test_layout_of_text(tmp_path):
    html = (
        "<h1>T</h1>before<ul><li>one</li><li>two <b>bold</b>er</li></ul>"
        "<table><tr><td>a</td><td>b</td></tr><tr><td>c</td></tr></table>"
        "<pre>x = 1\n  y</pre><dl><dt>term</dt><dd>meaning</dd></dl>a<br>b"
        "<div class='toc'>Contents</div><!-- hidden -->"
    )
    assert read(tmp_path, html).sections[0].body.text.split("\n") == [
        *("before", "one", "two bolder", "a b", "c", "x = 1", "y", "term", "meaning", "a", "b")
    ]


@pytest.mark.parametrize(
    ("heading", "title"),
    [
        ("6.5.1. Overview", "Overview"),
        ("Chapter 17. Filters", "Filters"),
        ("Appendix A. Licence", "Licence"),
        ("Part II. Use", "Use"),
        ("1.2 Install\u00b6", "Install"),
        ("A.3. Notes", "Notes"),
        ("3D Transform", "3D Transform"),
        ("A Simple Guide", "A Simple Guide"),
        ("Section", "Section"),
        ("2. ", "2."),
    ],
)
def test_clean_title(heading, title):
    assert clean_title(heading) == title


def test_title_pairs_are_unique_and_do_not_start_with_the_title(tmp_path):
    def page(name, extra=""):
        options = f"<h2>Options</h2><p>Options</p><p>{name}: {LONG}</p>"
        return f"<h1>{name}</h1><p>{name} {LONG}</p>{options}{extra}"

    read(tmp_path, page("Blur", f"<h2>Short</h2><p>tiny</p><h2>Use</h2><p>1 {LONG}</p>"), "a.html")
    twice = f"<h2>Use</h2><p>2 {LONG}</p><h2>Use</h2><p>3 {LONG}</p>"
    deep = f"<h2>Left</h2><h3>Tab</h3><p>4 {LONG}</p><h2>Right</h2><h3>Tab</h3><p>5 {LONG}</p>"
    corpus = read(tmp_path, page("Sharpen", twice + deep), "b.html")
    pairs = title_section_pairs(corpus)
    assert [pair.query.text for pair in pairs] == [
        *("Blur", "Blur: Options", "Blur: Use", "Sharpen", "Sharpen: Options"),
        *("Sharpen: Left: Tab", "Sharpen: Right: Tab"),
    ]
    assert pairs[1].positive.text == f"Blur: {LONG}"
    assert {pair.task for pair in pairs} == {"title_section"}
    assert all(pair.name for pair in pairs)


def test_a_repeated_section_is_kept_once(tmp_path):
    read(tmp_path, f"<h2>Use</h2><p>{LONG}</p>", "a.html")
    corpus = read(tmp_path, f"<h1>All</h1><h2>Use</h2><p>{LONG}</p>", "print.html")
    assert [section.page for section in corpus.sections] == ["a.html"]
    assert corpus.skipped["repeated section"] == 1


def test_caption_pairs(tmp_path):
    picture(tmp_path, "images/a.png")
    figure = "<figure><img src='../images/a.png'><figcaption>A boat</figcaption></figure>"
    read(tmp_path, f"<h1>A</h1>{figure}{figure}", "one/a.html")
    corpus = read(tmp_path, f"<h1>B</h1>{figure}", "two/b.html")
    assert [figure.page for figure in corpus.figures] == ["one/a.html", "two/b.html"]
    [pair] = caption_figure_pairs(corpus)
    assert (pair.query.text, pair.positive.text) == ("A boat", IMAGE_MARKER)
    assert pair.task == "caption_figure" and pair.name.startswith("one/a.html")


def test_progress_wraps_the_pages(tmp_path):
    read(tmp_path, "<p>a</p>", "a.html")
    seen = []
    read_html_folder(tmp_path, progress=lambda pages: seen.extend(pages) or pages)
    assert [path.name for path in seen] == ["a.html"]
