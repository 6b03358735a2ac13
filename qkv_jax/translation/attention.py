"""What a model looks at in a sentence pair, of each layer that is asked for."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from qkv_jax.data import SentenceTokenizer


class Tokens(NamedTuple):
    """Tokens of one side of a pair.

    Attributes:
        ids: (tokens,) int.
        pieces: what each is written as.
        special: (tokens,) bool: which are no text, such as EOS or the code of a language.
    """

    ids: np.ndarray
    pieces: list[str]
    special: np.ndarray

    @property
    def text(self) -> list[str]:
        """The pieces, "" for special ones."""
        return ["" if no else piece for no, piece in zip(self.special, self.pieces)]


class PairAttention(NamedTuple):
    """Attention in one sentence pair.

    Attributes:
        source: S tokens.
        target: T tokens that are predicted.
        given: T tokens that the decoder is given: the start, and all of the target but the last.
        weights: of each layer by name, (N, T, S) float32: what each token looks at, by N heads.
    """

    source: Tokens
    target: Tokens
    given: Tokens
    weights: dict[str, np.ndarray]

    def sides(self, layer: str) -> tuple[Tokens, Tokens]:
        """What asks and what is looked at in a layer; of a decoder, what asks is predicted."""
        if layer.startswith("encoder"):
            return self.source, self.source
        return self.target, self.source if layer.endswith("cross") else self.given


def pair_attention(
    tokenizer: SentenceTokenizer,
    source: np.ndarray,
    target: np.ndarray,
    weights: dict[str, np.ndarray],
) -> PairAttention:
    """Takes the padding off one row of a batch.

    Args:
        tokenizer: of the model.
        source, target: (S,) and (T,) int32, padded on the right.
        weights: of each layer, padded likewise.
    """
    source, target = _content(source, tokenizer.pad), _content(target, tokenizer.pad)
    given = np.concatenate([[tokenizer.start], target[:-1]])[: len(target)]
    frame = {*tokenizer.source_beginning, *tokenizer.source_ending}
    never = {*tokenizer.never, tokenizer.eos, *tokenizer.prefix} - {tokenizer.unk}

    def tokens(ids: np.ndarray, pieces: Sequence[str], special: set[int]) -> Tokens:
        return Tokens(ids, list(pieces), np.isin(ids, list(special)))

    pieces = tokenizer.target_pieces
    before = tokens(given, pieces(given.tolist()), never)
    before.special[:1] = True
    found = PairAttention(
        tokens(source, tokenizer.source_pieces(source.tolist()), frame),
        tokens(target, pieces(target.tolist()), never),
        before,
        {},
    )
    for name, layer in weights.items():
        asks, seen = found.sides(name)
        found.weights[name] = layer[:, : len(asks.ids), : len(seen.ids)]
    return found


def _content(row: np.ndarray, pad: int) -> np.ndarray:
    return row[: np.flatnonzero(row != pad).max(initial=-1) + 1]
