"""The quickstart's data on small made-up sources: fetching, splits, and that nothing leaks."""

import io
import os
import stat
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from moca.data.images import ImageSettings, decode
from moca.data.records import IMAGE_MARKER, Document, Pair
from moca.data.sources import load_documents
from moca.quickstart import allocator, emojis, fetch, wordnet
from moca.quickstart.baseline import Baseline, BaselineSettings, gram_ids, load_square, run_baseline
from moca.quickstart.corpora import load_corpora
from moca.quickstart.fetch import PACKAGES, FetchError, fetch_debian
from moca.quickstart.manual import test_pages as pages_to_hold
from moca.quickstart.prepare import write_corpora
from moca.quickstart.splits import Pictures, keep_images, text_key, unique_items, without_leaks

OWN_FOLDER = "`make quickstart DOCS=path/to/html/folder` uses any folder of HTML pages"


def noise(seed: int, size: tuple[int, int] = (96, 96)) -> PIL.Image.Image:
    """Smooth coloured noise, which survives resizing."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return PIL.Image.fromarray(coarse).resize(size, PIL.Image.Resampling.BICUBIC)


def png(image: PIL.Image.Image) -> bytes:
    target = io.BytesIO()
    image.save(target, "PNG")
    return target.getvalue()


def picture(image: PIL.Image.Image) -> Document:
    return Document(IMAGE_MARKER, (png(image),))


def pair(query: str, answer: str | Document) -> Pair:
    return Pair(Document(query), answer if isinstance(answer, Document) else Document(answer))


# fetching


def write_tool(folder: Path, name: str, code: str) -> None:
    """A stand-in for a command of the system."""
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{code}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


APT = """
import pathlib, sys
log = pathlib.Path(__file__).with_name("log")
with log.open("a") as file:
    file.write(" ".join(sys.argv[1:]) + chr(10))
fresh = any(word.startswith("Dir::State::Lists=") for word in sys.argv)
if "download" in sys.argv:
    if not fresh and {stale}:
        sys.exit("E: Unable to locate package")
    for name in sys.argv[sys.argv.index("download") + 1 :]:
        pathlib.Path(name + "_1_all.deb").write_text(name)
"""
DPKG = """
import pathlib, sys
_, flag, archive, target = sys.argv
name = pathlib.Path(archive).read_text()
if name == {broken!r}:
    sys.exit("dpkg-deb: error: archive is broken")
(pathlib.Path(target) / "usr").mkdir(parents=True)
(pathlib.Path(target) / "usr" / name).touch()
"""


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A PATH on which only our stand-ins are."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def install(stale: bool = False, broken: str = "") -> Path:
        write_tool(folder, "apt-get", APT.format(stale=stale))
        write_tool(folder, "dpkg", DPKG.format(broken=broken))
        return folder / "log"

    return install


def test_packages_are_fetched_once(tmp_path, tools):
    log = tools()
    said: list[str] = []
    roots = fetch_debian(tmp_path / "cache", said.append)
    assert {name: (root / "usr" / name).is_file() for name, root in roots.items()} == dict.fromkeys(
        PACKAGES, True
    )
    assert said == [f"fetching {', '.join(PACKAGES)}"]
    assert fetch_debian(tmp_path / "cache", said.append) == roots
    assert len(said) == 1 and len(log.read_text().splitlines()) == 1


def test_stale_lists_are_renewed_in_the_cache_only(tmp_path, tools):
    log = tools(stale=True)
    fetch_debian(tmp_path / "cache", lambda text: None)
    first, update, second = log.read_text().splitlines()
    assert "Dir::" not in first
    for command in (update, second):
        assert f"Dir::State::Lists={tmp_path}/cache/apt/lists" in command
        assert f"Dir::Cache={tmp_path}/cache/apt/cache" in command
    assert update.endswith("update")


def test_an_interrupted_fetch_leaves_whole_packages_only(tmp_path, tools):
    tools(broken=PACKAGES[1])
    cache = tmp_path / "cache"
    with pytest.raises(FetchError, match="archive is broken") as caught:
        fetch_debian(cache, lambda text: None)
    assert OWN_FOLDER in str(caught.value)
    assert sorted(path.name for path in cache.iterdir()) == [PACKAGES[0]]
    log = tools()
    fetch_debian(cache, lambda text: None)
    assert log.read_text().splitlines()[-1].endswith(f"download {' '.join(PACKAGES[1:])}")


def test_without_apt_the_message_says_what_works(tmp_path, tools):
    with pytest.raises(FetchError, match="apt-get and dpkg cannot be found") as caught:
        fetch_debian(tmp_path / "cache", lambda text: None)
    assert OWN_FOLDER in str(caught.value)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, tools):
    tools()
    (tmp_path / "file").touch()
    with pytest.raises(FetchError, match=r"cannot write .*file/cache"):
        fetch_debian(tmp_path / "file" / "cache", lambda text: None)


def test_tcmalloc_of_the_system_comes_before_a_package(tmp_path, tools, monkeypatch, capsys):
    tools()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(allocator, "find_library", lambda name: None)
    assert allocator.find_tcmalloc() is None  # the stand-ins' packages hold no library
    assert "libtcmalloc-minimal4 holds no libtcmalloc_minimal.so.4" in capsys.readouterr().err
    newer = tmp_path / fetch.DEFAULT_CACHE / allocator.PACKAGES[1]
    library = newer / "usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4"
    library.parent.mkdir(parents=True)
    library.touch()
    assert allocator.find_tcmalloc() == library
    assert "fetching" not in capsys.readouterr().err
    monkeypatch.setattr(allocator, "find_library", lambda name: f"lib{name}.so.4")
    assert allocator.find_tcmalloc() == "libtcmalloc_minimal.so.4"


def test_without_tcmalloc_the_reason_is_told(tmp_path, tools, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(allocator, "find_library", lambda name: None)
    assert allocator.find_tcmalloc() is None
    told = capsys.readouterr().err
    assert "slower without tcmalloc" in told and "apt-get and dpkg cannot be found" in told


# what is the same


def test_pictures_are_known_by_their_pixels(tmp_path):
    pictures = Pictures()
    image = noise(1)
    path = tmp_path / "a.bmp"
    image.save(path)
    number = pictures(png(image))
    assert pictures(path) == pictures(str(path)) == pictures(image) == number
    other = pictures(noise(2))
    assert other != number
    small = pictures(png(image.resize((64, 64), PIL.Image.Resampling.BOX)))
    assert small != number
    assert pictures.near([number]) == {number, small}
    assert pictures.near([other]) == {other}
    stretched = pictures(image.resize((96, 48)))
    assert stretched not in pictures.near([number])


def test_ambiguous_test_items_are_left_out():
    red, blue = noise(1), noise(2)
    copy = red.resize((64, 64), PIL.Image.Resampling.BOX)
    items = [
        pair("one", picture(red)),
        pair("ONE ", picture(blue)),
        pair("two", picture(red)),
        pair("three", picture(copy)),
        pair("four", "same text"),
        pair("five", "Same  text"),
    ]
    kept, dropped = unique_items(items, Pictures(), near=True)
    assert [item.query.text for item in kept] == ["one", "four"]
    assert sum(dropped.values()) == 4
    exact, _ = unique_items(items, Pictures())
    assert [item.query.text for item in exact] == ["one", "three", "four"]


def test_training_loses_what_the_test_shows():
    pictures = Pictures()
    shown, free = png(noise(1)), png(noise(2))
    test = [pair("Held query", Document(IMAGE_MARKER, (shown,))), pair("word", "held text")]
    mixed = Document(f"before{IMAGE_MARKER}between{IMAGE_MARKER}after", (shown, free))
    train = [
        pair("held QUERY", "anything"),
        pair("a", "Held text"),
        pair("held text", "b"),
        pair("c", Document(IMAGE_MARKER, (shown,))),
        pair("d", mixed),
        pair("e", Document(IMAGE_MARKER, (free,))),
    ]
    kept, dropped = without_leaks(train, test, {pictures(shown)}, pictures)
    assert [item.query.text for item in kept] == ["d", "e"]
    assert kept[0].positive == Document(f"beforebetween{IMAGE_MARKER}after", (free,))
    assert kept[1] is train[5]
    assert dropped == {
        "training pair with a test text": 3,
        "training pair with a test image": 1,
        "training text that lost a test image": 1,
    }
    assert keep_images(mixed, lambda image: False) == Document("beforebetweenafter")


def test_pages_are_held_out_by_share_and_not_by_order():
    pages = [f"page{i % 50}" for i in range(200)]
    held = pages_to_hold(pages, 0.2)
    assert len(held) == 10
    assert held == pages_to_hold(pages[::-1], 0.2)
    assert pages_to_hold(pages, 0) == set()


# a folder of HTML


def section(title: str, text: str, *figures: tuple[str, str]) -> str:
    shown = "".join(
        f'<figure><img src="{file}"><figcaption>{caption}</figcaption></figure>'
        for file, caption in figures
    )
    return f"<h2>{title}</h2><p>{text}</p>{shown}"


@pytest.fixture(scope="module")
def manual(tmp_path_factory) -> Path:
    """150 pages with a figure each, one that is on all, and on some a smaller copy of a
    neighbour's."""
    root = tmp_path_factory.mktemp("manual")
    noise(1000).save(root / "shared.png")
    for i in range(150):
        noise(i).save(root / f"figure{i}.png")
        noise((i - 1) % 150).resize((64, 64), PIL.Image.Resampling.BOX).save(root / f"copy{i}.png")
        figures = [
            (f"figure{i}.png", f"What number {i} looks like"),
            ("shared.png", "Original image"),
        ]
        if i % 9 == 0:
            figures.append((f"copy{i}.png", f"Again number {i - 1}"))
        text = f"The text of number {i} says at some length what it is good for."
        (root / f"page{i}.html").write_text(
            f"<html><body>{section(f'Subject {i}', text, *figures)}</body></html>"
        )
    (root / "broken.html").write_text(
        section("Broken", "A text that is long enough to be kept as a section.", ("bad.png", "Bad"))
    )
    # Of numbers without a range: whole, yet of no use.
    PIL.Image.new("F", (60, 60)).save(root / "bad.png", "TIFF")
    return root


def test_nothing_of_the_test_is_in_training(manual):
    corpora = load_corpora(docs=manual, progress=False)
    tasks = {task.name: task for task in corpora.tasks}
    assert set(tasks) == {"title-section", "caption-figure"}
    tests = [item for task in tasks.values() for item in task.test]
    trains = [item for task in tasks.values() for item in task.train]
    assert len(tasks["title-section"].test) == pytest.approx(27, abs=2)
    documents = [side for item in trains for side in (item.query, item.positive)]
    documents += corpora.documents["manual"]
    tested = [side for item in tests for side in (item.query, item.positive)]

    def thumbnails(group: list[Document]) -> np.ndarray:
        images = {image for document in group for image in document.images}
        small = [decode(image).resize((8, 8), PIL.Image.Resampling.BOX) for image in images]
        return np.stack([np.asarray(image, float) for image in small])

    texts = {text_key(document.text) for document in documents}
    assert not texts & ({text_key(document.text) for document in tested} - {""})
    gaps = np.abs(thumbnails(tested)[:, None] - thumbnails(documents)).mean(axis=(2, 3, 4))
    # A copy differs by one or two grey levels from what it was made of, other pictures by dozens.
    assert gaps.min() > 10
    pages = {item.name.split(":")[0] for item in tests}
    assert not pages & {document.name.split(":")[0] for document in documents if document.name}


def test_a_manual_gives_whole_items(manual):
    corpora = load_corpora(docs=manual, progress=False)
    sections, figures = corpora.tasks
    assert sections.name == sections.test[0].task == "title-section"
    item = next(item for item in sections.test if item.query.text.startswith("Subject"))
    assert "Subject" not in item.positive.text and "says at some length" in item.positive.text
    assert all(item.positive.text == IMAGE_MARKER for item in figures.test)
    captions = [item.query.text for item in figures.test]
    assert "Original image" not in captions and len(set(captions)) == len(captions)
    assert any("bad.png" in note for note in corpora.notes)
    assert not any("bad.png" in str(document.images) for document in corpora.documents["manual"])
    texts = corpora.tokenizer_texts
    assert len(texts) == len(set(texts)) and not any(IMAGE_MARKER in text for text in texts)
    assert item.query.text not in texts
    row = corpora.summary()[0]
    assert (row["train"], row["test"]) == (len(sections.train), len(sections.test))


def test_splits_are_the_same_every_time(manual):
    first, second = (load_corpora(docs=manual, progress=False) for _ in range(2))
    assert [task.test for task in first.tasks] == [task.test for task in second.tasks]
    assert [task.train for task in first.tasks] == [task.train for task in second.tasks]


def test_written_documents_keep_their_names(manual, tmp_path):
    corpora = load_corpora(docs=manual, progress=False)
    write_corpora(corpora, tmp_path / "data", ImageSettings(), lambda items, label: items)
    written = load_documents(tmp_path / "data/documents/manual.parquet")
    names = [document.name for document in corpora.documents["manual"]]
    assert [document.name for document in written] == names


def test_small_tasks_are_left_out_and_said_so(tmp_path):
    for i in range(140):
        text = section(f"Subject {i}", f"The text of number {i} says what it is good for, briefly.")
        (tmp_path / f"page{i}.html").write_text(text)
    corpora = load_corpora(docs=tmp_path, progress=False)
    assert [task.name for task in corpora.tasks] == ["title-section"]
    assert any("caption-figure left out: 0 training and 0 test" in note for note in corpora.notes)
    for path in list(tmp_path.iterdir())[:135]:
        path.unlink()
    with pytest.raises(ValueError, match="title-section left out"):
        load_corpora(docs=tmp_path, progress=False)
    with pytest.raises(FileNotFoundError, match="absent"):
        load_corpora(docs=tmp_path / "absent", progress=False)


# emoji


def test_variants_are_one_family():
    groups = [
        ["👩‍🍳", "👨🏿‍🍳", "🧑🏽‍🍳"],
        ["🏃", "🏃🏻‍♀️", "🏃🏽‍♂️‍➡️"],
        ["👋", "👋🏾"],
        ["🇫🇷", "🏴󠁧󠁢󠁳󠁣󠁴󠁿", "🏳️‍🌈", "🏁"],
        ["👪", "👨‍👩‍👧", "💏", "👩🏻‍❤️‍💋‍👨🏿", "👭", "🧑🏻‍🤝‍🧑🏿"],
        ["👦", "🧒🏿", "👧"],
        ["🎅🏽", "🧑‍🎄", "🤶"],
        ["🐈", "🐈‍⬛"],
        ["👩‍🦰", "🧑🏿", "👨"],
    ]
    names = [{emojis.family(sign) for sign in group} for group in groups]
    assert [len(found) for found in names] == [1] * len(groups)
    assert len(set.union(*names)) == len(groups)
    lone = {emojis.family(sign) for sign in ("♀️", "♂️", "➡️", "⬛", "🏻", "🟩")}
    assert len(lone) == 6


def test_families_are_held_out_whole_and_tested_in_english():
    signs = [chr(code) for code in range(0x1F400, 0x1F43E)]
    signs += ["👋", "👋🏾", "👋🏿", "🇫🇷", "🇩🇪", "👭", "💏"]
    names = {
        sign: {"en": f"name {i}", "de": f"Name {i}", "fr": "nom"} for i, sign in enumerate(signs)
    }
    images = {sign: png(noise(i)) for i, sign in enumerate(signs)}
    train, test = emojis.emoji_pairs(names, images, test_share=0.3)
    of_image = {data: sign for sign, data in images.items()}
    sides = [{of_image[item.positive.images[0]] for item in items} for items in (train, test)]
    families = [{emojis.family(sign) for sign in side} for side in sides]
    assert not families[0] & families[1]
    assert {"🇫🇷", "🇩🇪", "👭", "💏"} <= sides[0]
    assert len(test) == round(0.3 * len(signs))
    assert all(item.query.text.startswith("name") for item in test)
    count = Counter(item.positive.images[0] for item in train)
    assert set(count.values()) == {3}
    assert emojis.emoji_pairs(names, images, test_share=0.3) == (train, test)


def test_names_have_fourteen_languages():
    names = emojis.read_names()
    assert len(names) > 3000
    assert names["👩‍🍳"]["en"] == "woman cook"
    assert next(iter(names["👩‍🍳"])) == "en" and len(names["👩‍🍳"]) == 14


@pytest.fixture(scope="module")
def font(tmp_path_factory) -> Path:
    """A colour font of two characters and their ligature, each a bitmap of its own colour."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.ttLib import newTable
    from fontTools.ttLib.tables._g_l_y_f import Glyph
    from fontTools.ttLib.tables.BitmapGlyphMetrics import SmallGlyphMetrics
    from fontTools.ttLib.tables.C_B_D_T_ import cbdt_bitmap_format_17
    from fontTools.ttLib.tables.E_B_L_C_ import (
        BitmapSizeTable,
        SbitLineMetrics,
        Strike,
        eblc_index_sub_table_1,
    )

    glyphs = ["first", "second", "both"]
    builder = FontBuilder(1024, isTTF=True)
    builder.setupGlyphOrder([".notdef", *glyphs])
    builder.setupCharacterMap({ord("A"): "first", ord("B"): "second"})
    builder.setupGlyf(dict.fromkeys([".notdef", *glyphs], Glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys([".notdef", *glyphs], (1024, 0)))
    builder.setupHorizontalHeader()
    builder.setupPost()
    builder.addOpenTypeFeatures("feature ccmp { sub first second by both; } ccmp;")
    data, index = newTable("CBDT"), newTable("CBLC")
    data.version = index.version = 3.0
    bitmaps = {}
    for name, colour in zip(glyphs, ("red", "lime", "blue"), strict=True):
        bitmap = bitmaps[name] = cbdt_bitmap_format_17(b"", builder.font)
        bitmap.metrics = SmallGlyphMetrics()
        for field in ("height", "width", "Advance"):
            setattr(bitmap.metrics, field, 20)
        bitmap.metrics.BearingX = bitmap.metrics.BearingY = 0
        bitmap.imageData = png(PIL.Image.new("RGBA", (20, 10), colour))
    data.strikeData = [bitmaps]
    strike = Strike()
    size = strike.bitmapSizeTable = BitmapSizeTable()
    size.colorRef, size.flags, size.bitDepth = 0, 1, 32
    size.ppemX = size.ppemY = 20
    for direction in ("hori", "vert"):
        line = SbitLineMetrics()
        for field in dir_fields():
            setattr(line, field, 0)
        setattr(size, direction, line)
    table = eblc_index_sub_table_1(b"", builder.font)
    table.indexFormat, table.imageFormat, table.imageDataOffset = 1, 17, 0
    table.firstGlyphIndex, table.lastGlyphIndex, table.names = 1, 3, glyphs
    strike.indexSubTables = [table]
    index.strikes = [strike]
    builder.font["CBDT"], builder.font["CBLC"] = data, index
    path = tmp_path_factory.mktemp("font") / "colour.ttf"
    builder.save(path)
    return path


def dir_fields() -> list[str]:
    return [
        "ascender",
        "descender",
        "widthMax",
        "caretSlopeNumerator",
        "caretSlopeDenominator",
        "caretOffset",
        "minOriginSB",
        "minAdvanceSB",
        "maxBeforeBL",
        "minAfterBL",
        "pad1",
        "pad2",
    ]


def test_the_font_resolves_sequences(font):
    reader = emojis.EmojiFont(font)
    shown = {
        text: decode(bitmap).getpixel((5, 5))
        for text in ("A", "B", "AB", "A\ufe0f")
        if (bitmap := reader.bitmap(text))
    }
    red, green, blue = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    assert shown == {"A": red, "B": green, "AB": blue, "A\ufe0f": red}
    assert reader.bitmap("C") is None and reader.bitmap("BA") is None
    assert set(emojis.render_all(reader, ["A", "C"], iter)) == {"A"}


def test_bitmaps_are_centred_on_a_white_square():
    bitmap = png(PIL.Image.new("RGBA", (20, 10), "red"))
    image = decode(emojis.render(bitmap, 16))
    assert image.size == (16, 16)
    assert image.getpixel((8, 8)) == (255, 0, 0)
    assert image.getpixel((8, 0)) == image.getpixel((8, 15)) == (255, 255, 255)


# WordNet

DATA = {
    "noun": [
        "  1 This software and database is being provided to you, the LICENSEE, by  ",
        '00000001 03 n 02 cat 0 true_cat 0 001 @ 00000002 n 0000 | feline mammal; "a cat"; "b"  ',
        "00000002 03 n 01 kitten 0 000 | young of a cat  ",
        "00000003 03 n 0a a 0 b 0 c 0 d 0 e 0 f 0 g 0 h 0 i 0 j 0 000 | ten letters  ",
    ],
    "verb": ['00000004 29 v 01 cat 0 000 01 + 02 00 | beat with a "cat"; whip  '],
    "adj": ["00000005 00 a 01 galore(ip) 0 000 | in great numbers; `plenty'  "],
    "adv": ['00000006 02 r 01 well 0 000 | "she did well"  '],
}


def test_wordnet_lines_are_parsed(tmp_path):
    for name, lines in DATA.items():
        (tmp_path / f"data.{name}").write_text("\n".join(lines) + "\n")
    found = list(wordnet.read_synsets(tmp_path))
    assert found[0] == wordnet.Synset(("cat", "true cat"), "feline mammal")
    assert found[1] == wordnet.Synset(("kitten",), "young of a cat")
    assert len(found[2].words) == 10
    assert found[3].gloss == 'beat with a "cat"; whip'
    assert found[4] == wordnet.Synset(("galore",), "in great numbers; `plenty'")
    assert len(found) == 5
    (tmp_path / "data.adv").write_text("00000006 02 r zz | nothing\n")
    with pytest.raises(ValueError, match=r"data\.adv:1: no line of a WordNet data file"):
        list(wordnet.read_synsets(tmp_path))
    os.remove(tmp_path / "data.adv")
    with pytest.raises(FileNotFoundError, match=r"data\.adv"):
        list(wordnet.read_synsets(tmp_path))


def test_words_and_glosses_of_the_test_are_unseen():
    synsets = [
        wordnet.Synset((f"word{i}", f"other{i % 50}"), f"gloss {i % 180}") for i in range(200)
    ]
    synsets += [wordnet.Synset((f"Name{i}",), f"person {i}") for i in range(50)]
    train, test, dropped = wordnet.gloss_pairs(synsets, test_words=15)
    words = {text_key(item.query.text) for item in train}
    glosses = {text_key(item.positive.text) for item in train}
    assert len(test) == 15
    assert not words & {text_key(item.query.text) for item in test}
    assert not glosses & {text_key(item.positive.text) for item in test}
    assert len({item.positive.text for item in test}) == len(test)
    assert all(item.query.text.startswith("word") for item in test)
    assert len(train) + len(test) + sum(dropped.values()) == 450
    fewer, more = (wordnet.gloss_pairs(synsets, test_words=n)[1] for n in (5, 1000))
    assert {item.query.text for item in fewer} <= {item.query.text for item in more}
    assert len(more) <= 20


# the baseline


def test_the_baseline_learns_to_find_pictures():
    words = ["red", "lime", "blue", "yellow", "black"]
    images = [PIL.Image.new("RGB", (20, 20), word) for word in words]
    pairs = [pair(f"a {w} square", picture(i)) for w, i in zip(words, images, strict=True)]
    settings = BaselineSettings(
        steps=100, batch=5, dim=16, side=20, width=8, buckets=512, dropout=0, learning_rate=1e-2
    )
    first = run_baseline(pairs, pairs, settings, ks=(1,), progress=False)
    assert first["recall@1"] == 1
    assert run_baseline(pairs, pairs, settings, ks=(1,), progress=False) == first


def test_baseline_inputs():
    ids = gram_ids("Cat cat", 100)
    assert ids.min() >= 1 and ids.max() < 100 and len(ids) % 2 == 0
    np.testing.assert_array_equal(ids[: len(ids) // 2], ids[len(ids) // 2 :])
    square = load_square(picture(PIL.Image.new("RGB", (20, 10), "red")), 8)
    assert square.shape == (3, 8, 8) and square.dtype == torch.uint8
    assert square[:, 4, 4].tolist() == [255, 0, 0] and square[:, 0, 0].tolist() == [255] * 3
    with pytest.raises(ValueError, match="expected one image, got 0"):
        load_square(Document("text"), 8)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        BaselineSettings(steps=0)
    embedded = Baseline(BaselineSettings(dim=8, side=16, width=4, buckets=64)).embed(
        [Document("one"), Document("")]
    )
    assert embedded.shape == (2, 8) and bool(torch.isfinite(embedded).all())
