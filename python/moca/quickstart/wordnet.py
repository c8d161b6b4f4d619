"""Words and glosses of WordNet, read from its data files (format: ``man 5 wndb``)."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moca.data.records import Document, Pair
from moca.quickstart.splits import rank, text_key

TASK = "gloss"
TEST_WORDS = 1000

_FILES = ("data.noun", "data.verb", "data.adj", "data.adv")
# Examples are quoted and come last; a quoted word inside a gloss follows no punctuation.
_EXAMPLES = re.compile(r'^\s*"|[;:,]\s*"')
# Adjectives may carry where they can stand: "galore(ip)".
_SYNTACTIC_MARKER = re.compile(r"\((?:p|a|ip)\)$")


@dataclass(frozen=True)
class Synset:
    """One meaning: the words that share it, and its gloss without the examples."""

    words: tuple[str, ...]
    gloss: str


def parse_line(line: str) -> Synset | None:
    """Read ``offset file type count word id ... | gloss``; None for a line of the licence.

    Raises:
        ValueError: a line of another form.
    """
    if line.startswith("  ") or not line.strip():
        return None
    head, separator, gloss = line.partition(" | ")
    fields = head.split(" ")
    try:
        # The number of words is hexadecimal, and a lexical id follows each word.
        words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
    except (IndexError, ValueError):
        words = []
    if not separator or not words:
        raise ValueError(f"no line of a WordNet data file: {line[:80]!r}")
    names = tuple(_SYNTACTIC_MARKER.sub("", word).replace("_", " ") for word in words)
    definition = _EXAMPLES.split(gloss, maxsplit=1)[0].strip().rstrip(";").rstrip()
    return Synset(names, definition)


def read_synsets(folder: Path) -> Iterator[Synset]:
    """Every synset with a gloss, in the order of the files.

    Raises:
        FileNotFoundError: no data file in the folder.
        ValueError: a malformed line; names file and line.
    """
    for name in _FILES:
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"WordNet data file not found: {path}")
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    synset = parse_line(line.rstrip("\n"))
                except ValueError as error:
                    raise ValueError(f"{path}:{number}: {error}") from None
                if synset and synset.gloss:
                    yield synset


def gloss_pairs(
    synsets: list[Synset], test_words: int = TEST_WORDS
) -> tuple[list[Pair], list[Pair], Counter]:
    """Word -> gloss pairs, split by word.

    A test word has one meaning only, so that there is one right answer, and no capital letter: the
    gloss of a name cannot be told from the name. Neither a test word nor a test gloss occurs in
    training: the whole synset of a test word stays out.

    Args:
        synsets: all of them.
        test_words: how many words to hold out; at most a tenth of the candidates.

    Returns:
        Training pairs, one for each word of each synset; test pairs; what was left out of training,
        by reason.
    """
    senses: dict[str, set[int]] = defaultdict(set)
    same_gloss: dict[str, list[int]] = defaultdict(list)
    for i, synset in enumerate(synsets):
        same_gloss[text_key(synset.gloss)].append(i)
        for word in synset.words:
            senses[text_key(word)].add(i)
    single = {
        word: i
        for i, synset in enumerate(synsets)
        for word in synset.words
        if word.islower() and len(senses[text_key(word)]) == 1
    }
    test: list[Pair] = []
    held: set[int] = set()
    wanted = min(test_words, len(single) // 10)
    for word in sorted(single, key=rank):
        if len(test) >= wanted:
            break
        i = single[word]
        if i not in held:
            held.update(same_gloss[text_key(synsets[i].gloss)])
            test.append(_pair(word, Document(synsets[i].gloss, (), f"WordNet: {word}")))
    tested = {text_key(pair.query.text) for pair in test}
    dropped: Counter = Counter()
    train: list[Pair] = []
    for i, synset in enumerate(synsets):
        gloss = Document(synset.gloss, (), f"WordNet: {synset.words[0]}")
        for word in synset.words:
            if i in held:
                dropped["gloss of a test word"] += text_key(word) not in tested
            elif text_key(word) in tested:
                dropped["test word"] += 1
            else:
                train.append(_pair(word, gloss))
    return train, test, +dropped


def _pair(word: str, gloss: Document) -> Pair:
    return Pair(Document(word, (), gloss.name), gloss, (), TASK, gloss.name)
