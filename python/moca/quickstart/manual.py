"""A folder of HTML pages as two tasks, title -> section and caption -> figure, split by page."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

from moca.data.html import HtmlCorpus, caption_figure_pairs, title_section_pairs
from moca.data.records import Document, ImageLike, Pair
from moca.quickstart.splits import (
    Pictures,
    pictures_of,
    rank,
    text_key,
    unique_items,
    without_leaks,
    without_pictures,
)

SECTION_TASK = "title-section"
FIGURE_TASK = "caption-figure"
# Share of the sections held out, page by page.
TEST_SHARE = 0.18


@dataclass
class ManualSplit:
    """A manual, divided.

    Args:
        train: training pairs by task.
        test: test items by task.
        documents: interleaved sections of training pages, without any test picture.
        dropped: what was left out, by reason, for each task.
    """

    train: dict[str, list[Pair]]
    test: dict[str, list[Pair]]
    documents: list[Document]
    dropped: dict[str, Counter[str]] = field(default_factory=dict)


def test_pages(pages: list[str], share: float) -> set[str]:
    """Pages to hold out: in a fixed order, until they hold a share of the items.

    Args:
        pages: the page of each item.
        share: of the items, 0 to 1.
    """
    sizes = Counter(pages)
    held: set[str] = set()
    count = 0
    for page in sorted(sizes, key=rank):
        if count >= share * len(pages):
            break
        held.add(page)
        count += sizes[page]
    return held


def split_manual(corpus: HtmlCorpus, pictures: Pictures, share: float = TEST_SHARE) -> ManualSplit:
    """Split a manual by page and make sure that training has no text and no picture of a test item.

    Args:
        corpus: the manual.
        pictures: the register of images.
        share: of the sections, to be held out.

    Raises:
        ValueError: an image that cannot be read; names its file.
    """
    by_task = {SECTION_TASK: title_section_pairs(corpus), FIGURE_TASK: caption_figure_pairs(corpus)}
    page_of = _Pages(corpus)
    held = test_pages([page_of(pair) for pair in by_task[SECTION_TASK]], share)
    kept = [section for section in corpus.sections if section.page not in held]
    lines = {text_key(line) for section in kept for line in section.document.text.split("\n")}
    # Every picture must be known before look-alikes are searched.
    pictures_of([section.body for section in corpus.sections], pictures)
    split = ManualSplit({}, {}, [])
    seen = pictures.near(pictures_of([section.body for section in kept], pictures))
    for task, pairs in by_task.items():
        items = [pair for pair in pairs if page_of(pair) in held]
        items, dropped = _unseen(items, lines if task == FIGURE_TASK else set(), seen, pictures)
        split.test[task], split.dropped[task] = unique_items(items, pictures, near=True)
        split.dropped[task] += dropped
    tested = [pair for items in split.test.values() for pair in items]
    hidden = pictures.near(pictures_of([pair.positive for pair in tested], pictures))
    for task, pairs in by_task.items():
        train = [pair for pair in pairs if page_of(pair) not in held]
        split.train[task], dropped = without_leaks(train, tested, hidden, pictures)
        split.dropped[task] += dropped
    texts = {text_key(side.text) for pair in tested for side in (pair.query, pair.positive)} - {""}
    split.documents = [
        without_pictures(section.document, hidden, pictures)
        for section in kept
        if not texts & {text_key(section.body.text), text_key(section.title)}
    ]
    return split


def _unseen(
    items: list[Pair], lines: set[str], seen: set[int], pictures: Pictures
) -> tuple[list[Pair], Counter[str]]:
    """Test items without what training pages show too: "Original image", or the logo on every
    page, does not tell one page from another."""
    kept: list[Pair] = []
    dropped: Counter[str] = Counter()
    for pair in items:
        positive = without_pictures(pair.positive, seen, pictures)
        if text_key(pair.query.text) in lines:
            dropped["test caption that also stands on a training page"] += 1
        elif not text_key(positive.text) and not positive.images:
            dropped["test figure that also stands on a training page"] += 1
        else:
            dropped["test text that lost a picture of a training page"] += (
                positive is not pair.positive
            )
            kept.append(replace(pair, positive=positive))
    return kept, +dropped


class _Pages:
    """Tells the page of a pair that was made from a manual."""

    def __init__(self, corpus: HtmlCorpus):
        self._sections = {id(section.body): section.page for section in corpus.sections}
        # The first page of a figure that stands on several.
        self._figures: dict[tuple[ImageLike, str], str] = {
            (f.image, f.caption): f.page for f in reversed(corpus.figures)
        }

    def __call__(self, pair: Pair) -> str:
        page = self._sections.get(id(pair.positive))
        return self._figures[pair.positive.images[0], pair.query.text] if page is None else page
