"""What a hypothesis may not hold or has to: rules on the next token, functions of the tokens so far.

They hold no state: each step reads them off the history, so nothing has to follow a reordering.
"""

import dataclasses
import math
from collections import defaultdict

import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constraints:
    """Rules for every row, the same under greedy search, beam search and sampling.

    Hashable, so static under jit. The history that phrases, n-grams and the penalty look at is
    BOS and all tokens since, forced ones included, as in transformers. The tokens of a `prefix`
    are exempt from all rules. At the limit EOS is exempt from `min_length`.

    Attributes:
        min_length: fewest tokens before EOS; those of a prefix count. `min_new_tokens` there.
        no_repeat_ngram: n: no n tokens in a row occur twice; 0: no such rule. EOS is exempt, so
            that a model whose BOS is EOS can end. `no_repeat_ngram_size` there.
        repetition_penalty: above 1, tokens of the history become less likely; 1: no such rule.
            Positive numbers are divided by it and negative ones multiplied. As there, the numbers
            are logits in greedy search and sampling, and log-probabilities in beam search. It
            changes what is chosen and, in beam search, `scores`; never `log_probs`.
        banned_phrases: sequences of ids that never occur. One that ends in EOS may not end a
            hypothesis, and at the limit leaves none. `bad_words_ids` there.

    Raises:
        ValueError: a number is out of range; a phrase is empty or holds a negative id.

    Source: transformers 5.23, `generation/logits_process.py`; the penalty is Keskar et al. 2019,
    arXiv 1909.05858, section 4.1, with the division by sign that transformers added.
    """

    min_length: int = 0
    no_repeat_ngram: int = 0
    repetition_penalty: float = 1.0
    banned_phrases: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        phrases = tuple(tuple(map(int, phrase)) for phrase in self.banned_phrases)
        object.__setattr__(self, "banned_phrases", phrases)
        for name in ("min_length", "no_repeat_ngram"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"{name} must be at least 0; got {getattr(self, name)}."
                )
        penalty = self.repetition_penalty
        if not (math.isfinite(penalty) and penalty > 0):
            raise ValueError(
                f"repetition_penalty must be positive and finite; got {penalty}."
            )
        for phrase in phrases:
            if not phrase or min(phrase) < 0:
                raise ValueError(
                    f"banned_phrases must hold sequences of ids of at least 0; got {phrase}."
                )


NONE = Constraints()


def penalise_repetition(
    numbers: jax.Array, seen: jax.Array, count: jax.Array, penalty: float
) -> jax.Array:
    """(B, Z, V) numbers, lowered for tokens among the first `count` of seen (B, Z, N)."""
    valid = jnp.arange(seen.shape[2])[None, None] < count
    present = _marks(seen, valid, numbers.shape[2])
    lowered = jnp.where(numbers < 0, numbers * penalty, numbers / penalty)
    return jnp.where(present, lowered, numbers)


def repeating(
    seen: jax.Array, count: jax.Array, n: int, vocabulary: int
) -> jax.Array | None:
    """(B, Z, V): True for tokens that would make n tokens in a row occur twice.

    Args:
        seen: (B, Z, N) int32, of which the first count () are the history.
        n: at least 1.
        vocabulary: V.

    Returns:
        None where a history of N is too short for any.
    """
    starts = seen.shape[2] - n + 1
    if starts < 1:
        return None
    last = _tail(seen, count, n - 1)
    valid = jnp.arange(starts) + n <= count
    match = jnp.broadcast_to(valid[None, None], (*seen.shape[:2], starts))
    for i in range(n - 1):
        match &= seen[:, :, i : i + starts] == last[:, :, i : i + 1]
    return _marks(seen[:, :, n - 1 :], match, vocabulary)


def completing(
    seen: jax.Array,
    count: jax.Array,
    phrases: tuple[tuple[int, ...], ...],
    vocabulary: int,
) -> jax.Array:
    """(B, Z, V): True for tokens that would complete one of the phrases; `seen` as in repeating."""
    by_length = defaultdict(list)
    for phrase in phrases:
        by_length[len(phrase)].append(phrase)
    banned = jnp.zeros((*seen.shape[:2], vocabulary), bool)
    for length, group in by_length.items():
        rows = jnp.array(group, jnp.int32)[None, None]
        last = _tail(seen, count, length - 1)[:, :, None]
        match = (last == rows[..., :-1]).all(axis=-1) & (count >= length - 1)
        tokens = jnp.broadcast_to(rows[..., -1], match.shape)
        banned |= _marks(tokens, match, vocabulary)
    return banned


def _tail(seen: jax.Array, count: jax.Array, size: int) -> jax.Array:
    """(B, Z, size): the last of the history, right-aligned; -1 before its start."""
    padded = jnp.pad(seen, ((0, 0), (0, 0), (size, 0)), constant_values=-1)
    return lax.dynamic_slice_in_dim(padded, count, size, axis=2)


def _marks(tokens: jax.Array, where: jax.Array, vocabulary: int) -> jax.Array:
    """(B, Z, V): True for those of tokens (B, Z, K) whose place in `where` is True."""
    rows = jnp.arange(tokens.shape[0])[:, None, None]
    hypotheses = jnp.arange(tokens.shape[1])[None, :, None]
    tokens = jnp.where(where, tokens, vocabulary)
    marks = jnp.zeros((*tokens.shape[:2], vocabulary), bool)
    return marks.at[rows, hypotheses, tokens].set(True, mode="drop")
