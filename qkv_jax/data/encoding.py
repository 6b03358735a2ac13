"""Sentences as token ids in two flat arrays."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from qkv_jax.data.buckets import Shape
from qkv_jax.data.parallel import Pair
from qkv_jax.data.tokenizer import EOS, PAD, SentenceTokenizer

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Sentences:
    """Token ids of many sentences, all with the same ending, such as EOS.

    Attributes:
        tokens: (total,) int32, all sentences one after the other.
        offsets: (sentences + 1,) int64; sentence i is tokens[offsets[i]:offsets[i+1]].
        ending: the last ids of each.
        pad: what fills up rows.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    ending: tuple[int, ...] = (EOS,)
    pad: int = PAD

    @classmethod
    def from_lists(
        cls,
        sequences: Iterable[Sequence[int]],
        *,
        ending: tuple[int, ...] = (EOS,),
        pad: int = PAD,
    ) -> "Sentences":
        """Return the sentences of lists of ids that have the ending."""
        arrays = [np.array(ids, np.int32) for ids in sequences]
        offsets = np.zeros(len(arrays) + 1, np.int64)
        np.cumsum([len(array) for array in arrays], out=offsets[1:])
        tokens = np.concatenate(arrays) if arrays else np.zeros(0, np.int32)
        return cls(tokens, offsets, ending, pad)

    @property
    def lengths(self) -> np.ndarray:
        """(sentences,) int64: tokens of each sentence, its ending included."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def rows(self, indices: np.ndarray, width: int) -> np.ndarray:
        """Return sentences as the rows of one array.

        A sentence longer than a row is cut, and still has its ending.

        Args:
            indices: (B,) int: the sentence of each row; -1 for a row of PAD.
            width: T, tokens in a row.

        Returns:
            (B, T) int32, PAD after each sentence.
        """
        return self.packed(indices[:, None], width)[0]

    def packed(self, indices: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Return rows that hold several sentences each, one after the other.

        Args:
            indices: (B, K) int: the sentences of each row, -1 for none; those of a row
                fit into it together, or there is one and it is cut.
            width: T, tokens in a row.

        Returns:
            Tokens, (B, T) int32, PAD after the last sentence; and which of its row's
            sentences each token belongs to, (B, T) int32: 1, 2, ..., and 0 for PAD.
        """
        starts, ends = self.offsets[indices], self.offsets[indices + 1]
        lengths = np.where(indices < 0, 0, np.minimum(ends - starts, width))
        places = lengths.cumsum(1) - lengths + width * np.arange(len(indices))[:, None]
        within = np.arange(lengths.sum()) - np.repeat(
            lengths.cumsum() - lengths.ravel(), lengths.ravel()
        )

        def spread(values: np.ndarray) -> np.ndarray:
            values = np.broadcast_to(values, lengths.shape)
            return np.repeat(values.ravel(), lengths.ravel())

        tokens = np.full(len(indices) * width, self.pad, np.int32)
        segments = np.zeros(len(indices) * width, np.int32)
        tokens[spread(places) + within] = self.tokens[spread(starts) + within]
        for back, token in enumerate(reversed(self.ending), 1):
            tokens[(places + lengths - back)[lengths >= back]] = token
        segments[spread(places) + within] = spread(1 + np.arange(indices.shape[1]))
        return tokens.reshape(-1, width), segments.reshape(-1, width)


def choose(first: np.ndarray, one: Sentences, other: Sentences) -> Sentences:
    """Return sentence i of one where first[i], (sentences,) bool, and else of other."""
    starts = np.where(first, one.offsets[:-1], other.offsets[:-1] + len(one.tokens))
    lengths = np.where(first, one.lengths, other.lengths)
    offsets = np.concatenate([[0], lengths.cumsum()])
    places = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
    tokens = np.concatenate([one.tokens, other.tokens])[places]
    return dataclasses.replace(one, tokens=tokens, offsets=offsets)


class EncodedPairs(NamedTuple):
    """Source and target sentences; sentence i of one translates sentence i of the other."""

    source: Sentences
    target: Sentences

    def batch(self, indices: np.ndarray, shape: Shape) -> Batch:
        """Return the pairs of (B,) indices, -1 for none, as rows of the shape."""
        return {
            "source": self.source.rows(indices, shape.source),
            "target": self.target.rows(indices, shape.target),
        }

    def packed_batch(self, indices: np.ndarray, shape: Shape) -> Batch:
        """Return the pairs of (B, K) indices, K a row, with the segments of each side.

        Pair k of a row, from 1, is segment k of its source and of its target.
        """
        source, source_segments = self.source.packed(indices, shape.source)
        target, target_segments = self.target.packed(indices, shape.target)
        return {
            "source": source,
            "target": target,
            "source_segments": source_segments,
            "target_segments": target_segments,
        }


def encode_sources(sentences: Sequence[str], tokenizer: SentenceTokenizer) -> Sentences:
    """Return the sentences as token ids of the source."""
    return Sentences.from_lists(
        tokenizer.encode_source(sentences),
        ending=tokenizer.source_ending,
        pad=tokenizer.pad,
    )


def encode_targets(sentences: Sequence[str], tokenizer: SentenceTokenizer) -> Sentences:
    """Return the sentences as token ids of the target."""
    return Sentences.from_lists(
        tokenizer.encode_target(sentences), ending=(tokenizer.eos,), pad=tokenizer.pad
    )


def encode_pairs(pairs: Sequence[Pair], tokenizer: SentenceTokenizer) -> EncodedPairs:
    """Return both sides of the pairs as token ids."""
    return EncodedPairs(
        encode_sources([pair[0] for pair in pairs], tokenizer),
        encode_targets([pair[1] for pair in pairs], tokenizer),
    )
