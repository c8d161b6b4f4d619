"""Which files of a folder are read as pages, and how their bytes become text."""

import os
from pathlib import Path

import PIL.Image
import pytest
from moca.data.html import read_html_folder

META = "<meta charset={}>"
EQUIV = '<META http-equiv="Content-Type" content="text/html; charset={}">'
XML = '<?xml version="1.0" encoding="{}"?>'


@pytest.mark.parametrize(
    ("declared", "encoding", "text"),
    [
        *((META.format(label), "cp1252", "“café”") for label in ("iso-8859-1", "Latin1", "ascii")),
        (EQUIV.format("x-sjis"), "cp932", "日本語①"),
        ("<meta charset=koi8-r/>", "koi8-r", "Текст"),
        (META.format("'gb2312'"), "gb18030", "中文鎔"),
        (EQUIV.format("ISO-2022-JP"), "iso2022_jp", "日本語"),
        (XML.format("euc-jp"), "euc_jp", "日本語"),
        (XML.format("euc-jp") + META.format("koi8-r"), "koi8-r", "Текст"),
        (f"<!-- {META.format('koi8-r')} -->" + META.format("windows-874"), "cp874", "ไทย"),
        ('<meta name=d content="charset=koi8-r > it">' + META.format("utf-8"), "utf-8", "Текст"),
        ("<meta name='d' content='charset=koi8-r'>" + EQUIV.format("cp1251"), "cp1251", "Текст"),
        ("<meta name=d content='charset=koi8-r' data-charset=koi8-r>", "utf-8", "Текст"),
        (META.format("utf-16"), "utf-8", "日本語"),
        (META.format("utf-16"), "utf-16-le", "日本語"),
        (META.format("utf-16"), "utf-16-be", "日本語"),
        (META.format("utf-8"), "utf-16", "日本語"),
        (META.format("koi8-r"), "utf-8-sig", "日本語"),
        ("", "utf-8", "“café”"),
        ("", "cp1252", "“café”"),
    ],
)
def test_character_sets_are_those_of_browsers(tmp_path, declared, encoding, text):
    (tmp_path / "a.html").write_bytes(f"{declared}<h1>T</h1><p>{text}</p>".encode(encoding))
    corpus = read_html_folder(tmp_path)
    assert corpus.sections[0].body.text == text and not corpus.skipped


def test_what_cannot_be_decoded_is_counted(tmp_path):
    pages = {"a": b"<meta charset=foo-99>gr\xfcn", "b": b"<meta charset=hex>", "c": b"\x81\xfcn"}
    pages["d"] = b"<meta charset=shift_jis>start<p>\xff\x81</p>end"
    pages["e"] = "end".encode("utf-32-le")
    for name, content in pages.items():
        (tmp_path / f"{name}.html").write_bytes(b"<h1>T</h1>" + content + name.encode())
    corpus = read_html_folder(tmp_path)
    texts = [section.body.text for section in corpus.sections]
    assert texts[:3] == ["grüna", "b", "\ufffdünc"]
    assert texts[3].startswith("start") and texts[3].endswith("\ufffd\nendd")
    assert corpus.skipped == {
        "unknown character set of a page": 2,
        "undecodable characters of a page": 3,
    }


def test_pages_and_folders_that_are_not_read_are_counted(tmp_path, picture, monkeypatch):
    def refuse(function, name="locked"):
        def refusing(path, *args):
            if name in str(path):
                raise PermissionError(13, "Permission denied", str(path))
            return function(path, *args)

        return refusing

    names = ["locked.html", "locked/a.html", ".hidden.html", ".hidden/a.html", "sub/.git/a.htm"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("<p>text</p>")
    (tmp_path / "good.html").write_text(
        "<p>text</p><img src='locked.png'><img src='locked/a.png'><img src='absent.png'>"
    )
    for name in ("locked.png", "locked/a.png"):
        (tmp_path / name).write_bytes(picture(50, 60))
    (tmp_path / "dangling.html").symlink_to("nowhere.html")
    (tmp_path / "loop.html").symlink_to("loop.html")
    os.mkfifo(tmp_path / "pipe.html")
    (tmp_path / "folder.html").mkdir()
    monkeypatch.setattr(os, "scandir", refuse(os.scandir))
    monkeypatch.setattr(Path, "read_bytes", refuse(Path.read_bytes))
    monkeypatch.setattr(Path, "is_file", refuse(Path.is_file, "locked/"))
    monkeypatch.setattr(PIL.Image, "open", refuse(PIL.Image.open))
    corpus = read_html_folder(tmp_path)
    assert [section.page for section in corpus.sections] == ["good.html"]
    assert corpus.skipped == {
        **{"unreadable folder": 1, "unreadable page": 1, "hidden folder": 2, "hidden page": 1},
        **{"page that links to nothing": 2, "page that is no file": 1},
        **{"unreadable image": 2, "missing image": 1},
    }
    with pytest.raises(FileNotFoundError, match=r"locked \(left out 1 unreadable folder\)"):
        read_html_folder(tmp_path / "locked")


@pytest.mark.parametrize(
    ("base", "found"), [("img/", True), ("./img/x.html", True), ("http://x.org/img/", False)]
)
def test_base_says_where_images_are(tmp_path, picture, base, found):
    (tmp_path / "img").mkdir()
    (tmp_path / "img/a.png").write_bytes(picture(50, 60))
    (tmp_path / "a.html").write_text(f"<base href='{base}'><p>text</p><img src='a.png'>")
    corpus = read_html_folder(tmp_path)
    assert len(corpus.sections[0].body.images) == found
    assert corpus.skipped == ({} if found else {"missing image": 1})


def test_any_heading_tag_ends_a_heading(tmp_path):
    html = "<h1>A</H2>one<h2>B</h3 >two<h3>C<h4><i>D</h4>three<h5>E<p>four<h6>F</h6>five</h6>"
    (tmp_path / "a.html").write_text(html)
    found = [(part.title, part.body.text) for part in read_html_folder(tmp_path).sections]
    assert found == [("A", "one"), ("B", "two"), ("D", "three"), ("E", "four"), ("F", "five")]
