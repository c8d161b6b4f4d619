"""Prompts: wording around a document that tells what its embedding is for (arXiv 2506.23115).

In a prompt, ``{}`` stands for the document, text and images in reading order; or ``{image}`` for
its images and ``{text}`` for its text without them. A prompt with none of these goes before the
document. So ``"{}\\nRepresent the given document image."`` puts the wording after a page, and
``"{image}Represent the given image with the following question: {text}"`` between the two.
Of a document that is too long the end is cut, but not the wording after it, unless there is no room
for both or an image would have to go for it.
"""

from __future__ import annotations

import re
from dataclasses import replace

from moca.data.records import IMAGE_MARKER, Document, Pair

_PLACE = re.compile(r"(\{\}|\{image\}|\{text\})")
_PLACES: tuple[list[str], ...] = ([], ["{}"], ["{image}", "{text}"])


def check_prompt(prompt: str) -> None:
    """Raise ValueError unless a prompt has the places that a document is put into, or none."""
    found = sorted(_PLACE.findall(prompt))
    if found not in _PLACES or "<image>" in prompt or "<|image_" in prompt:
        raise ValueError(
            "expected wording around one {}, around one {image} and one {text}, or around none of "
            f"them, without another marker of an image, got {prompt!r}"
        )


def prompted(document: Document, prompt: str) -> Document:
    """The document with the prompt around it.

    Raises:
        ValueError: see `check_prompt`.
    """
    check_prompt(prompt)
    if not prompt:
        return document
    if not _PLACE.search(prompt):
        prompt += "{}"
    own = document.text.replace(IMAGE_MARKER, "")
    filled = {"{}": document.text, "{image}": IMAGE_MARKER * len(document.images), "{text}": own}
    *parts, closing = _PLACE.split(prompt)
    texts = [filled.get(part, part) for part in parts]
    begin = next(i for i, part in enumerate(parts) if part in ("{}", "{text}"))
    opening = texts[:begin] if own.strip() else texts
    return replace(document, text="".join(texts), opening="".join(opening), closing=closing)


def prompted_pair(pair: Pair, query: str, document: str) -> Pair:
    """The pair with a prompt around its query, and another around its positive and negatives."""
    return replace(
        pair,
        query=prompted(pair.query, query),
        positive=prompted(pair.positive, document),
        negatives=tuple(prompted(negative, document) for negative in pair.negatives),
    )
