"""Dependency trees in CoNLL-U files."""

import re
from pathlib import Path
from typing import NamedTuple

from qkv_jax.data.errors import DataError
from qkv_jax.data.files import read_lines

COLUMNS = 10
# Of tokens of several words, "3-4", and of words that were left out, "3.1".
_NO_WORD = re.compile(r"\d+[-.]\d+")


class Tree(NamedTuple):
    """A sentence with what depends on what.

    Attributes:
        words: its words.
        heads: of each word the one that it depends on, from 0; -1: the root.
        relations: of each word the relation, without subtype: "nsubj" for "nsubj:pass".
    """

    words: list[str]
    heads: list[int]
    relations: list[str]


def read_conllu(path: Path) -> list[Tree]:
    """The trees of a file, in order.

    Raises:
        DataError: it cannot be read, or a line is not of the format.

    Source: the CoNLL-U format of Universal Dependencies, version 2.
    """
    trees: list[Tree] = []
    rows: list[list[str]] = []
    begun = 0
    for number, line in enumerate([*read_lines(path), ""], 1):
        if not line.strip():
            if rows:
                trees.append(_tree(rows, f"{path}, sentence of line {begun}"))
            rows = []
        elif not line.startswith("#"):
            begun = begun if rows else number
            columns = line.split("\t")
            if len(columns) != COLUMNS:
                raise DataError(
                    f"{path}, line {number}: a line of CoNLL-U has {COLUMNS} columns parted by "
                    f"tabs; it has {len(columns)}"
                )
            if not _NO_WORD.fullmatch(columns[0]):
                rows.append(columns)
    if not trees:
        raise DataError(f"{path} holds no sentence")
    return trees


def _tree(rows: list[list[str]], where: str) -> Tree:
    if [row[0] for row in rows] != [str(i) for i in range(1, len(rows) + 1)]:
        raise DataError(f"{where}: words must be numbered 1, 2, ...")
    heads = []
    for row in rows:
        head = int(row[6]) if row[6].isdecimal() else -1
        if not 0 <= head <= len(rows):
            raise DataError(
                f"{where}: the head of word {row[0]} must be in 0 .. {len(rows)}; got {row[6]!r}"
            )
        heads.append(head - 1)
    # A blank within a word would make two of it.
    words = [row[1].replace(" ", "_") for row in rows]
    return Tree(words, heads, [row[7].partition(":")[0] for row in rows])
