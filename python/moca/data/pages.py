"""The HTML pages of a folder, their character sets, and from their bytes to a tree.

The character set is found as browsers find it (https://encoding.spec.whatwg.org and the encoding
sniffing of https://html.spec.whatwg.org): byte order mark, declaration, UTF-8 where it is valid,
windows-1252.
"""

from __future__ import annotations

import codecs
import os
import re
from collections import Counter
from pathlib import Path
from urllib.parse import unquote, urlsplit

import lxml.etree
import lxml.html

from moca.data.rows import PAGES

# How a page in these begins. Without a mark, its first character is "<".
_BEGINNINGS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
    b"<\0": "utf-16-le",
    b"\0<": "utf-16-be",
}
# Python's name of a declared character set -> what browsers read instead, which knows more
# characters. Bytes in which "<meta" can be read are not UTF-16.
_READ_AS = {
    **dict.fromkeys(("ascii", "iso8859-1"), "cp1252"),
    **dict.fromkeys(("gb2312", "gbk"), "gb18030"),
    **dict.fromkeys(("utf-16", "utf-16-le", "utf-16-be"), "utf-8"),
    "iso8859-9": "cp1254",
    "iso8859-11": "cp874",
    "tis-620": "cp874",
    "shift_jis": "cp932",
    "euc_kr": "cp949",
    "big5": "big5hkscs",
}
# Declared names that Python does not know.
_LABELS = {"windows-31j": "cp932", "windows-874": "cp874", "windows-949": "cp949"}
_COMMENT = re.compile(rb"<!--.*?-->", re.DOTALL)
_META = re.compile(rb"<meta\b((?:[^>\"']|\"[^\"]*\"|'[^']*')*)>", re.IGNORECASE)
_ATTRIBUTE = re.compile(rb"([^\s=/]+)\s*=\s*(\"[^\"]*\"|'[^']*'|[^\s\"']+)")
_LABEL = re.compile(rb"([\w.:+-]+)")
_IN_CONTENT = re.compile(rb"\bcharset\s*=\s*[\"']?\s*([\w.:+-]+)", re.IGNORECASE)
_XML = re.compile(rb"\s*<\?xml\b[^>]*?\bencoding\s*=\s*[\"']\s*([\w.:+-]+)", re.IGNORECASE)
# Browsers look at 1024 bytes, and longer where a comment comes first.
_HEAD_BYTES = 4096
_HEADING_TAG = re.compile(r"<(/?)h([1-6])(?=[\s/>])", re.IGNORECASE)


def find_pages(root: Path, skipped: Counter) -> list[Path]:
    """What is called a page below the folder, in the order of the paths."""
    pages: list[Path] = []

    def unreadable(error: OSError) -> None:
        skipped["unreadable folder"] += 1

    for folder, folders, names in os.walk(root, onerror=unreadable):
        path = Path(folder)
        skipped["hidden folder"] += sum(name.startswith(".") for name in folders)
        folders[:] = [name for name in folders if not name.startswith(".")]
        skipped["linked folder"] += sum((path / name).is_symlink() for name in folders)
        called = [name for name in names if Path(name).suffix.lower() in PAGES]
        skipped["hidden page"] += sum(name.startswith(".") for name in called)
        pages += [path / name for name in called if not name.startswith(".")]
    skipped += Counter()  # drops what counts zero
    return sorted(pages)


def read_page(path: Path, root: Path) -> bytes | str:
    """The bytes of a page, or why it is none."""
    if not path.exists():
        return "page that links to nothing"
    if not path.is_file():
        return "page that is no file"
    if not path.resolve().is_relative_to(root):
        return "page outside the folder"
    return path.read_bytes()


def parse(content: bytes, skipped: Counter) -> lxml.html.HtmlElement:
    """The tree of a page, without comments.

    Args:
        content: the page.
        skipped: counts, by reason, what of the page cannot be read.

    Raises:
        ValueError, lxml.etree.LxmlError: a page that cannot be parsed at all.
    """
    text = _close_headings(decode(content, skipped))
    parser = lxml.html.HTMLParser(
        encoding="utf-8", remove_comments=True, remove_pis=True, huge_tree=True
    )
    tree = lxml.html.document_fromstring(text.encode(), parser=parser)
    # The parser stops where elements nest thousands deep.
    if parser.error_log.filter_from_fatals():
        skipped["rest of a page that cannot be parsed"] += 1
    return tree


def base_folder(tree: lxml.html.HtmlElement, folder: Path) -> Path:
    """Where relative addresses of a page begin: in its folder, or in what its ``<base>`` names.

    One that names another host, or the root of its own, is not followed.
    """
    href = next(iter(tree.xpath("//base/@href")), "").strip()
    try:
        parts = urlsplit(href)
    except ValueError:
        return folder
    if parts.scheme or parts.netloc or parts.path.startswith("/"):
        return folder
    return folder / unquote(parts.path).rpartition("/")[0]


def decode(content: bytes, skipped: Counter) -> str:
    """The text of a page; where some of it is not of its character set, counts that."""
    encoding = _encoding(content, skipped)
    try:
        text = content.decode(encoding)
        whole = "\0" not in text  # of two or four bytes a character, taken for one each
    except UnicodeDecodeError:
        text, whole = content.decode(encoding, "replace"), False
    skipped["undecodable characters of a page"] += not whole
    return text.removeprefix("\ufeff")


def _encoding(content: bytes, skipped: Counter) -> str:
    """Python's name of a page's character set."""
    for beginning, encoding in _BEGINNINGS.items():
        if content.startswith(beginning):
            return encoding
    head = _COMMENT.sub(b"", content[:_HEAD_BYTES])
    if declared := _declared(head):
        label = declared.decode().lower().removeprefix("x-")
        try:
            name = codecs.lookup(_LABELS.get(label, label)).name
            name = _READ_AS.get(name, name)
            b" ".decode(name)  # of Python's codecs some are none of text
            return name
        except (LookupError, UnicodeError):
            skipped["unknown character set of a page"] += 1
    try:
        content.decode()
    except UnicodeDecodeError:
        return "cp1252"
    return "utf-8"


def _declared(head: bytes) -> bytes:
    """The character set that a page says it has; empty where it says none."""
    for meta in _META.finditer(head):
        found = _ATTRIBUTE.findall(meta[1])
        attributes = {name.lower(): value.strip(b"\"' \t\r\n") for name, value in found}
        label = _LABEL.match(attributes.get(b"charset", b""))
        if not label and attributes.get(b"http-equiv", b"").lower() == b"content-type":
            label = _IN_CONTENT.search(attributes.get(b"content", b""))
        if label:
            return label[1]
    xml = _XML.match(head)
    return xml[1] if xml else b""


def _close_headings(text: str) -> str:
    """``<h2>A</h3>`` as ``<h2>A</h2>``: any heading tag ends the heading before, as in browsers."""
    level = ""  # of the open heading

    def mend(tag: re.Match) -> str:
        nonlocal level
        before, level = level, "" if tag[1] else tag[2]
        if tag[1]:
            return f"</h{before or tag[2]}"
        return f"</h{before}>{tag[0]}" if before else tag[0]

    return _HEADING_TAG.sub(mend, text)
