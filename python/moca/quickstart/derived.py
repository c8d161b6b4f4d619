"""More training pairs out of the manual's training pages, without any label: a sentence finds the
section it was taken from (the inverse cloze task, arXiv 1906.00300), a section's title finds its
figures. Nothing is held out of them; what equals a held-out text is left out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from moca.data.records import IMAGE_MARKER, Document, Pair
from moca.quickstart.manual import SECTION_TASK

SENTENCE_TASK, TITLE_FIGURE_TASK = "sentence-section", "title-figure"
# What a small model sees of a section: sentences behind it could only be guessed.
SEEN_CHARACTERS = 700
MIN_WORDS, MOST_SENTENCES = 5, 6
_SENTENCE = re.compile(r"[^.!?\n]+[.!?]?")


def derive_pairs(sections: Sequence[Pair], held_out: Iterable[str]) -> dict[str, list[Pair]]:
    """Pairs by task.

    Args:
        sections: training pairs of title and section.
        held_out: texts of test items, which may not stand in training as they are.
    """
    forbidden = {_normal(text) for text in held_out}
    sentences, figures = [], []
    for pair in sections:
        if pair.task != SECTION_TASK:
            raise ValueError(f"expected pairs of {SECTION_TASK}, got one of {pair.task!r}")
        sentences += _sentence_pairs(pair, forbidden)
        figures += [
            replace(pair, positive=Document(IMAGE_MARKER, (image,), pair.name),
                    task=TITLE_FIGURE_TASK)
            for image in pair.positive.images
        ]  # fmt: skip
    derived = {SENTENCE_TASK: sentences, TITLE_FIGURE_TASK: figures}
    return {task: pairs for task, pairs in derived.items() if pairs}


def _sentence_pairs(pair: Pair, forbidden: set[str]) -> list[Pair]:
    text, found = pair.positive.text, []
    for match in _SENTENCE.finditer(text[:SEEN_CHARACTERS]):
        sentence = match.group().strip()
        if IMAGE_MARKER in sentence or len(sentence.split()) < MIN_WORDS:
            continue
        rest = text[: match.start()] + text[match.end() :]
        if (
            _normal(sentence) in forbidden
            or len(rest.replace(IMAGE_MARKER, "").split()) < MIN_WORDS
        ):
            continue
        found.append(
            replace(pair, query=Document(sentence, (), pair.name),
                    positive=replace(pair.positive, text=rest), task=SENTENCE_TASK)
        )  # fmt: skip
    return found[:MOST_SENTENCES]


def _normal(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
