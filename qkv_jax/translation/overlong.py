"""Sentences that are too long for a model, in parts that are not."""

import re
from collections.abc import Callable

# Where a text may be parted, best first: after a sentence, after a clause, at a space.
BREAKS = (
    r"[.!?…。！？][\"'”’)\]]*(\s+)",
    r"[;:,–—、，](\s+)",
    r"(\s+)",
)


def split_text(text: str, length: Callable[[str], int], longest: int) -> list[str]:
    """Parts of a text, in order, each of at most `longest` tokens where it can be parted.

    A text is parted near its middle: after a sentence where it has several, else after a clause,
    at a space, or within a word.

    Args:
        text: any.
        length: tokens of a text.
        longest: tokens a part may have.
    """
    text = text.strip()
    if length(text) <= longest or len(text) < 2:
        return [text]
    start, end = _middle_break(text)
    halves = (text[:start], text[end:])
    return [part for half in halves for part in split_text(half, length, longest)]


def _middle_break(text: str) -> tuple[int, int]:
    """Where the first half ends and the second begins: a break in the middle half of the text."""
    middle = len(text) / 2
    for pattern in BREAKS:
        breaks = [match.span(1) for match in re.finditer(pattern, text)]
        near = [span for span in breaks if abs(span[0] - middle) <= len(text) / 4]
        if near:
            return min(near, key=lambda span: abs(span[0] - middle))
    return len(text) // 2, len(text) // 2
