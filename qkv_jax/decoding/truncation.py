"""Which tokens a draw is made from: the likeliest k, the nucleus, the typical ones.

Each takes logits (..., V) float32 and returns them with -inf for what is left out; at least one
token of every row stays. They compose: each sees the distribution that the one before left.
"""

import jax
import jax.numpy as jnp
from jax import lax

from qkv_jax.decoding.steps import normalise


def top_k(logits: jax.Array, k: int) -> jax.Array:
    """The k likeliest tokens, and those as likely as the last of them.

    Source: Fan et al. 2018, arXiv 1805.04833, section 5.4.
    """
    least = lax.top_k(logits, min(k, logits.shape[-1]))[0][..., -1:]
    return jnp.where(logits >= least, logits, -jnp.inf)


def top_p(logits: jax.Array, mass: float) -> jax.Array:
    """The fewest likeliest tokens whose probability is at least `mass`, and ties of the last.

    Source: Holtzman et al. 2020, arXiv 1904.09751, equation 2.
    """
    log_probs = _log_probs(logits)
    return _keep_least(logits, -log_probs, jnp.exp(log_probs), mass)


def typical(logits: jax.Array, mass: float) -> jax.Array:
    """The fewest tokens of probability `mass` whose surprise is nearest to the entropy.

    Source: Meister et al. 2023, arXiv 2202.00666, equation 11.
    """
    log_probs = _log_probs(logits)
    probs = jnp.exp(log_probs)
    entropy = -jnp.where(probs > 0, log_probs * probs, 0.0).sum(axis=-1, keepdims=True)
    return _keep_least(logits, -log_probs - entropy, probs, mass)


def _log_probs(logits: jax.Array) -> jax.Array:
    logits, normaliser = normalise(logits)
    return logits - normaliser[..., None]


def _keep_least(
    logits: jax.Array, order: jax.Array, weights: jax.Array, mass: float
) -> jax.Array:
    """Keeps tokens of the least |order| whose weights sum to at least `mass`; ties stay together.

    The threshold is found by bisection over the bits of its float32, exactly, in 31 sums: on CPU
    a fraction of what a sort of the vocabulary takes. What is kept is decided within the loop:
    compared again after it, the numbers are computed anew by XLA, with other rounding, and the
    token at the threshold would be lost.
    """
    bits = lax.bitcast_convert_type(jnp.abs(order), jnp.int32)
    State = tuple[jax.Array, jax.Array, jax.Array]

    def halve(_: int, state: State) -> State:
        low, high, kept = state
        middle = low + (high - low) // 2
        within = bits <= middle
        held = jnp.where(within, weights, 0.0).sum(axis=-1, keepdims=True)
        enough = held >= mass
        low, high = jnp.where(enough, low, middle), jnp.where(enough, middle, high)
        return low, high, jnp.where(enough, within, kept)

    shape = (*bits.shape[:-1], 1)
    infinity = lax.bitcast_convert_type(jnp.float32(jnp.inf), jnp.int32)
    ends = jnp.full(shape, -1, jnp.int32), jnp.full(shape, infinity, jnp.int32)
    *_, kept = lax.fori_loop(0, 31, halve, (*ends, jnp.ones(bits.shape, bool)))
    return jnp.where(kept, logits, -jnp.inf)
