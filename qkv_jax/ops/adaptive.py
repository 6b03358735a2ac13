"""Adaptively sparse attention: alpha-entmax in place of the softmax, with a learned alpha a head.

alpha-entmax gives exact zeros for alpha > 1: the softmax is alpha = 1, sparsemax alpha = 2. Axes:
see reference.py. Sources: Martins and Astudillo 2016, arXiv 1602.02068 (sparsemax); Peters et al.
2019, arXiv 1905.05702 (entmax); Correia et al. 2019, arXiv 1909.00015 (learned alpha).
"""

import jax
import jax.numpy as jnp

from qkv_jax.ops.attention import check_arguments
from qkv_jax.ops.masks import Mask, as_mask
from qkv_jax.ops.reference import masked_logits, weighted_sum
from qkv_jax.ops.scores import Score, supported

Array = jax.Array


def entmax(
    logits: Array, alpha: float | Array = 1.5, *, where: Array | None = None
) -> Array:
    """alpha-entmax over the last axis: a distribution with exact zeros.

    By bisection on the threshold, as many halvings as the dtype has digits. Forward and reverse
    mode, for alpha, too.

    Args:
        logits: (..., S) floating; -inf has weight 0.
        alpha: 1 or more, broadcasts to logits' shape without its last axis. To learn it, let it be
            `1 + jax.nn.sigmoid(a)`.
        where: bool, broadcasts to logits; False has weight exactly 0. None: all may have weight.

    Returns:
        (..., S) of at least float32, sums 1; all 0 where nothing is allowed.

    Raises:
        ValueError: a Python number alpha under 1.
    """
    if isinstance(alpha, (int, float)) and alpha < 1:
        raise ValueError(f"alpha must be at least 1; got {alpha}.")
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    alpha = jnp.asarray(alpha, logits.dtype)
    if alpha.ndim >= logits.ndim:
        raise ValueError(
            f"alpha must broadcast to {logits.shape[:-1]}; got shape {alpha.shape}."
        )
    if where is not None:
        logits = jnp.where(where, logits, -jnp.inf)
    weights = _entmax(logits, jnp.broadcast_to(alpha, logits.shape[:-1])[..., None])
    return weights if where is None else jnp.where(where, weights, 0.0)


def sparsemax(logits: Array, *, where: Array | None = None) -> Array:
    """The Euclidean projection onto the simplex: `entmax` with alpha = 2."""
    return entmax(logits, 2.0, where=where)


def entmax_attention(
    query: Array,
    key: Array,
    value: Array,
    alpha: Array,
    *,
    mask: Mask | Array | None = None,
    score: Score | None = None,
    scale: float | None = None,
) -> Array:
    """Attention whose weights are the alpha-entmax of the scores; O(T S) memory.

    Args:
        query, key, value, mask, score, scale: as for `dot_product_attention`, in the same order.
        alpha: () or (N,), 1 or more, one a query head, differentiable; see `entmax`.

    Returns:
        (B, T, N, E), dtype of query; a row with no allowed key is exactly 0.
    """
    alpha = jnp.asarray(alpha)
    if alpha.ndim > 1 or alpha.shape not in ((), (query.shape[2],)):
        raise ValueError(
            f"alpha must be () or (N,) = {query.shape[2:3]}; got shape {alpha.shape}."
        )
    check_arguments(query, key, value, score)
    logits, allowed = masked_logits(
        query,
        key,
        mask=supported(as_mask(mask), score),
        score=score,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
    )
    weights = entmax(logits, alpha.reshape(1, -1, 1), where=allowed)
    return weighted_sum(weights, value, allowed).astype(query.dtype)


@jax.custom_jvp
def _entmax(logits: Array, alpha: Array) -> Array:
    """logits (..., S) and alpha (..., 1)."""
    top = logits.max(axis=-1, keepdims=True, initial=-jnp.inf)
    known = jnp.isfinite(top) | (top == -jnp.inf)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    soft = alpha == 1.0
    spread = jnp.where(soft, 1.0, alpha - 1.0)
    scores = (logits - top) * spread

    def weights(threshold: Array) -> Array:
        over = jnp.maximum(scores - threshold, 0.0)
        return over ** (1.0 / spread)

    def halve(_, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) / 2
        enough = weights(middle).sum(axis=-1, keepdims=True) >= 1.0
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    count = max(logits.shape[-1], 1)
    bounds = -jnp.ones_like(top), -(jnp.asarray(count, top.dtype) ** -spread)
    halvings = jnp.finfo(logits.dtype).nmant + 4
    low, _ = jax.lax.fori_loop(0, halvings, halve, bounds)
    found = jnp.where(soft, jnp.exp(logits - top), weights(low))
    total = found.sum(axis=-1, keepdims=True)
    return jnp.where(known, found / jnp.where(total == 0.0, 1.0, total), jnp.nan)


@_entmax.defjvp
def _entmax_jvp(primals, tangents):
    """Correia et al. 2019, proposition 1."""
    (logits, alpha), (d_logits, d_alpha) = primals, tangents
    p = _entmax(logits, alpha)
    support = p != 0.0
    safe = jnp.where(support, p, 1.0)
    slope = jnp.where(support, safe ** (2.0 - alpha), 0.0)
    whole = slope.sum(axis=-1, keepdims=True)
    share = slope / jnp.where(whole == 0.0, 1.0, whole)
    along = slope * jnp.where(support, d_logits, 0.0)
    out = along - share * along.sum(axis=-1, keepdims=True)

    surprise = p * jnp.log(safe)
    soft = alpha == 1.0
    spread = jnp.where(soft, 1.0, alpha - 1.0)
    drift = (p - share) / spread**2
    drift = drift - (surprise - share * surprise.sum(axis=-1, keepdims=True)) / spread
    limit = jnp.log(safe) * surprise
    limit = (p * limit.sum(axis=-1, keepdims=True) - limit) / 2
    return p, out + d_alpha * jnp.where(soft, limit, drift)
