"""Which words of a source a translation's words look at."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# What a piece that begins a word begins with: SentencePiece's mark, and byte-level BPE's.
MARKS = ("▁", "Ġ")


class Alignment(NamedTuple):
    """Attention between words.

    Attributes:
        weights: (target words, source words) float32: the share of its attention that each word
            of the translation gives to each word of the source; what it gives to EOS and to
            language codes is missing.
        pairs: (source word, target word), from 0: for each word of the translation the one it
            looks at most.
    """

    weights: np.ndarray
    pairs: tuple[tuple[int, int], ...]

    @property
    def pharaoh(self) -> str:
        """The pairs as Moses and fast_align write them: "0-0 1-2"."""
        return " ".join(f"{source}-{target}" for source, target in self.pairs)


def align(
    weights: np.ndarray, source: Sequence[str], target: Sequence[str]
) -> Alignment:
    """Joins the attention between pieces to that between words.

    Args:
        weights: (N, T, S): of N heads, of each piece of the target to each of the source.
        source, target: their pieces, special ones as "".

    Source: Garg et al. 2019, arXiv 1909.02074, section 3: the average over the heads of the
    last but one decoder layer, and of each target the likeliest source.
    """
    return from_weights(between_words(weights.mean(axis=0), source, target))


def between_words(
    weights: np.ndarray, source: Sequence[str], target: Sequence[str]
) -> np.ndarray:
    """Attention (..., T, S) between pieces as that between words, (..., target, source words).

    To a word goes what goes to all its pieces, and from a word the mean of what goes from them.

    Source: Clark et al. 2019, arXiv 1906.04341, section 4.1.
    """
    of, to = _membership(target), _membership(source)
    return of / of.sum(axis=1, keepdims=True) @ weights @ to.T


def _membership(pieces: Sequence[str]) -> np.ndarray:
    """(words, pieces): 1 where a piece is part of a word."""
    numbers = word_numbers(pieces)
    return (numbers == np.arange(numbers.max(initial=-1) + 1)[:, None]).astype(float)


def from_weights(weights: np.ndarray) -> Alignment:
    """The alignment of weights (target words, source words)."""
    pairs = () if not weights.size else enumerate(weights.argmax(axis=1))
    found = tuple(sorted((int(source), target) for target, source in pairs))
    return Alignment(weights.astype(np.float32), found)


def word_numbers(pieces: Sequence[str]) -> np.ndarray:
    """(pieces,) int: the word that each piece is part of, from 0; -1 for a special piece."""
    numbers, word, fresh = np.full(len(pieces), -1), -1, True
    for i, piece in enumerate(pieces):
        content = piece.lstrip("".join(MARKS))
        fresh = fresh or piece.startswith(MARKS)
        if not content:  # A mark alone begins the word that follows.
            continue
        if fresh:
            word, fresh = word + 1, False
        numbers[i] = word
    return numbers


def words(pieces: Sequence[str]) -> list[str]:
    """The words that pieces make."""
    numbers = word_numbers(pieces)
    found = [""] * (numbers.max(initial=-1) + 1)
    for number, piece in zip(numbers, pieces):
        if number >= 0:
            found[number] += piece.lstrip("".join(MARKS))
    return found


def side_by_side(parts: Sequence[Alignment]) -> Alignment:
    """The alignment of a text whose parts were translated one by one."""
    sizes = [part.weights.shape for part in parts]
    whole = np.zeros(tuple(np.sum(sizes, axis=0)), np.float32)
    row = column = 0
    for part, (height, width) in zip(parts, sizes):
        whole[row : row + height, column : column + width] = part.weights
        row, column = row + height, column + width
    return from_weights(whole)
