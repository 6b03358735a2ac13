"""Ids of many sentences as arrays of few shapes."""

import zlib
from collections.abc import Sequence

import numpy as np

SHORTEST_ROW = 16


def phrase_rows(phrases: Sequence[Sequence[Sequence[int]]]) -> np.ndarray | None:
    """(B, C, L) ids, filled up with -1; None: no row has any."""
    count = max((len(row) for row in phrases), default=0)
    width = max((len(phrase) for row in phrases for phrase in row), default=0)
    if not count or not width:
        return None
    count, width = (1 << (n - 1).bit_length() for n in (count, width))
    rows = [[*row, *([[]] * (count - len(row)))] for row in phrases]
    return np.stack([filled(row, width) for row in rows])


def filled(rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """(rows, width) int32, filled up with -1."""
    whole = [[*row, *([-1] * (width - len(row)))] for row in rows]
    return np.array(whole, np.int32).reshape(len(rows), width)


def checksum(row: np.ndarray, pad: int) -> int:
    """A number of 31 bits that depends on a row's ids alone, not on how far it is padded."""
    return zlib.crc32(row[row != pad].astype("<i4").tobytes()) & 0x7FFFFFFF


def row_lengths(longest: int) -> list[int]:
    """Row lengths that double, up to the longest."""
    lengths, length = [], SHORTEST_ROW
    while length < longest:
        lengths.append(length)
        length *= 2
    return [*lengths, longest]
