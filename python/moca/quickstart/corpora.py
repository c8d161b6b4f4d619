"""The quickstart's data: tasks of training pairs and held-out items, documents for stage 1."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from moca.data.html import HtmlCorpus, read_html_folder
from moca.data.records import IMAGE_MARKER, Document, ImageLike, Pair
from moca.quickstart import emojis, wordnet
from moca.quickstart.fetch import DEFAULT_CACHE, fetch_debian
from moca.quickstart.manual import FIGURE_TASK, SECTION_TASK, split_manual
from moca.quickstart.splits import Pictures, keep_images, unique_items, without_leaks

MIN_TRAIN, MIN_TEST = 100, 20

_MANUAL = Path("usr/share/gimp/2.0/help/en")
_FONT = Path("usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
_WORDNET = Path("usr/share/wordnet")
_DIRECTIONS = {
    SECTION_TASK: "section title -> section, on unseen pages",
    FIGURE_TASK: "caption -> figure, on unseen pages",
    emojis.TASK: "emoji name -> picture, of unseen families",
    wordnet.TASK: "word -> gloss, of unseen words",
}


@dataclass
class Task:
    """One kind of retrieval.

    Args:
        name: of the task, also the ``task`` of its pairs.
        direction: what is looked for, in words.
        train: training pairs.
        test: held-out items: the candidates of every query are the positives of all of them, each
            of them once.
        dropped: what was left out so that training and test share nothing and every answer is
            unique, by reason.
    """

    name: str
    direction: str
    train: list[Pair]
    test: list[Pair]
    dropped: Counter[str] = field(default_factory=Counter)


@dataclass
class Corpora:
    """Everything the quickstart learns from and is tested on.

    Args:
        tasks: the tasks with enough items.
        documents: interleaved documents for stage 1 by source ("manual", "emoji", "gloss");
            training side only.
        notes: what was left out and why, in sentences.
    """

    tasks: list[Task]
    documents: dict[str, list[Document]]
    notes: list[str] = field(default_factory=list)

    @property
    def tokenizer_texts(self) -> list[str]:
        """Every distinct text of the training side, without image markers."""
        texts = (
            side.text
            for task in self.tasks
            for pair in task.train
            for side in (pair.query, pair.positive)
        )
        documents = (document.text for group in self.documents.values() for document in group)
        clean = (text.replace(IMAGE_MARKER, "") for source in (texts, documents) for text in source)
        return [text for text in dict.fromkeys(clean) if text.strip()]

    def summary(self) -> list[dict[str, Any]]:
        """One row a task: name, direction, train, test, and dropped (reason -> count)."""
        return [
            {
                "name": task.name,
                "direction": task.direction,
                "train": len(task.train),
                "test": len(task.test),
                "dropped": dict(task.dropped),
            }
            for task in self.tasks
        ]


def load_corpora(
    cache_dir: str | os.PathLike = DEFAULT_CACHE,
    docs: str | os.PathLike | None = None,
    *,
    progress: bool = True,
) -> Corpora:
    """Load all tasks from Debian packages, or the two manual tasks from a folder of HTML pages.

    Args:
        cache_dir: where packages are fetched to; not used when ``docs`` is given.
        docs: a folder of HTML pages; then nothing else is used and nothing is fetched.
        progress: show progress bars.

    Raises:
        FetchError: the packages cannot be had; says how to use a folder of pages.
        FileNotFoundError: ``docs`` is no folder of HTML pages.
        ValueError: no task has enough items, or data that cannot be read.
    """
    bar = _progress(progress)
    if docs is not None:
        corpora = manual_corpora(docs, bar)
    else:
        roots = fetch_debian(cache_dir)
        corpora = manual_corpora(roots["gimp-help-en"] / _MANUAL, bar)
        _add_emoji(corpora, roots["fonts-noto-color-emoji"] / _FONT, bar)
        _add_glosses(corpora, roots["wordnet-base"] / _WORDNET, bar)
    return _with_enough(corpora)


def manual_corpora(folder: str | os.PathLike, bar: Callable) -> Corpora:
    """The tasks and documents of a folder of HTML pages."""
    corpus = read_html_folder(folder, progress=bar("pages"))
    pictures = Pictures()
    unreadable = _look_at_images(corpus, pictures, bar)
    split = split_manual(corpus, pictures)
    tasks = []
    for name in split.train:
        train, test = (
            [replace(pair, task=name) for pair in pairs]
            for pairs in (split.train[name], split.test[name])
        )
        tasks.append(Task(name, _DIRECTIONS[name], train, test, split.dropped[name]))
    notes = [f"{count} x {reason} left out" for reason, count in sorted(corpus.skipped.items())]
    return Corpora(tasks, {"manual": split.documents}, notes + unreadable)


def _look_at_images(corpus: HtmlCorpus, pictures: Pictures, bar: Callable) -> list[str]:
    """Decode every image once; unreadable ones leave the corpus. Returns what was wrong."""
    files = dict.fromkeys(image for section in corpus.sections for image in section.body.images)
    problems: dict[ImageLike, str] = {}
    for image in bar("pictures")(files):
        try:
            pictures(image)
        except ValueError as error:
            problems[image] = f"left out: {error}"
    if problems:
        corpus.figures = [f for f in corpus.figures if f.image not in problems]
        corpus.sections = [
            replace(
                section,
                body=keep_images(section.body, lambda image: image not in problems),
                document=keep_images(section.document, lambda image: image not in problems),
            )
            for section in corpus.sections
        ]
    return list(problems.values())


def _add_emoji(corpora: Corpora, font: Path, bar: Callable) -> None:
    names = emojis.read_names()
    images = emojis.render_all(emojis.EmojiFont(font), names, bar("emoji"))
    if len(images) < len(names):
        corpora.notes.append(f"{len(names) - len(images)} emoji are not in the font")
    train, test = emojis.emoji_pairs(names, images)
    pictures = Pictures()
    test, dropped = unique_items(test, pictures)
    hidden = {pictures(pair.positive.images[0]) for pair in test}
    train, leaks = without_leaks(train, test, hidden, pictures)
    task = Task(emojis.TASK, _DIRECTIONS[emojis.TASK], train, test, dropped + leaks)
    toned = sum("skin tone" in pair.query.text for pair in test)
    corpora.notes.append(
        f"{toned} of the {len(test)} emoji names to be found tell a skin tone, which helps"
    )
    corpora.tasks.append(task)
    captions = {pair.positive.images[0]: pair for pair in reversed(train)}
    corpora.documents["emoji"] = [
        Document(f"{pair.query.text}\n{IMAGE_MARKER}", (png,), pair.name)
        for png, pair in reversed(captions.items())
    ]


def _add_glosses(corpora: Corpora, folder: Path, bar: Callable) -> None:
    synsets = list(bar("glosses")(wordnet.read_synsets(folder)))
    train, test, dropped = wordnet.gloss_pairs(synsets)
    corpora.tasks.append(Task(wordnet.TASK, _DIRECTIONS[wordnet.TASK], train, test, dropped))
    glosses: dict[str, list[str]] = {}
    for pair in train:
        glosses.setdefault(pair.positive.text, []).append(pair.query.text)
    corpora.documents["gloss"] = [
        Document(f"{', '.join(words)}: {gloss}", (), f"WordNet: {words[0]}")
        for gloss, words in glosses.items()
    ]


def _with_enough(corpora: Corpora) -> Corpora:
    """Leave out tasks with too few items and say so."""
    kept, notes = [], list(corpora.notes)
    for task in corpora.tasks:
        if len(task.train) >= MIN_TRAIN and len(task.test) >= MIN_TEST:
            kept.append(task)
        else:
            notes.append(
                f"task {task.name} left out: {len(task.train)} training and {len(task.test)} test "
                f"items, at least {MIN_TRAIN} and {MIN_TEST} are needed"
            )
    if not kept:
        raise ValueError("; ".join(notes))
    return Corpora(kept, corpora.documents, notes)


def _progress(shown: bool) -> Callable[[str], Callable[[Iterable], Iterable]]:
    def bar(what: str) -> Callable[[Iterable], Iterable]:
        return lambda items: tqdm(items, desc=what, disable=not shown, leave=False)

    return bar
