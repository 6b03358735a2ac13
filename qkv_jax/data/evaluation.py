"""Every sentence once, in batches of a few static shapes, to evaluate or translate."""

from collections.abc import Iterator, Sequence

import numpy as np

from qkv_jax.data.buckets import Shape, assign_buckets, bucket_rows, check_chain
from qkv_jax.data.encoding import Batch, EncodedPairs, Sentences

FEW_ROWS = 8


def eval_batches(
    pairs: EncodedPairs,
    buckets: Sequence[Shape],
    *,
    target_tokens: int,
    source_tokens: int | None = None,
    rows_multiple: int = 1,
) -> Iterator[tuple[np.ndarray, Batch]]:
    """Yield every pair once, in batches of the buckets' shapes, unshuffled.

    Pairs longer than the largest bucket are truncated, never dropped.

    Args:
        pairs, buckets, target_tokens, source_tokens, rows_multiple: as for
            `BatchStream`.

    Yields:
        (B,) int64 indices into pairs, -1 for an unused row, and the batch.
    """
    buckets = check_chain(buckets)
    bucket = assign_buckets(pairs.source.lengths, pairs.target.lengths, buckets)
    bucket = np.minimum(bucket, len(buckets) - 1)
    for index, shape in enumerate(buckets):
        rows = bucket_rows(
            shape,
            target_tokens=target_tokens,
            source_tokens=source_tokens,
            rows_multiple=rows_multiple,
        )
        for indices in _chunks(np.flatnonzero(bucket == index), rows):
            yield indices, pairs.batch(indices, shape)


def source_batches(
    sentences: Sentences,
    lengths: Sequence[int],
    *,
    rows: int,
    rows_multiple: int = 1,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield every sentence once, to be translated, in batches of few shapes.

    Each batch holds sentences of about one length, so that they end at about one time. Those
    that do not fill three quarters of a batch of their length go into the next length's, where
    that has any: wider rows cost less than unused ones, and fewer shapes are compiled.

    Sentences longer than the longest length are truncated, never dropped.

    Args:
        sentences: what to translate.
        lengths: possible lengths of a row, increasing.
        rows: the most rows of a batch. Where fewer sentences are left, their batch has the first
            of 8, 32, 128, ... rows that holds them: long rows are few, and cost most.
        rows_multiple: rows are rounded up to a multiple of this (devices).

    Yields:
        (B,) int64 indices into sentences, -1 for an unused row, and (B, S) int32.
    """
    if not len(lengths) or list(lengths) != sorted(set(lengths)) or lengths[0] < 1:
        raise ValueError(f"lengths must be positive and increasing; got {lengths}")
    bucket = np.searchsorted(lengths, sentences.lengths)
    bucket = np.minimum(bucket, len(lengths) - 1)
    order = np.argsort(sentences.lengths, kind="stable")
    full = -(-rows // rows_multiple) * rows_multiple
    left = np.zeros(0, np.int64)
    for index, length in enumerate(lengths):
        left = np.concatenate([left, order[bucket[order] == index]])
        ready = (len(left) + full // 4) // full * full
        for indices in _chunks(left[:ready], full):
            yield indices, sentences.rows(indices, length)
        left = left[ready:]
        if len(left) and not (bucket == index + 1).any():
            height = FEW_ROWS
            while height < len(left):
                height *= 4
            height = -(-min(height, rows) // rows_multiple) * rows_multiple
            for indices in _chunks(left, height):
                yield indices, sentences.rows(indices, length)
            left = left[:0]


def _chunks(members: np.ndarray, rows: int) -> Iterator[np.ndarray]:
    for start in range(0, len(members), rows):
        chunk = members[start : start + rows]
        yield np.pad(chunk, (0, rows - len(chunk)), constant_values=-1)
