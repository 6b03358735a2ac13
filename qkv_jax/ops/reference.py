"""The definition of attention: short, dense, differentiable to any order.

Every other implementation must match it. Axes: B batch, T query length, S key length, N query
heads, K key/value heads, G = N // K, H query/key size, E value size.

Order: scale, score rule, mask, softmax, dropout, values. The softmax is float32 (float64 for
float64 inputs). A row that may attend to nothing gives exactly 0 and log-sum-exp -inf. A NaN or
inf in a key or value reaches just the rows that may attend to it, in values and gradients.
"""

import functools

import jax
import jax.numpy as jnp

from qkv_jax.ops.dropout import keep
from qkv_jax.ops.masks import Mask, index_arrays
from qkv_jax.ops.scores import Score

Array = jax.Array


def reference_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: Mask | None,
    score: Score | None,
    scale: float,
    dropout_rate: float,
    dropout_rng: Array | None,
) -> tuple[Array, Array]:
    """Attention and its log-sum-exp, in O(T S) time and memory. Arguments are checked already.

    Returns:
        out (B, T, N, E) in query's dtype; logsumexp (B, T, N) float32 (float64 for float64).
    """
    B, T, N, _ = query.shape
    logits, allowed = masked_logits(query, key, mask=mask, score=score, scale=scale)
    weights, logsumexp = _normalise(logits, allowed)
    if dropout_rate > 0.0 and dropout_rng is not None:
        kept = keep(dropout_rng, dropout_rate, *index_arrays((B, N, T, key.shape[1])))
        weights = jnp.where(kept, weights / (1.0 - dropout_rate), 0.0)
    return weighted_sum(weights, value, allowed).astype(query.dtype), logsumexp


def reference_weights(
    query: Array, key: Array, *, mask: Mask | None, score: Score | None, scale: float
) -> Array:
    """The attention weights (B, N, T, S), float32: what `reference_attention` averages with."""
    return _normalise(*masked_logits(query, key, mask=mask, score=score, scale=scale))[
        0
    ]


def masked_logits(
    query: Array, key: Array, *, mask: Mask | None, score: Score | None, scale: float
) -> tuple[Array, Array | None]:
    """What the weights are made of, for every family of dot products.

    Returns:
        logits (B, N, T, S), float32 at least, NaN for keys that are not finite, not masked yet;
        what the mask admits, bool that broadcasts to them, or None.
    """
    B, T, N, _ = query.shape
    S = key.shape[1]
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    logits = _products(query, key if mask is None else finite(key))
    logits = logits * jnp.asarray(scale, dtype)
    if mask is not None:
        logits = jnp.where(nonfinite_keys(key, N), jnp.nan, logits)
    if score is not None:
        logits = score.over(logits)
    return logits, None if mask is None else mask.materialise((B, N, T, S))


def attend_with_logits(
    logits: Array,
    query: Array,
    key: Array,
    value: Array,
    mask: Mask | None,
    factor: Array | None = None,
) -> Array:
    """Attention with scores of another kind, computed from keys in which 0 stands for NaN and inf.

    Args:
        logits: (B, N, T, S), float32 at least.
        query, key, value, mask: as for `reference_attention`; the query for its dtype alone.
        factor: broadcasts to logits; multiplies the weights after the softmax.

    Returns:
        (B, T, N, E), dtype of query.
    """
    logits = jnp.where(nonfinite_keys(key, logits.shape[1]), jnp.nan, logits)
    B, N, T, S = logits.shape
    allowed = None if mask is None else mask.materialise((B, N, T, S))
    weights, _ = _normalise(logits, allowed)
    weights = weights if factor is None else weights * factor
    return weighted_sum(weights, value, allowed).astype(query.dtype)


def weighted_sum(weights: Array, value: Array, allowed: Array | None) -> Array:
    """The values (B, S, K, E) averaged by weights (B, N, T, S): (B, T, N, E) in weights' dtype.

    A value that is not finite makes those rows NaN that are allowed to see it, and no others.
    """
    B, N, T, _ = weights.shape
    out = _averages(weights, value if allowed is None else finite(value))
    if allowed is None:
        return out
    bad = jnp.any(allowed & nonfinite_keys(value, N), axis=-1)
    bad = jnp.broadcast_to(bad, (B, N, T)).swapaxes(1, 2)
    return jnp.where(bad[..., None], jnp.nan, out)


def _products(query: Array, key: Array) -> Array:
    """(B, T, N, H) with (B, S, K, H): (B, N, T, S), float32 at least.

    Heads are put before the lengths, and groups of one head have no axis, for speed on a CPU.
    """
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    product = functools.partial(jnp.einsum, preferred_element_type=dtype)
    (B, T, N, H), (S, K) = query.shape, key.shape[1:3]
    query, key = query.swapaxes(1, 2), key.swapaxes(1, 2)
    if K == N:
        return product("BNTH,BNSH->BNTS", query, key)
    query = query.reshape(B, K, N // K, T, H)
    return product("BKGTH,BKSH->BKGTS", query, key).reshape(B, N, T, S)


def _averages(weights: Array, value: Array) -> Array:
    """(B, N, T, S) with (B, S, K, E): (B, T, N, E), in the dtype of weights."""
    product = functools.partial(jnp.einsum, preferred_element_type=weights.dtype)
    (B, N, T, S), (K, E) = weights.shape, value.shape[2:]
    weights, value = weights.astype(value.dtype), value.swapaxes(1, 2)
    if K == N:
        return product("BNTS,BNSE->BNTE", weights, value).swapaxes(1, 2)
    weights = weights.reshape(B, K, N // K, T, S)
    out = product("BKGTS,BKSE->BKGTE", weights, value)
    return out.reshape(B, N, T, E).swapaxes(1, 2)


def _normalise(logits: Array, allowed: Array | None) -> tuple[Array, Array]:
    """Softmax over the last axis and its log-sum-exp, both safe for rows with nothing allowed."""
    if allowed is not None:
        logits = jnp.where(allowed, logits, -jnp.inf)
    top = jax.lax.stop_gradient(logits).max(axis=-1, keepdims=True, initial=-jnp.inf)
    top = jnp.where(top == -jnp.inf, 0.0, top)
    weights = jnp.exp(logits - top)
    total = weights.sum(axis=-1, keepdims=True)
    empty = total == 0.0
    total = jnp.where(empty, 1.0, total)
    weights = weights / total
    if allowed is not None:
        # In a row that a NaN reached, the weights of masked keys are NaN too.
        weights = jnp.where(allowed, weights, 0.0)
    logsumexp = jnp.where(empty, -jnp.inf, jnp.log(total) + top)
    return weights, logsumexp[..., 0].swapaxes(1, 2)


def finite(x: Array) -> Array:
    """`x` with 0 for what is NaN or inf."""
    return jnp.where(jnp.isfinite(x), x, jnp.zeros((), x.dtype))


def nonfinite_keys(x: Array, heads: int) -> Array:
    """(B, N, 1, S): whether any component of a key or value (B, S, K, size) is NaN or inf."""
    bad = ~jnp.all(jnp.isfinite(x), axis=-1).swapaxes(1, 2)
    return jnp.repeat(bad, heads // bad.shape[1], axis=1)[:, :, None, :]
