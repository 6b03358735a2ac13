"""Hypotheses: what a search returns."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hypotheses:
    """The Z best hypotheses of B rows, best first, distinct within a row.

    Of `sample`, Z samples in the order they were drawn.

    A place for which no hypothesis exists (fewer than Z are possible, or the row's limit is 0)
    has score and log-probability -inf, length 0 and nothing but PAD.

    Attributes:
        tokens: (B, Z, M) int32; M is the search's max_length. No BOS; EOS, then PAD.
        scores: (B, Z) float32, descending: log_probs / length_penalty(lengths). In a beam search
            with a repetition penalty, the penalised log-probabilities take the place of these.
        log_probs: (B, Z) float32: sum of the model's own over the tokens, EOS included; those of
            a prefix count 0.
        lengths: (B, Z) int32: generated tokens, EOS included.
    """

    tokens: jax.Array
    scores: jax.Array
    log_probs: jax.Array
    lengths: jax.Array


def empty(shape: tuple[int, int, int], pad: int) -> Hypotheses:
    """Places (B, Z, M) without a hypothesis."""
    return Hypotheses(
        tokens=jnp.full(shape, pad, jnp.int32),
        scores=jnp.full(shape[:2], -jnp.inf, jnp.float32),
        log_probs=jnp.full(shape[:2], -jnp.inf, jnp.float32),
        lengths=jnp.zeros(shape[:2], jnp.int32),
    )


def take(array: jax.Array, indices: jax.Array) -> jax.Array:
    """Rows' entries in a new order: (B, Z, ...) by (B, K) gives (B, K, ...)."""
    return jax.vmap(lambda row, index: row[index])(array, indices)


def merge(first: Hypotheses, second: Hypotheses) -> Hypotheses:
    """The best of both, as many as `first` holds; of equal scores, `first`'s come first."""
    both = jax.tree.map(lambda *pair: jnp.concatenate(pair, axis=1), first, second)
    _, best = lax.top_k(both.scores, first.scores.shape[1])
    return jax.tree.map(lambda array: take(array, best), both)
