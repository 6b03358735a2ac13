"""Training pairs whose segmentation into subwords is another one in every epoch."""

import dataclasses
import itertools
from collections.abc import Collection, Sequence

import numpy as np

from qkv_jax.data.encoding import EncodedPairs, Sentences
from qkv_jax.data.parallel import Pair
from qkv_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class SubwordSampler:
    """An epoch's number -> the pairs, segmented as (seed, epoch) alone draw it.

    So a run that goes on in the midst of an epoch, and each of many processes, draws the same.

    Attributes:
        pairs: text.
        tokenizer: of both sides.
        alpha, nbest: see `Tokenizer.sample`.
        seed: of all epochs.
        symbols: words that stand whole where sentences begin with them, such as tags.
    """

    pairs: Sequence[Pair]
    tokenizer: Tokenizer
    alpha: float
    nbest: int = -1
    seed: int = 0
    symbols: Collection[str] = ()

    def __call__(self, epoch: int) -> EncodedPairs:
        """Return the pairs as token ids."""
        return EncodedPairs(*(self._side(epoch, side) for side in (0, 1)))

    def _side(self, epoch: int, side: int) -> Sentences:
        seeds = np.random.SeedSequence((self.seed, epoch, side))
        tags, texts = zip(*(self._parts(pair[side]) for pair in self.pairs))
        drawn = self.tokenizer.sample(
            texts,
            alpha=self.alpha,
            nbest=self.nbest,
            seed=int(seeds.generate_state(1)[0]) // 2,
        )
        first = () if side else self.tokenizer.source_beginning
        last = (self.tokenizer.eos,)
        return Sentences.from_lists(
            [*first, *whole, *ids, *last]
            for whole, ids in zip(self.tokenizer.encode(tags), drawn)
        )

    def _parts(self, sentence: str) -> tuple[str, str]:
        """The symbols that a sentence begins with, and its text."""
        words = sentence.split(" ")
        text = itertools.dropwhile(lambda word: word in self.symbols, words)
        tags = itertools.takewhile(lambda word: word in self.symbols, words)
        return " ".join(tags), " ".join(text)
