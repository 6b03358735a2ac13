"""Adaptively sparse attention: alpha-entmax in place of the softmax, with a learned alpha a head.

alpha-entmax gives exact zeros for alpha > 1: the softmax is alpha = 1, sparsemax alpha = 2. Axes:
see reference.py. Sources: Martins and Astudillo 2016, arXiv 1602.02068 (sparsemax); Peters et al.
2019, arXiv 1905.05702 (entmax); Correia et al. 2019, arXiv 1909.00015 (learned alpha).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qkv_jax.ops.attention import check_arguments
from qkv_jax.ops.masks import Mask, as_mask
from qkv_jax.ops.reference import masked_logits, weighted_sum
from qkv_jax.ops.scores import Score, supported

Array = jax.Array

# Of the search for a threshold, each an evaluation of all weights: 3 to 7 are usual up to alpha = 2, 12 the most seen.
MOST_STEPS = 400


class _Search(NamedTuple):
    """For the threshold at which the weights of a row sum to 1; all but `steps` are (..., 1)."""

    steps: Array | int
    found: Array
    low: Array
    high: Array
    at: Array


def entmax(
    logits: Array, alpha: float | Array = 1.5, *, where: Array | None = None
) -> Array:
    """alpha-entmax over the last axis: a distribution with exact zeros.

    By Newton's method on the threshold, within bounds that are halved at every eighth step and, past
    alpha = 2, where it leaves them. Forward and reverse mode to any order, for alpha, too; as exact
    beside alpha = 1 as elsewhere.

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
    _check_alpha(alpha)
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
    alpha: float | Array,
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

    Raises:
        ValueError: a Python number alpha under 1; alpha's shape does not fit.
    """
    _check_alpha(alpha)
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


def _check_alpha(alpha: float | Array) -> None:
    if isinstance(alpha, (int, float)) and not alpha >= 1:
        raise ValueError(f"alpha must be at least 1; got {alpha}.")


@jax.custom_jvp
def _entmax(logits: Array, alpha: Array) -> Array:
    """logits (..., S) and alpha (..., 1)."""
    top = logits.max(axis=-1, keepdims=True, initial=-jnp.inf)
    known = jnp.isfinite(top) | (top == -jnp.inf)
    scores = logits - jnp.where(jnp.isfinite(top), top, 0.0)
    # A whole row of alphas: explicit axes of a mesh do not broadcast in `where`.
    soft, spread = _spread(alpha + jnp.zeros_like(top))

    def weights(threshold: Array) -> tuple[Array, Array]:
        """z ** (1 / (alpha - 1)), which tends to exp, and z = 1 + (alpha - 1) (score - threshold)."""
        over = scores - threshold
        bent = jnp.maximum(spread * over, -1.0)
        p = jnp.exp(jnp.where(soft, over, jnp.log1p(bent) / spread))
        return p, jnp.where(soft, 1.0, 1.0 + bent)

    def nearer(search: _Search) -> _Search:
        """One evaluation; what is found stays as it is."""
        steps, found, low, high, at = search
        p, z = weights(at)
        total = p.sum(axis=-1, keepdims=True)
        enough = total >= 1.0
        low, high = jnp.where(enough, at, low), jnp.where(enough, high, at)
        step = _step(total, p, z, soft, spread)
        newton = jnp.where(convex, jnp.clip(at + step, low, high), at + step)
        inside = convex | ((low < newton) & (newton < high))
        near = ~(jnp.abs(total - 1.0) > exact) | (high - low <= eps * high)
        near |= convex & (jnp.abs(step) <= eps * high)
        follow = jnp.where(inside & (steps % 8 != 7), newton, (low + high) / 2)
        to = jnp.where(near, jnp.where(inside, newton, at), follow)
        return _Search(steps + 1, found | near, low, high, jnp.where(found, at, to))

    # At 0 the largest score has weight 1; at `most` even S of them sum to 1 at the most.
    size = max(logits.shape[-1], 1)
    log_size = jnp.log(jnp.asarray(size, logits.dtype))
    most = jnp.where(soft, log_size, -jnp.expm1(-spread * log_size) / spread)
    # Its slope is never under 1, so that the threshold is as exact as the sum, or more.
    eps, convex = jnp.finfo(logits.dtype).eps, spread <= 1.0
    exact = eps * (8 + size**0.5)
    nothing = ~jnp.isfinite(top)
    none = jnp.zeros_like(top)
    search = _Search(0, nothing, none, none + most, none)
    search = jax.lax.while_loop(
        lambda search: ~search.found.all() & (search.steps < MOST_STEPS), nearer, search
    )
    found, _ = weights(search.at)
    total = found.sum(axis=-1, keepdims=True)
    return jnp.where(known, found / jnp.where(total == 0.0, 1.0, total), jnp.nan)


def _step(total: Array, weights: Array, z: Array, soft: Array, spread: Array) -> Array:
    """Newton's, to where the norm of order 1 / (alpha - 1) of all z is 1.

    The norm is convex in the threshold up to alpha = 2, so that a step never goes past what is
    sought from below it, and where all scores that count are equal, or alpha is 1, one step finds it.
    """
    slope = jnp.where(z > 0.0, weights / jnp.where(z > 0.0, z, 1.0), 0.0)
    log = jnp.log(total)
    gap = jnp.where(soft, log, jnp.expm1(spread * log) / spread)
    share = jnp.where(soft, total, jnp.exp((1.0 - spread) * log))
    return gap * share / slope.sum(axis=-1, keepdims=True)


@_entmax.defjvp
def _entmax_jvp(primals, tangents):
    """Correia et al. 2019, proposition 1.

    The derivative for alpha is theirs with its terms in 1 / (alpha - 1) cancelled by hand, which
    loses no digits as alpha tends to 1, and needs no other formula there.
    """
    (logits, alpha), (d_logits, d_alpha) = primals, tangents
    p = _entmax(logits, alpha)
    support = p != 0.0
    log = jnp.log(jnp.where(support, p, 1.0))
    slope = jnp.where(support, jnp.exp((2.0 - alpha) * log), 0.0)
    whole = slope.sum(axis=-1, keepdims=True)
    share = slope / jnp.where(whole == 0.0, 1.0, whole)
    along = slope * jnp.where(support, d_logits, 0.0)
    along = along - d_alpha * _bend(jnp.where(support, p, 0.0), log, slope, alpha)
    return p, along - share * along.sum(axis=-1, keepdims=True)


def _bend(p: Array, log: Array, slope: Array, alpha: Array) -> Array:
    """p (e^x - 1 - x) / (alpha - 1)^2 with x = -(alpha - 1) log p, and slope = p e^x."""
    _, spread = _spread(alpha)
    x = (1.0 - alpha) * log
    small = jnp.minimum(x, 1.0)
    series = jnp.ones_like(x)
    for n in range(18, 2, -1):
        series = 1.0 + series * small / n
    return jnp.where(x < 1.0, p * log**2 * series / 2, (slope - p - p * x) / spread**2)


def _spread(alpha: Array) -> tuple[Array, Array]:
    """Whether alpha is 1, and alpha - 1, for which 1 stands there."""
    soft = alpha == 1.0
    return soft, jnp.where(soft, 1.0, alpha - 1.0)
