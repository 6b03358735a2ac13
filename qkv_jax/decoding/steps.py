"""What a search is given: a model's decoding step and cache; and what its numbers stand for."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp


class ReorderableCache(Protocol):
    """A pytree whose hypotheses can be permuted and repeated, as beam search asks."""

    def reorder(self, parents: jax.Array, /) -> Self:
        """New hypothesis z of row b continues old hypothesis parents[b, z]; (B, Z) int32."""
        ...


class LogProbs(NamedTuple):
    """What a step returns in place of logits where they are not to be normalised.

    Attributes:
        values: (B, Z, V) floating: log-probabilities, or what stands for them. They need not
            sum to one.
    """

    values: jax.Array


# step(tokens (B, Z) int32, cache) -> (logits (B, Z, V) or LogProbs, cache)
Step = Callable[[jax.Array, Any], tuple[jax.Array | LogProbs, Any]]

# lengths (int32, any shape, at least 1) -> positive divisors, float32
Penalty = Callable[[jax.Array], jax.Array]


def normalise(logits: jax.Array | LogProbs) -> tuple[jax.Array, jax.Array]:
    """Float32 logits (..., V), and the normaliser (...): log-probabilities are their difference.

    They are -inf, and not NaN, where every logit is -inf.
    """
    if isinstance(logits, LogProbs):
        values = logits.values.astype(jnp.float32)
        return values, jnp.zeros(values.shape[:-1], jnp.float32)
    logits = logits.astype(jnp.float32)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    return logits, jnp.where(normaliser == -jnp.inf, 0.0, normaliser)
