"""Sentences as token ids in two flat arrays."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from qkv_jax.data.buckets import Shape
from qkv_jax.data.parallel import Pair
from qkv_jax.data.tokenizer import EOS, PAD, Tokenizer

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Sentences:
    """Token ids of many sentences, each ending in EOS.

    Attributes:
        tokens: (total,) int32, all sentences one after the other.
        offsets: (sentences + 1,) int64; sentence i is tokens[offsets[i]:offsets[i+1]].
    """

    tokens: np.ndarray
    offsets: np.ndarray

    @classmethod
    def from_lists(cls, sequences: Iterable[Sequence[int]]) -> "Sentences":
        """Return the sentences of lists of ids without EOS, which is added."""
        arrays = [np.array([*ids, EOS], np.int32) for ids in sequences]
        offsets = np.zeros(len(arrays) + 1, np.int64)
        np.cumsum([len(array) for array in arrays], out=offsets[1:])
        tokens = np.concatenate(arrays) if arrays else np.zeros(0, np.int32)
        return cls(tokens, offsets)

    @property
    def lengths(self) -> np.ndarray:
        """(sentences,) int64: tokens of each sentence, EOS included."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def rows(self, indices: np.ndarray, width: int) -> np.ndarray:
        """Return sentences as the rows of one array.

        A sentence longer than a row is cut, and still ends in EOS.

        Args:
            indices: (B,) int: the sentence of each row; -1 for a row of PAD.
            width: T, tokens in a row.

        Returns:
            (B, T) int32, PAD after each sentence.
        """
        starts, ends = self.offsets[indices], self.offsets[indices + 1]
        lengths = np.where(indices < 0, 0, np.minimum(ends - starts, width))
        columns = np.arange(width)
        inside = columns < lengths[:, None]
        rows = np.full(inside.shape, PAD, np.int32)
        rows[inside] = self.tokens[(starts[:, None] + columns)[inside]]
        rows[columns == lengths[:, None] - 1] = EOS
        return rows


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


def encode_sentences(sentences: Sequence[str], tokenizer: Tokenizer) -> Sentences:
    """Return the sentences as token ids with EOS."""
    return Sentences.from_lists(tokenizer.encode(sentences))


def encode_pairs(pairs: Sequence[Pair], tokenizer: Tokenizer) -> EncodedPairs:
    """Return both sides of the pairs as token ids with EOS, by one vocabulary."""
    sources, targets = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    return EncodedPairs(
        encode_sentences(sources, tokenizer), encode_sentences(targets, tokenizer)
    )
