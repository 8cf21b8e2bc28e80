"""Cutting a long text: into pieces at paragraph borders, or down to a size at its head, tail or middle."""

import re
from collections.abc import Callable

from .errors import DocumentError

# Where a text may be cut, best first: between paragraphs, lines, sentences, words.
BORDERS = [re.compile(pattern) for pattern in (r"\n\s*\n", r"\n", r"(?<=[.!?])\s", r"\s")]
REACH = 4  # a border is looked for within a quarter of a piece of where equal pieces would end
ELLIPSIS = "\n\n[...]\n\n"
CLOSE_ENOUGH = 0.97  # of the room: a cut text that fills it this far is not cut again
MOST_TRIES = 12


def split(text: str, count: Callable[[str], int], room: int) -> list[str]:
    """Pieces of about equal length, as few as will do, with count(piece) <= room each.

    count: tokens of a text. Every character but white space at the cuts is in
    exactly one piece. Tokens are not spread evenly over characters, so that a
    piece may come out too long; then there are a few more of them.
    """
    pieces = -(-count(text) // room)
    while pieces < len(text):
        parts = cut(text, pieces)
        if all(count(part) <= room for part in parts):
            return parts
        pieces += max(1, pieces // 8)
    raise DocumentError(f"no piece of it fits into {room} tokens; raise --ctx")


def cut(text: str, pieces: int) -> list[str]:
    """About equal pieces of at least one character that is no white space."""
    size = len(text) / pieces
    ends = [border_near(text, round(size * index), int(size / REACH)) for index in range(1, pieces)]
    spans = zip([0, *ends], [*ends, len(text)], strict=True)
    return [part for start, end in spans if (part := text[start:end].strip())]


def border_near(text: str, wanted: int, reach: int) -> int:
    """The best kind of border within `reach` characters of the wanted place, the nearest of its kind."""
    start = max(0, wanted - reach)
    window = text[start : wanted + reach]
    for border in BORDERS:
        places = [start + match.end() for match in border.finditer(window)]
        if places:
            return min(places, key=lambda place: abs(place - wanted))
    return wanted


def shorten(text: str, part: str, count: Callable[[str], int], room: int) -> str:
    """The text without its "head", "tail" or "middle", so that count(text) <= room.

    Characters are dropped in proportion to the tokens that are too many, until it fits.
    """
    low, high = 0, len(text)  # characters known to fit, and known not to
    keep, best = high, ""
    for _ in range(MOST_TRIES):
        trial = without(text, part, keep)
        tokens = count(trial)
        if tokens <= room:
            low, best = keep, trial
            if tokens >= CLOSE_ENOUGH * room:
                break
        else:
            high = keep
        estimate = int(keep * room / max(tokens, 1) * 0.99)
        keep = estimate if low < estimate < high else (low + high) // 2
        if keep <= low:
            break
    if not best.strip():
        raise DocumentError(f"no part of it fits into {room} tokens; raise --ctx")
    return best


def without(text: str, part: str, keep: int) -> str:
    """Keep `keep` characters of the text, whole words, and drop the named part."""
    if keep >= len(text):
        return text
    if part == "tail":
        return text[: word_border(text, keep)]
    if part == "head":
        return text[word_border(text, len(text) - keep) :]
    start, end = word_border(text, keep // 2), word_border(text, len(text) - (keep - keep // 2))
    return text[:start] + ELLIPSIS + text[max(start, end) :]


def word_border(text: str, place: int) -> int:
    """The end of the white space nearest before the place, or the place itself in a text without any."""
    nearest = max(text.rfind(" ", max(0, place - 100), place), text.rfind("\n", max(0, place - 100), place))
    return place if nearest < 0 else nearest + 1
