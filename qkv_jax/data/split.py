"""Held-out parts of a corpus that share no sentence with the rest."""

import hashlib
import re
import unicodedata
from collections import defaultdict
from typing import NamedTuple

from qkv_jax.data.parallel import Pair

# Sentences that translate each other in many ways hang together in one group.
# Large groups are the short, ambiguous labels: those are for training.
_LARGEST_HELD_OUT_GROUP = 8


class Split(NamedTuple):
    """Train pairs in the corpus's order; held-out pairs in an order of their own."""

    train: list[Pair]
    valid: list[Pair]
    test: list[Pair]


def split_pairs(pairs: list[Pair], *, held_out: int) -> Split:
    """Return `held_out` pairs to test on, as many to validate on, and the rest.

    Sentences are compared as `normalise` writes them. Pairs that share a side, on
    whichever side, directly or through others, form a group; a group goes into one
    part as a whole, in an order given by hashes of its content. So no sentence of
    one part stands in another, the split does not depend on the order of the pairs,
    and a few pairs more or less change little of it. Of held-out pairs that are
    equal when normalised, the first is kept and the others are in no part.

    Args:
        pairs: distinct pairs.
        held_out: pairs in each of valid and test; less where groups run out.
    """
    groups = _groups(pairs)
    parts: tuple[list[Pair], list[Pair]] = ([], [])  # test, valid
    taken: set[str] = set()
    for name in sorted(groups, key=_digest):
        group = groups[name]
        room = [part for part in parts if len(part) + len(group) <= held_out]
        if room and len(group) <= _LARGEST_HELD_OUT_GROUP:
            room[0].extend(sorted(group.values(), key=lambda pair: _digest(str(pair))))
            taken.update(source for source, _ in group)
    train = [pair for pair in pairs if normalise(pair[0]) not in taken]
    return Split(train=train, valid=parts[1], test=parts[0])


def normalise(text: str) -> str:
    """Return the text in lower case, without punctuation and symbols, numbers as 0."""
    plain = re.sub("0+", "0", text.casefold().translate(_PLAIN))
    return " ".join(plain.split()) or text


class _Plain(dict):
    """A table for `str.translate`, filled as characters are met."""

    def __missing__(self, code: int) -> int | None:
        category = unicodedata.category(chr(code))
        kept = ord("0") if category == "Nd" else code
        self[code] = None if category[0] in "PS" else kept
        return self[code]


_PLAIN = _Plain()


def _groups(pairs: list[Pair]) -> dict[str, dict[Pair, Pair]]:
    """Return the groups by a name: normalised pair -> its least pair as written."""
    written: dict[Pair, Pair] = {}
    for pair in sorted(pairs):
        written.setdefault((normalise(pair[0]), normalise(pair[1])), pair)
    parent: dict[str, str] = {}

    def root(side: str) -> str:
        while (above := parent.setdefault(side, side)) != side:
            parent[side] = parent.setdefault(above, above)
            side = parent[side]
        return side

    for source, target in written:
        ends = sorted((root(f"source {source}"), root(f"target {target}")))
        parent[ends[1]] = ends[0]
    groups: dict[str, dict[Pair, Pair]] = defaultdict(dict)
    for (source, target), pair in written.items():
        groups[root(f"source {source}")][source, target] = pair
    return groups


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
