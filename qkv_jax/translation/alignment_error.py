"""How far word alignments are from those that people drew: the alignment error rate."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from qkv_jax.data import DataError
from qkv_jax.data.files import read_lines

Link = tuple[int, int]
# "3-4" is sure; "3?4" (as in Moses' tools) and "3p4" (Talp) are possible.
_LINK = re.compile(r"(\d+)([-?p])(\d+)")


class Links(NamedTuple):
    """The reference links of one sentence pair, (source word, target word) from 0.

    Attributes:
        sure: that have to be found.
        possible: that may be found; the sure ones are among them.
    """

    sure: frozenset[Link]
    possible: frozenset[Link]


class AlignmentScores(NamedTuple):
    """Shares of 1; NaN where there is nothing to divide by.

    Attributes:
        precision: of the links found, those that are possible.
        recall: of the sure links, those that were found.
        error_rate: the alignment error rate (AER).
    """

    precision: float
    recall: float
    error_rate: float


def alignment_scores(
    found: Iterable[Iterable[Link]], reference: Sequence[Links]
) -> AlignmentScores:
    """Scores of links (source word, target word) against a reference, over all sentences.

    With A the links found, S the sure ones and P the possible ones, S among them:
    AER = 1 - (|A & S| + |A & P|) / (|A| + |S|).

    Args:
        found: of each sentence.
        reference: of each sentence.

    Raises:
        ValueError: they are not of as many sentences.

    Source: Och and Ney 2003, "A systematic comparison of various statistical alignment models",
    Computational Linguistics 29(1), section 2.
    """
    sure = possible = links = wanted = 0
    for pairs, gold in zip(found, reference, strict=True):
        pairs = set(pairs)
        sure += len(pairs & gold.sure)
        possible += len(pairs & (gold.possible | gold.sure))
        links += len(pairs)
        wanted += len(gold.sure)

    def share(part: int, whole: int) -> float:
        return part / whole if whole else float("nan")

    return AlignmentScores(
        share(possible, links),
        share(sure, wanted),
        1 - share(sure + possible, links + wanted),
    )


def read_links(
    path: Path, sizes: Sequence[tuple[int, int]], *, one_based: bool = False
) -> list[Links]:
    """The reference links of a file with a line for each sentence pair.

    Links are parted by blanks: "3-4" is sure, "3?4" and "3p4" are possible; the source's word
    stands first. A line without links is blank.

    Args:
        path: of the file; may be gzip.
        sizes: words of the source and of the target of each pair.
        one_based: the first word is 1, not 0.

    Raises:
        DataError: it cannot be read, has not a line for each pair, or a link that is none or
            of a word that the sentence has not.
    """
    lines = read_lines(path)
    if len(lines) != len(sizes):
        raise DataError(
            f"{path} must have a line for each of {len(sizes):,} sentence pairs; "
            f"it has {len(lines):,}"
        )
    found = []
    for number, (line, size) in enumerate(zip(lines, sizes), 1):
        sure: set[Link] = set()
        possible: set[Link] = set()
        for text in line.split():
            kind, link = _link(text, size, one_based, f"{path}, line {number}")
            possible.add(link)
            if kind == "-":
                sure.add(link)
        found.append(Links(frozenset(sure), frozenset(possible)))
    return found


def _link(
    text: str, size: tuple[int, int], one_based: bool, where: str
) -> tuple[str, Link]:
    match = _LINK.fullmatch(text)
    if match is None:
        raise DataError(
            f"{where}: {text!r} is no link; write sure ones as 3-4, possible ones as 3?4 or 3p4"
        )
    source, target = (int(match[i]) - one_based for i in (1, 3))
    if not (0 <= source < size[0] and 0 <= target < size[1]):
        counted = "1 (--one-based)" if one_based else "0"
        other = "leave --one-based out" if one_based else "give --one-based"
        raise DataError(
            f"{where}: link {text}, counted from {counted}, is of no words of sentences of "
            f"{size[0]} and {size[1]}; if it is counted from {1 - one_based}, {other}"
        )
    return match[2], (source, target)
