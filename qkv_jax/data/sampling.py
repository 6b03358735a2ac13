"""Training pairs whose segmentation into subwords is another one in every epoch."""

import dataclasses
from collections.abc import Sequence

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
    """

    pairs: Sequence[Pair]
    tokenizer: Tokenizer
    alpha: float
    nbest: int = -1
    seed: int = 0

    def __call__(self, epoch: int) -> EncodedPairs:
        """Return the pairs as token ids."""
        return EncodedPairs(*(self._side(epoch, side) for side in (0, 1)))

    def _side(self, epoch: int, side: int) -> Sentences:
        seeds = np.random.SeedSequence((self.seed, epoch, side))
        ids = self.tokenizer.sample(
            [pair[side] for pair in self.pairs],
            alpha=self.alpha,
            nbest=self.nbest,
            seed=int(seeds.generate_state(1)[0]) // 2,
        )
        return Sentences.from_lists(ids)
