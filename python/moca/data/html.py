"""A folder of HTML pages with images becomes sections, figures and pairs.

Pages are split at their headings (h1 to h6). A section keeps its text and its figures in reading
order; a figure is an image that is content, not decoration, and its caption is found by the
conventions of DocBook, Sphinx, AsciiDoc, HTML5 and plain pages. Navigation, tables of contents,
headers and footers are left out.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import lxml.etree
import lxml.html

from moca.data.figures import Figure, FigureFinder, collapse, is_skipped, visible_text, words
from moca.data.pages import base_folder, find_pages, parse, read_page
from moca.data.records import IMAGE_MARKER, Document, Pair
from moca.data.rows import PAGES

logger = logging.getLogger(__name__)

# A section with less text says too little to be found by its title.
MIN_BODY_CHARS = 40
# An image outside any figure that stands on this many pages is a logo or an ornament.
REPEATED_PAGES = 10

_HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")
_BLOCKS = words(
    "address article aside blockquote body caption center dd details div dl dt fieldset "
    "figcaption figure form hr li main ol p pre section summary table tbody tfoot thead tr ul"
)
_CELLS = words("td th")  # of a table row; they share a line
# "6.5.1. Overview", "1.2 Install", "Chapter 17. Filters", "A.3. Notes", "B. Licence"; but not "3D
# Transform".
_SECTION_NUMBER = re.compile(
    r"(?:(?:chapter|appendix|part|section)\s+(?:\d+|[A-Z]|[IVXLC]+)(?:\.\d+)*[.:]?\s+"
    r"|\d+(?:\.\d+)*\.\s+|\d+(?:\.\d+)+\s+|[A-Z](?:\.\d+)*\.\s+|[A-Z](?:\.\d+)+\s+)(?=\S)",
    re.IGNORECASE,
)
_HEADING_ANCHOR = "\u00b6\u00a7#\uf0c1 "


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it, up to the next heading.

    Args:
        page: path of the page below the folder, with forward slashes.
        title: the heading without its number.
        body: text and figures in reading order, without the title.
        document: the same with the title as first line.
        page_title: the first heading of the page, or its ``<title>``.
        parents: titles of the enclosing headings, outermost first.
    """

    page: str
    title: str
    body: Document
    document: Document
    page_title: str = ""
    parents: tuple[str, ...] = ()


@dataclass
class HtmlCorpus:
    """What a folder of HTML pages holds.

    Args:
        sections: in the order of the pages' paths, then of reading.
        figures: captioned figures, in the same order; each caption of an image once a page.
        skipped: how many pages and images were left out, by reason.
    """

    sections: list[Section] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    skipped: Counter = field(default_factory=Counter)


def read_html_folder(
    folder: str | os.PathLike, *, progress: Callable[[Iterable], Iterable] | None = None
) -> HtmlCorpus:
    """Read every ``.html``, ``.htm`` and ``.xhtml`` page below a folder.

    Images outside the folder, remote, missing, broken, too large, too long or in a format that
    cannot be decoded are left out and counted in ``skipped``, and a warning says so; so it is with
    folders and pages that are hidden (their name begins with a dot), linked from elsewhere or
    cannot be read, with characters that cannot be decoded, and with the rest of a page from where
    it cannot be parsed.

    Args:
        folder: the folder; pages are read in the order of their paths.
        progress: wraps the list of pages, for example ``tqdm``.

    Raises:
        FileNotFoundError: no such folder, or no HTML page in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"HTML folder not found: {root}")
    corpus = HtmlCorpus()
    pages = find_pages(root, corpus.skipped)
    if not pages:
        left_out = f" (left out {_counts(corpus.skipped)})" if corpus.skipped else ""
        raise FileNotFoundError(f"no {', '.join(PAGES)} page below {root}{left_out}")
    finder = FigureFinder(root, corpus.skipped)
    readers = []
    for path in progress(pages) if progress else pages:
        reader = _read_page(path, path.relative_to(root).as_posix(), finder)
        if reader is not None:
            readers.append(reader)
    unframed = Counter(image for reader in readers for image in reader.unframed)
    ornaments = {image for image, count in unframed.items() if count >= REPEATED_PAGES}
    seen: set[bytes] = set()
    for reader in readers:
        _collect(reader, ornaments, seen, corpus)
    corpus.skipped += Counter()  # drops what counts zero
    if corpus.skipped:
        logger.warning("%s: left out %s", root, _counts(corpus.skipped))
    return corpus


def _counts(skipped: Counter) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))


def title_section_pairs(corpus: HtmlCorpus, min_chars: int = MIN_BODY_CHARS) -> list[Pair]:
    """Section title -> section body, for sections with at least ``min_chars`` characters of text.

    A title that occurs more than once ("Overview", "Options") is qualified by the title of its
    page, then also by the heading above it; one that is still not unique is left out, for it cannot
    tell its section from another.
    """
    kept = [section for section in corpus.sections if _text_chars(section.body) >= min_chars]
    forms = [_title_forms(section) for section in kept]
    queries: list[str | None] = [None] * len(kept)
    for level in range(3):
        seen = Counter(form[level].casefold() for form in forms)
        for i, form in enumerate(forms):
            if queries[i] is None and seen[form[level].casefold()] == 1:
                queries[i] = form[level]
    return [
        Pair(
            Document(query, (), section.body.name),
            section.body,
            (),
            "title_section",
            section.body.name,
        )
        for query, section in zip(queries, kept, strict=True)
        if query
    ]


def caption_figure_pairs(corpus: HtmlCorpus) -> list[Pair]:
    """Caption -> image, once for every caption of every image."""
    pairs = {(figure.image, figure.caption): figure for figure in reversed(corpus.figures)}
    return [
        Pair(
            Document(figure.caption, (), figure.name),
            Document(IMAGE_MARKER, (figure.image,), figure.name),
            (),
            "caption_figure",
            figure.name,
        )
        for figure in reversed(pairs.values())
    ]


def _text_chars(body: Document) -> int:
    return len(body.text.replace(IMAGE_MARKER, "").strip())


def _title_forms(section: Section) -> tuple[str, str, str]:
    """The title alone, with its page, and with its page and the heading above it."""
    title, page = section.title, section.page_title
    if not page or page == title:
        return title, title, title
    above = [parent for parent in section.parents[-1:] if parent != page]
    return title, f"{page}: {title}", ": ".join([page, *above, title])


def _read_page(path: Path, page: str, finder: FigureFinder) -> _PageReader | None:
    """Walk one page; None, and counted, when that is not possible."""
    try:
        content = read_page(path, finder.root)
    except OSError:
        content = "unreadable page"
    if isinstance(content, str):
        finder.skipped[content] += 1
        return None
    try:
        tree = parse(content, finder.skipped)
        reader = _PageReader(page, base_folder(tree, path.parent), finder)
        reader.walk(_content_root(tree))
    except (ValueError, lxml.etree.LxmlError):
        finder.skipped["page that cannot be parsed"] += 1
        return None
    head = tree.find(".//title")
    title = clean_title(head.text_content()) if head is not None else ""
    reader.close(title or path.stem)
    return reader


def _collect(
    reader: _PageReader, ornaments: set[Path], seen: set[bytes], corpus: HtmlCorpus
) -> None:
    """Add what a page holds to the corpus, less the ornaments."""
    found = reader.sections(ornaments)
    if not found:
        corpus.skipped["page without text"] += 1
    else:
        corpus.skipped["heading without text"] += reader.bare_headings()
    for section in found:
        # Manuals often come with a second copy of everything on one page.
        key = section.document.key()
        if key in seen:
            corpus.skipped["repeated section"] += 1
        else:
            seen.add(key)
            corpus.sections.append(section)
    corpus.skipped["ornament"] += len(ornaments & reader.unframed)
    corpus.figures.extend(
        figure
        for figure in reader.figures
        if not (figure.image in ornaments and figure.image in reader.unframed)
    )


def _content_root(tree: lxml.html.HtmlElement) -> lxml.html.HtmlElement:
    """The page's only ``<main>`` (or element of that role), else all of it."""
    mains = tree.xpath("//main|//*[@role='main']")
    outer = [element for element in mains if not any(up in mains for up in element.iterancestors())]
    return outer[0] if len(outer) == 1 else tree


def clean_title(text: str) -> str:
    """A heading without its number and anchor sign: "6.5.1. Overview" -> "Overview"."""
    text = collapse(text).strip(_HEADING_ANCHOR)
    number = _SECTION_NUMBER.match(text)
    return text[number.end() :] if number else text


@dataclass
class _Open:
    """A section while it is being read: pieces of text, and images between them."""

    title: str
    level: int
    parents: tuple[str, ...]
    pieces: list[str | Path] = field(default_factory=list)


class _PageReader:
    """Walks one page in reading order and collects its sections and figures."""

    def __init__(self, page: str, base: Path, finder: FigureFinder):
        self.page, self.base, self.finder = page, base, finder
        self.open = [_Open("", 0, ())]
        self.line: list[str] = []
        self.figures: list[Figure] = []
        self.unframed: set[Path] = set()
        self.fallback = ""

    def walk(self, root: lxml.html.HtmlElement) -> None:
        """Read an element and what is inside it; tags never closed nest too deep to recurse."""
        steps = lxml.etree.iterwalk(root, events=("start", "end"))
        literal = 0  # how many ``<pre>``, which keep line breaks, are open
        whole = None  # the element just read without walking into it
        for event, element in steps:
            start, tag = event == "start", element.tag
            if start and self._whole(element):
                steps.skip_subtree()
                whole = element
                continue
            if element is not whole:
                literal += (tag == "pre") * (1 if start else -1)
                if tag in _BLOCKS:
                    self._break()
                elif tag in _CELLS and start:
                    self.line.append(" ")
            if start or element is not root:
                self._text(element.text if start else element.tail, literal > 0)

    def _whole(self, element: lxml.html.HtmlElement) -> bool:
        """Read an element that is read, or left out, without walking into it; else False."""
        tag = element.tag
        if is_skipped(element):
            return True
        if tag == "img":
            self._image(element)
        elif tag in _HEADINGS:
            self._heading(element, int(tag[1]))
        elif tag == "header":
            # Of a page's banner only its headings are content.
            for heading in element.iter(*_HEADINGS):
                self._whole(heading)
        elif tag == "br":
            self._break()
        else:
            return False
        return True

    def close(self, fallback: str) -> None:
        """Finish the last line; ``fallback`` titles the text before the first heading."""
        self._break()
        self.fallback = fallback

    def sections(self, ornaments: set[Path]) -> list[Section]:
        """The sections that hold anything but ornaments."""
        page_title = next((part.title for part in self.open if part.title), self.fallback)
        found = []
        for part in self.open:
            title = part.title or self.fallback
            pieces = [p for p in part.pieces if not (p in ornaments and p in self.unframed)]
            # A first line that repeats the title would give the section away.
            while (
                pieces and isinstance(pieces[0], str) and pieces[0].casefold() == title.casefold()
            ):
                pieces = pieces[1:]
            if not pieces:
                continue
            name = f"{self.page}: {title}"
            images = tuple(piece for piece in pieces if isinstance(piece, Path))
            text = "\n".join(IMAGE_MARKER if isinstance(p, Path) else p for p in pieces)
            body = Document(text, images, name)
            whole = Document(f"{title}\n{text}", images, name)
            found.append(Section(self.page, title, body, whole, page_title, part.parents))
        return found

    def bare_headings(self) -> int:
        """How many, but the page's title, have neither text nor a deeper heading below them."""
        _, *parts = [part for part in self.open if part.title] or [self.open[0]]
        return sum(
            not part.pieces and not (after and after.level > part.level)
            for part, after in zip_longest(parts, parts[1:])
        )

    def _text(self, text: str | None, literal: bool) -> None:
        if not text:
            return
        # Text that spells a special token must stay text.
        text = text.replace("<|", "< |")
        if not literal:
            self.line.append(text)
            return
        first, *rest = text.split("\n")
        self.line.append(first)
        for line in rest:
            self._break()
            self.line.append(line)

    def _break(self) -> None:
        text = collapse("".join(self.line))
        self.line.clear()
        if text:
            self.open[-1].pieces.append(text)

    def _heading(self, element: lxml.html.HtmlElement, level: int) -> None:
        title = clean_title(visible_text(element)).replace("<|", "< |")
        if not title:
            return
        self._break()
        self.open.append(_Open(title, level, self._above(level)))

    def _above(self, level: int) -> tuple[str, ...]:
        """Titles of the headings that enclose a new one of this level, outermost first."""
        chain: list[str] = []
        bound = level
        for part in reversed(self.open):
            if 0 < part.level < bound:
                chain.append(part.title)
                bound = part.level
        return tuple(chain[::-1])

    def _image(self, element: lxml.html.HtmlElement) -> None:
        found = self.finder.find(element, self.base)
        if found is None:
            return
        self._break()
        self.open[-1].pieces.append(found.path)
        if not found.framed:
            self.unframed.add(found.path)
        figure = Figure(self.page, found.path, found.caption)
        if found.caption and figure not in self.figures:
            self.figures.append(figure)
