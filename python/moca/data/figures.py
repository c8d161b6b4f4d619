"""Which images of an HTML page are figures, where their files are, and what their captions say."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import lxml.etree
import lxml.html
import PIL.Image

from moca.data.images import MAX_ASPECT_RATIO, MAX_DECODED_PIXELS


def words(text: str) -> frozenset[str]:
    """The words of a text, as a set."""
    return frozenset(text.split())


# A side below this many pixels is an icon, a bullet or a spacer.
MIN_SIDE = 24
# Outside any figure element an image with no side above this is an icon.
MAX_ICON_SIDE = 48
# Inside a line of text an image up to this many pixels high is an icon.
MAX_INLINE_SIDE = 64

_SKIPPED_TAGS = words(
    "script style head nav footer noscript noframes template iframe object svg math video audio "
    "canvas select button input"
)
_SKIPPED_CLASSES = words(
    "navheader navfooter navigation navbar navlist navbarlist topnav bottomnav subnav skipnav "
    "sidebar sphinxsidebar related breadcrumb breadcrumbs magnify wy-breadcrumbs wy-nav-side "
    "rst-footer-buttons toc toctree-wrapper toctree headerlink footer site-footer indexdiv "
    "indextable genindextable md-header md-sidebar md-footer"
)
_SKIPPED_IDS = words("toc footer navigation sidebar nav navrow1 navrow2")
_SKIPPED_ROLES = words("navigation search contentinfo")
_ICON_CLASSES = words("guiicon equation informalequation icon logo math emoji")
_CONTAINERS = words(
    "figure informalfigure mediaobject imageblock image-block thumb wp-caption screenshot"
)
_CAPTIONS = words("caption figcaption thumbcaption wp-caption-text figure-caption image-caption")
_PHRASES = words("a abbr b code em i kbd small span strong sub sup tt u")
_SIGNS = words("anchor anchorjs-link")
_IMAGE_LINK = re.compile(r"\.(png|jpe?g|gif|webp|bmp|tiff?)([?#].*)?$", re.IGNORECASE)
_FIGURE_NUMBER = re.compile(
    r"(?:figure|fig\.?|image|illustration|screenshot|abbildung)\s*(?:[A-Z][.-]?)?\d+(?:[.-]\d+)*(?:\s*[.:)\u2013\u2014]+\s*|\s+-\s+|\s+|$)",
    re.IGNORECASE,
)
_LABEL_ALT = re.compile(r"\[[^\]]*\]")


class FoundImage(NamedTuple):
    """A usable ``<img>``: its file, its caption or "", and whether it is in a figure element."""

    path: Path
    caption: str
    framed: bool


@dataclass(frozen=True)
class Figure:
    """An image of a page and its caption.

    Args:
        page: path of the page below the folder.
        image: the image's file.
        caption: its caption without "Figure 17.115.".
    """

    page: str
    image: Path
    caption: str

    @property
    def name(self) -> str:
        """Where the figure came from, for error messages."""
        return f"{self.page}: {self.image.name}"


def collapse(text: str) -> str:
    """All white space to single blanks."""
    return " ".join(text.split())


def tokens(element: lxml.html.HtmlElement) -> set[str]:
    """The element's classes in lower case."""
    value = element.get("class")
    return set(value.lower().split()) if value else set()


def visible_text(element: lxml.html.HtmlElement, figures: bool = True) -> str:
    """The text of a heading or caption, without permanent-link and zoom signs.

    ``figures``: with that of figures inside it, as there are when a tag was never closed.
    """
    parts = []
    steps = lxml.etree.iterwalk(element, events=("start", "end"))
    for event, inner in steps:
        if event == "end":
            parts.append(None if inner is element else inner.tail)
        elif inner is not element and (
            is_skipped(inner) or tokens(inner) & _SIGNS or (not figures and _is_container(inner))
        ):
            steps.skip_subtree()
        else:
            parts.append(inner.text)
    return "".join(filter(None, parts))


def is_skipped(element: lxml.html.HtmlElement) -> bool:
    """Whether an element is no content: navigation, script, table of contents, footer."""
    attributes = element.attrib
    if element.tag in _SKIPPED_TAGS:
        return True
    if not attributes:
        return False
    classes = tokens(element)
    return (
        bool(classes & _SKIPPED_CLASSES)
        # "contents" alone is Doxygen's name for the text itself.
        or ("contents" in classes and bool(classes & {"topic", "local"}))
        or attributes.get("id", "").lower() in _SKIPPED_IDS
        or attributes.get("role", "") in _SKIPPED_ROLES
        or "hidden" in attributes
    )


class FigureFinder:
    """Tells figures from decoration, finds their files, and counts what it cannot use.

    Args:
        root: the folder; nothing outside it is read.
        skipped: counts images left out, by reason.
    """

    def __init__(self, root: Path, skipped: Counter):
        self.root = root.resolve()
        self.skipped = skipped
        self.sizes: dict[Path, tuple[int, int] | str] = {}

    def find(self, img: lxml.html.HtmlElement, base: Path) -> FoundImage | None:
        """The file and the caption of an ``<img>``, or None when it is no usable figure.

        Args:
            img: the element.
            base: the folder in which relative addresses of its page begin.
        """
        containers = [up for up in img.iterancestors() if _is_container(up)]
        if _is_decoration(img, containers):
            return None
        path = self._resolve(_source(img), base)
        if path is None:
            return None
        size = self._size(path)
        if isinstance(size, str):
            self.skipped[size] += 1
            return None
        if min(size) < MIN_SIDE or (not containers and _is_icon(img, *size)):
            return None
        return FoundImage(path, find_caption(img, containers), bool(containers))

    def _resolve(self, source: str, base: Path) -> Path | None:
        """The file an address names, when it is a file below the folder."""
        reason = "image without source" if not source else ""
        try:
            parts = urlsplit(source)
        except ValueError:
            reason = "image with a malformed source"
        else:
            if parts.scheme == "data":
                reason = "image embedded as data"
            elif parts.scheme or parts.netloc:
                reason = "remote image"
        if not reason:
            relative = unquote(parts.path)
            try:
                path = (base / relative).resolve()
                if relative.startswith("/") or not path.is_relative_to(self.root):
                    reason = "image outside the folder"
                elif not path.is_file():
                    reason = "missing image"
            except PermissionError:
                reason = "unreadable image"
            except (OSError, ValueError, RuntimeError):
                reason = "missing image"
        if reason:
            self.skipped[reason] += 1
            return None
        return path

    def _size(self, path: Path) -> tuple[int, int] | str:
        """(width, height) in pixels, or why the file is of no use; each is looked at once."""
        if path not in self.sizes:
            self.sizes[path] = _probe(path)
        return self.sizes[path]


def _source(img: lxml.html.HtmlElement) -> str:
    """The address of an image; where ``src`` is a placeholder, scripts take it from elsewhere."""
    given = [img.get("src", "").strip(), img.get("data-src", "").strip()]
    given += [source.rstrip(",") for source in img.get("srcset", "").split()[:1]]
    real = [source for source in given if source and not source.startswith("data:")]
    return (real or given)[0]


def _probe(path: Path) -> tuple[int, int] | str:
    if path.suffix.lower() in (".svg", ".svgz"):
        return "image in a vector format"
    try:
        with warnings.catch_warnings():
            # Told in our own words.
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            opened = PIL.Image.open(path)
        with opened as image:
            if reason := _beyond_limits(*image.size):
                return reason
            size = image.size
            if image.format == "PNG":
                # Its checksums show all damage; decoding would take as long as reading the pages.
                image.verify()
            else:
                image.draft(None, (1, 1))  # JPEG at an eighth of its size: a fifth of the time
                image.load()
            return size
    except PIL.Image.DecompressionBombError:
        return "image too large"
    except PermissionError:
        return "unreadable image"
    except Exception:  # of damaged files, decoders raise of every kind
        return "broken image"


def _beyond_limits(width: int, height: int) -> str:
    """Why an image of this size cannot be decoded or resized, or ""."""
    if width * height > MAX_DECODED_PIXELS:
        return "image too large"
    # Of thin ones, rules and spacers are no figures anyway.
    short, long = sorted((width, height))
    return "image too long" if short >= MIN_SIDE and long > MAX_ASPECT_RATIO * short else ""


def _is_container(element: lxml.html.HtmlElement) -> bool:
    return element.tag == "figure" or bool(tokens(element) & _CONTAINERS)


def _is_decoration(img: lxml.html.HtmlElement, containers: list) -> bool:
    """Icons of admonitions and menus, and images that are nothing but a link to another page."""
    if _LABEL_ALT.fullmatch((img.get("alt") or "").strip()) or img.get("role") == "presentation":
        return True
    if tokens(img) & _ICON_CLASSES:
        return True
    inner = containers[0] if containers else None
    for up in img.iterancestors():
        if up is inner:
            return False
        if tokens(up) & _ICON_CLASSES:
            return True
        href = up.get("href") if up.tag == "a" else None
        if href and not inner_text(up) and not containers and not _IMAGE_LINK.search(href):
            return True
    return False


def inner_text(element: lxml.html.HtmlElement) -> str:
    """All text inside an element, white space collapsed."""
    return collapse(element.text_content())


def _is_icon(img: lxml.html.HtmlElement, width: int, height: int) -> bool:
    return max(width, height) <= MAX_ICON_SIDE or (height <= MAX_INLINE_SIDE and _is_inline(img))


def _is_inline(img: lxml.html.HtmlElement) -> bool:
    """Whether there is text right beside the image, in its own line."""
    element = img
    while (parent := element.getparent()) is not None:
        before, after = element.getprevious(), element.getnext()
        texts = [parent.text if before is None else before.tail, element.tail]
        texts += [inner_text(near) for near in (before, after) if _is_phrase(near)]
        if any(text and text.strip() for text in texts):
            return True
        if not _is_phrase(parent):
            return False
        element = parent
    return False


def _is_phrase(element: lxml.html.HtmlElement | None) -> bool:
    return element is not None and element.tag in _PHRASES


def find_caption(img: lxml.html.HtmlElement, containers: list) -> str:
    """The captions of its figures, outermost first; else the text after it; else its alt text."""
    captions: dict[lxml.html.HtmlElement, list[str]] = {up: [] for up in reversed(containers)}
    for element in containers[-1].iterdescendants() if containers else ():
        if _is_caption(element):
            container = next(up for up in element.iterancestors() if _is_container(up))
            if container in captions:
                captions[container].append(clean_caption(visible_text(element, figures=False)))
    parts = [caption for found in captions.values() for caption in found]
    if not any(parts):
        parts = [_following_caption(img)]
    if not any(parts):
        parts = [_alternative(img)]
    unique = list(dict.fromkeys(part for part in parts if part))
    caption = unique[0] if unique else ""
    for part in unique[1:]:
        caption += (" " if caption[-1] in ".:!?" else ": ") + part
    return caption.replace("<|", "< |")


def _is_caption(element: lxml.html.HtmlElement) -> bool:
    classes, parent = tokens(element), element.getparent()
    if element.tag == "figcaption" or classes & _CAPTIONS:
        # An outer caption element speaks for the ones inside it.
        return not (parent.tag == "figcaption" or tokens(parent) & _CAPTIONS)
    return "title" in classes and _is_container(parent)


def _following_caption(img: lxml.html.HtmlElement) -> str:
    """A caption outside figures: the next element has the class, or starts with "Figure 3"."""
    element = img
    for _ in range(3):
        if element is None or collapse(element.tail or ""):
            return ""
        following = element.getnext()
        while (
            following is not None and following.tag == "br" and not collapse(following.tail or "")
        ):
            following = following.getnext()
        if following is not None and isinstance(following.tag, str):
            text = inner_text(following)
            if tokens(following) & _CAPTIONS or (_FIGURE_NUMBER.match(text) and len(text) <= 300):
                return clean_caption(text)
            return ""
        element = element.getparent()
    return ""


def _alternative(img: lxml.html.HtmlElement) -> str:
    """The alt or title text, when it is at least two words and not the name of the file."""
    file = PurePosixPath(urlsplit(img.get("src", "")).path)
    names = {_letters(file.name), _letters(file.stem)}
    for attribute in ("alt", "title"):
        text = clean_caption(img.get(attribute) or "")
        if len(text.split()) >= 2 and not _IMAGE_LINK.search(text) and _letters(text) not in names:
            return text
    return ""


def _letters(text: str) -> str:
    """Letters and digits only, in lower case: "add_line" and "Add line" are the same."""
    return "".join(char for char in unquote(text).lower() if char.isalnum())


def clean_caption(text: str) -> str:
    """A caption without its number and link sign: "Figure 17.115. Layers" -> "Layers"."""
    text = collapse(text).strip("\u00b6\uf0c1 ")
    number = _FIGURE_NUMBER.match(text)
    return text[number.end() :] if number else text
