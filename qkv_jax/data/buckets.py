"""A few rectangular shapes that hold sentences of many lengths with little padding."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Limits the search to this many candidate lengths a side: its cost grows with the
# fourth power (40: 2.6 million costs, computed once and scanned `count` times).
_CANDIDATES = 40


class Shape(NamedTuple):
    """Tokens in a row of a batch, EOS included."""

    source: int
    target: int


def choose_buckets(
    source_lengths: np.ndarray,
    target_lengths: np.ndarray,
    *,
    count: int = 8,
    multiple: int = 4,
    max_source: int | None = None,
    max_target: int | None = None,
    target_weight: float = 2.0,
) -> list[Shape]:
    """Return at most `count` shapes that pad a corpus least, smallest first.

    Each shape holds the one before it, and a pair goes into the first that holds it.
    Among all such chains the one of least cost is found by dynamic programming over
    the grid of possible shapes (thinned where lengths are many).

    Args:
        source_lengths: (pairs,) int, tokens with EOS.
        target_lengths: (pairs,) int, tokens with EOS.
        count: shapes at most: each costs a compilation.
        multiple: sizes are rounded up to a multiple of this.
        max_source: longest source that must fit. None: the longest sentence.
        max_target: longest target that must fit. None: the longest sentence.
        target_weight: cost of a target token, where a source token costs 1. Decoders
            attend twice and compute logits: 1.5 to 4 for small models.

    Returns:
        Shapes in increasing order. The last has the longest lengths, or the limits
        where these are lower, rounded up.
    """
    _check_positive(count=count, multiple=multiple, target_weight=target_weight)
    if not len(source_lengths):
        raise ValueError("source_lengths is empty: there is nothing to choose by")
    sources, first = _grid(source_lengths, max_source, multiple, "max_source")
    targets, second = _grid(target_lengths, max_target, multiple, "max_target")
    fits = (first < len(sources)) & (second < len(targets))
    held = np.zeros((len(sources), len(targets)))
    np.add.at(held, (first[fits], second[fits]), 1)
    # held[i, j]: pairs that fit into (sources[i], targets[j]).
    held = held.cumsum(0).cumsum(1)
    price = sources[:, None] + target_weight * targets[None, :]
    chain = _cheapest_chain(held, price, count)
    return [Shape(int(sources[i]), int(targets[j])) for i, j in chain]


def assign_buckets(
    source_lengths: np.ndarray, target_lengths: np.ndarray, buckets: Sequence[Shape]
) -> np.ndarray:
    """Return (pairs,) int64: the first bucket that holds each pair, or len(buckets)."""
    bucket = np.full(len(source_lengths), len(buckets))
    for index in reversed(range(len(buckets))):
        shape = buckets[index]
        fits = (source_lengths <= shape.source) & (target_lengths <= shape.target)
        bucket[fits] = index
    return bucket


def bucket_rows(
    shape: Shape,
    *,
    target_tokens: int,
    source_tokens: int | None = None,
    rows_multiple: int = 1,
) -> int:
    """Return how many rows of a shape make a batch.

    Args:
        shape: tokens in a row.
        target_tokens: the most target tokens in a batch, padding included.
        source_tokens: the same for the source. None: no limit.
        rows_multiple: rows are rounded down to a multiple of this, but are at least
            this many, whatever the budgets: devices x accumulation steps.
    """
    _check_positive(target_tokens=target_tokens, rows_multiple=rows_multiple)
    rows = target_tokens // shape.target
    if source_tokens is not None:
        _check_positive(source_tokens=source_tokens)
        rows = min(rows, source_tokens // shape.source)
    return max(rows // rows_multiple, 1) * rows_multiple


def check_chain(buckets: Sequence[Shape]) -> list[Shape]:
    """Return the shapes; raise ValueError unless each holds the one before."""
    shapes = [Shape(*shape) for shape in buckets]
    grows = all(
        a.source <= b.source and a.target <= b.target
        for a, b in itertools.pairwise(shapes)
    )
    if not shapes or not grows or min(shapes[0]) < 1:
        raise ValueError(f"buckets must each hold the one before; got {shapes}")
    return shapes


def _grid(lengths, limit, multiple, name) -> tuple[np.ndarray, np.ndarray]:
    """Return the candidate sizes and, for every length, the first that holds it."""
    lengths = np.asarray(lengths)
    longest = int(lengths.max())
    if limit is not None:
        _check_positive(**{name: limit})
        longest = min(longest, limit)
    rounded = -(-np.minimum(lengths, longest) // multiple) * multiple
    sizes = np.unique(np.append(rounded, -(-longest // multiple) * multiple))
    if len(sizes) > _CANDIDATES:
        # Evenly by the tokens below: sizes lie close where most tokens are.
        ordered = np.sort(rounded)
        mass = np.cumsum(ordered)
        kept = np.searchsorted(mass, np.linspace(0, mass[-1], _CANDIDATES))
        sizes = np.unique(np.append(ordered[kept], sizes[-1]))
    return sizes, np.searchsorted(sizes, lengths)


def _cheapest_chain(
    held: np.ndarray, price: np.ndarray, count: int
) -> list[tuple[int, int]]:
    """Return up to `count` grid points, each at or above the one before, last the end.

    A point (i, j) after (k, l) holds held[i, j] - held[k, l] pairs at price[i, j].
    """
    rows, columns = held.shape
    # (rows, columns, rows, columns): whether the first point is at or above the second.
    above = np.einsum(
        "ik,jl->ijkl", np.tri(rows, dtype=bool), np.tri(columns, dtype=bool)
    )
    flat, cost_each = held.reshape(-1), price.reshape(-1)
    step = (flat[:, None] - flat[None, :]) * cost_each[:, None]
    step[~above.reshape(step.shape)] = np.inf
    best = flat * cost_each
    previous = []
    for _ in range(min(count, len(flat)) - 1):
        total = step + best[None, :]
        previous.append(total.argmin(1))
        best = np.take_along_axis(total, previous[-1][:, None], 1)[:, 0]
    chain = [len(flat) - 1]
    for choice in reversed(previous):
        chain.append(int(choice[chain[-1]]))
    points = sorted(set(chain))
    # Where fewer buckets do, the others hold nothing that the one before does not.
    holds_more = np.diff(flat[points], prepend=0) > 0
    holds_more[-1] = True
    return [divmod(p, columns) for p, needed in zip(points, holds_more) if needed]


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if value <= 0:
            raise ValueError(f"{name} must be positive; got {value}")
