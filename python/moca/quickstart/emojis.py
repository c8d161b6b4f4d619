"""Emoji as multilingual captions and pictures: names from PyPI's ``emoji``, pictures from a font.

The bitmaps are read from the font's ``CBDT`` table and sequences (flags, people with a skin tone)
are resolved with its ligatures, so the result depends on the font alone and not on the shaping
libraries of the machine.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import PIL.Image

from moca.data.records import IMAGE_MARKER, Document, Pair
from moca.quickstart.splits import rank

TASK = "emoji"
SIDE = 64
# Share of the pictures held out.
TEST_SHARE = 0.15

_VARIATION_SELECTOR = 0xFE0F
_FLAGS, _TOGETHER = "flags", "several people"
# Groups of hundreds of pictures that hardly differ: one alone would fill the test.
_ALWAYS_TRAINING = frozenset({_FLAGS, _TOGETHER})
_FLAG_SIGNS = frozenset("\U0001f3f3\U0001f3f4\U0001f6a9\U0001f38c\U0001f3c1")


def _code_points(*groups: str) -> frozenset[int]:
    """Turn groups of hexadecimal code points into a set."""
    return frozenset(int(code, 16) for group in groups for code in group.split())


# What makes a variant of an emoji and not another one: skin tones, gender signs, hair, direction,
# coat or skin colour ("black cat"), joiners.
_VARIANT_MARKS = _code_points(
    "1F3FB 1F3FC 1F3FD 1F3FE 1F3FF",
    "2640 2642 1F9B0 1F9B1 1F9B2 1F9B3",
    "27A1 2194 2195",
    "2B1B 1F7E9 1F7EB",
    "200D FE0F",
)
# One person drawn as man, woman or neither; the first of each group stands for it.
_SAME_PERSON = (
    "1F9D1 1F468 1F469",
    "1F9D2 1F466 1F467",
    "1F9D3 1F474 1F475",
    "1FAC5 1F934 1F478",
    "1F385 1F936",
    "1F483 1F57A",
    "1F930 1FAC3 1FAC4",
)
_PERSON = {
    int(code, 16): int(group.split()[0], 16) for group in _SAME_PERSON for code in group.split()
}
_ADULT, _CHILD = 0x1F9D1, 0x1F9D2
# Signs of their own for what is also written as a sequence of people.
_TOGETHER_SIGNS = _code_points("1F46A 1F46B 1F46C 1F46D 1F48F 1F491")


def family(emoji: str) -> str:
    """The name of the group of variants an emoji belongs to.

    All flags are one group; so are all pictures of several people (couples, kisses, families).
    """
    codes = [ord(character) for character in emoji]
    if any(0x1F1E6 <= code <= 0x1F1FF for code in codes) or emoji[0] in _FLAG_SIGNS:
        return _FLAGS
    base = [_PERSON.get(code, code) for code in codes if code not in _VARIANT_MARKS]
    people = sum(code in (_ADULT, _CHILD) for code in base)
    if people > 1 or (base and base[0] in _TOGETHER_SIGNS):
        return _TOGETHER
    if base == [_ADULT, 0x1F384]:
        base = [0x1F385]
    # A tone alone is a sign too.
    return "-".join(f"{code:x}" for code in base or codes)


class EmojiFont:
    """A colour bitmap font.

    Args:
        path: a font with ``CBDT`` bitmaps, such as NotoColorEmoji.ttf.

    Raises:
        ValueError: a font without them.
        RuntimeError: fonttools is not installed.
    """

    def __init__(self, path: Path):
        try:
            from fontTools.ttLib import TTFont
        except ImportError:
            raise RuntimeError("emoji need the package fonttools: pip install fonttools") from None

        font = TTFont(path)
        if "CBDT" not in font:
            raise ValueError(f"{path}: expected a font with CBDT bitmaps, found {font.keys()}")
        self._characters = font.getBestCmap()
        self._bitmaps = font["CBDT"].strikeData[0]
        self._ligatures: dict[tuple[str, ...], str] = {}
        lookups = font["GSUB"].table.LookupList.Lookup if "GSUB" in font else []
        tables = [table for lookup in lookups for table in lookup.SubTable]
        for table in tables:
            for first, ligatures in getattr(table, "ligatures", {}).items():
                for ligature in ligatures:
                    self._ligatures.setdefault((first, *ligature.Component), ligature.LigGlyph)

    def bitmap(self, emoji: str) -> bytes | None:
        """The PNG of an emoji, or None when the font has no single glyph for it."""
        codes = [ord(character) for character in emoji]
        glyphs = tuple(self._characters.get(c) for c in codes if c != _VARIATION_SELECTOR)
        if None in glyphs:
            return None
        glyph = glyphs[0] if len(glyphs) == 1 else self._ligatures.get(glyphs)
        found = self._bitmaps.get(glyph)
        return getattr(found, "imageData", None)


def render(bitmap: bytes, side: int = SIDE) -> bytes:
    """A bitmap centred on a white square of ``side`` pixels, as PNG."""
    with PIL.Image.open(io.BytesIO(bitmap)) as opened:
        glyph = opened.convert("RGBA")
    length = max(glyph.size)
    square = PIL.Image.new("RGBA", (length, length), "white")
    corner = ((length - glyph.width) // 2, (length - glyph.height) // 2)
    square.alpha_composite(glyph, corner)
    small = square.convert("RGB").resize((side, side), PIL.Image.Resampling.BOX)
    target = io.BytesIO()
    small.save(target, "PNG", compress_level=1)
    return target.getvalue()


def clean_name(name: str) -> str:
    """ "Turn ":woman_cook:" into "woman cook"."""
    return " ".join(name.strip(":").replace("_", " ").split())


def read_names() -> dict[str, dict[str, str]]:
    """Every fully qualified emoji and its names, English first: emoji -> language -> name.

    Raises:
        RuntimeError: PyPI's ``emoji`` is not installed.
    """
    try:
        import emoji
    except ImportError:
        raise RuntimeError("emoji names need the package emoji: pip install emoji") from None
    for language in emoji.LANGUAGES:
        emoji.config.load_language(language)
    return {
        sign: {lang: clean_name(data[lang]) for lang in emoji.LANGUAGES if data.get(lang)}
        for sign, data in emoji.EMOJI_DATA.items()
        if data["status"] == emoji.STATUS["fully_qualified"] and data.get("en")
    }


def render_all(
    font: EmojiFont, signs: Iterable[str], progress: Callable[[Iterable], Iterable]
) -> dict[str, bytes]:
    """PNG of every emoji the font can draw."""
    found = {}
    for sign in progress(list(signs)):
        bitmap = font.bitmap(sign)
        if bitmap:
            found[sign] = render(bitmap)
    return found


def emoji_pairs(
    names: dict[str, dict[str, str]], images: dict[str, bytes], test_share: float = TEST_SHARE
) -> tuple[list[Pair], list[Pair]]:
    """Name -> picture pairs, split by family.

    Args:
        names: emoji -> language -> name.
        images: emoji -> PNG.
        test_share: families are held out, in a fixed order, until they hold this share of the
            pictures.

    Returns:
        Training pairs in all languages, and test pairs in English over families that training never
        shows.
    """
    families: dict[str, list[str]] = defaultdict(list)
    for sign in images:
        families[family(sign)].append(sign)
    held: set[str] = set()
    for name in sorted(families.keys() - _ALWAYS_TRAINING, key=rank):
        if len(held) + len(families[name]) <= round(test_share * len(images)):
            held.update(families[name])
    train, test = [], []
    for sign, png in images.items():
        answer = Document(IMAGE_MARKER, (png,), f"emoji {names[sign]['en']}")
        if sign in held:
            test.append(_pair(names[sign]["en"], answer))
        else:
            # Two languages may share a name.
            train += [_pair(name, answer) for name in dict.fromkeys(names[sign].values())]
    return train, test


def _pair(name: str, answer: Document) -> Pair:
    return Pair(Document(name, (), answer.name), answer, (), TASK, answer.name)
