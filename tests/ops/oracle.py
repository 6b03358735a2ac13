"""Attention in float64 numpy, one query row at a time, with gradients derived by hand.

Only the keys that a row may attend to are ever looked at, so what stands in the others cannot
matter. Shares no code with the package.
"""

import functools
from dataclasses import dataclass

import numpy as np


@dataclass
class Result:
    """out (B, T, N, E), logsumexp (B, T, N), weights (B, N, T, S) and the three gradients."""

    out: np.ndarray
    logsumexp: np.ndarray
    weights: np.ndarray
    gradients: tuple[np.ndarray, np.ndarray, np.ndarray]


def attention(
    query, key, value, d_out, d_logsumexp, *, rule, curve, scale, factor=None
) -> Result:
    """Attention and the pull-back of (d_out, d_logsumexp).

    Args:
        query, key, value: (B, T, N, H), (B, S, K, H), (B, S, K, E).
        d_out, d_logsumexp: cotangents, (B, T, N, E) and (B, T, N).
        rule: (b, h, q, k) -> bool, who may attend.
        curve: (score, b, h, q, k) -> (new score, slope).
        scale: multiplies the scores; None: H ** -0.5.
        factor: (B, N, T, S), multiplies the weights after the softmax (dropout).
    """
    query, key, value, d_out, d_logsumexp = (
        np.asarray(x, np.float64) for x in (query, key, value, d_out, d_logsumexp)
    )
    (B, T, N, H), (S, K) = query.shape, key.shape[1:3]
    scale = 1.0 / np.sqrt(H) if scale is None else scale
    result = Result(
        out=np.zeros((B, T, N, value.shape[3])),
        logsumexp=np.full((B, T, N), -np.inf),
        weights=np.zeros((B, N, T, S)),
        gradients=(np.zeros_like(query), np.zeros_like(key), np.zeros_like(value)),
    )
    factor = np.ones((B, N, T, S)) if factor is None else factor
    for b, h, q in np.ndindex(B, N, T):
        if keys := [k for k in range(S) if rule(b, h, q, k)]:
            bend = functools.partial(curve, b=b, h=h, q=q)
            at = b, h, q, keys, h * K // N
            _row(
                result, at, (query, key, value, d_out, d_logsumexp), bend, scale, factor
            )
    return result


def _row(result, at, arrays, bend, scale, factor):
    """One query's output, and its share of the gradients."""
    b, h, q, keys, kv = at
    query, d_out, d_logsumexp = (arrays[i][b, q, h] for i in (0, 3, 4))
    key, value = (arrays[i][b, keys, kv] for i in (1, 2))
    bent = [bend(scale * (row @ query), k=k) for row, k in zip(key, keys)]
    scores, slopes = (np.array(column) for column in zip(*bent))
    factor = factor[b, h, q, keys]
    top = scores.max()
    logsumexp = top + np.log(np.sum(np.exp(scores - top)))
    weights = np.exp(scores - logsumexp)
    result.weights[b, h, q, keys] = weights
    result.logsumexp[b, q, h] = logsumexp
    result.out[b, q, h] = (weights * factor) @ value
    d_weights = factor * (value @ d_out)
    d_scores = weights * (d_weights - weights @ d_weights + d_logsumexp) * slopes
    d_query, d_key, d_value = result.gradients
    d_query[b, q, h] += scale * d_scores @ key
    d_key[b, keys, kv] += scale * np.outer(d_scores, query)
    d_value[b, keys, kv] += np.outer(weights * factor, d_out)
