"""What attention leaves besides its output: sinks, column sums, the largest logit, and merging.

All in O(T + S) memory: they follow from the log-sum-exp, or from a pass over blocks.
"""

import jax
import jax.numpy as jnp

from qkv_jax.ops.attention import dot_product_attention, static_scale
from qkv_jax.ops.blockwise import largest_scores
from qkv_jax.ops.masks import Mask, as_mask
from qkv_jax.ops.scores import Score, supported

Array = jax.Array


def with_sinks(out: Array, logsumexp: Array, sinks: Array) -> tuple[Array, Array]:
    """Attention as if each row also saw a key of logit `sinks[h]` and value 0.

    Takes what `dot_product_attention(..., return_residuals=True)` gave, from any implementation.

    Args:
        out: (B, T, N, E) floating.
        logsumexp: (B, T, N) float32.
        sinks: (N,) floating, differentiable.

    Returns:
        out (B, T, N, E) and logsumexp (B, T, N), with the sink in the softmax's denominator. A
        row that saw no key stays exactly 0.

    Source: gpt-oss model card, OpenAI 2025, arXiv 2508.10925; the effect: Xiao et al. 2023, arXiv
    2309.17453. Sinks of theirs that are real keys are a mask: `masks.prefix(n) | masks.window(..)`.
    """
    if jnp.shape(sinks) != out.shape[2:3]:
        raise ValueError(
            f"sinks must be (N,) = {out.shape[2:3]}; got shape {jnp.shape(sinks)}."
        )
    if logsumexp.shape != out.shape[:3]:
        raise ValueError(
            f"logsumexp must be (B, T, N) = {out.shape[:3]}; got {logsumexp.shape}."
        )
    level = jnp.asarray(sinks, logsumexp.dtype)[None, None]
    share = jax.nn.sigmoid(logsumexp - level)
    out = (out * share[..., None]).astype(out.dtype)
    return out, jnp.logaddexp(logsumexp, level)


def merge(one: tuple[Array, Array], other: tuple[Array, Array]) -> tuple[Array, Array]:
    """Attention over two disjoint sets of keys, from attention over each.

    Args:
        one, other: (out (B, T, N, E), logsumexp (B, T, N)) of the same queries.

    Returns:
        out and logsumexp over all of the keys.
    """
    (out, lse), (other_out, other_lse) = one, other
    total = jnp.logaddexp(lse, other_lse)
    floor = jnp.where(total == -jnp.inf, 0.0, total)
    share, other_share = (jnp.exp(x - floor)[..., None] for x in (lse, other_lse))
    return (out * share + other_out * other_share).astype(out.dtype), total


def column_sums(
    query: Array,
    key: Array,
    *,
    mask: Mask | Array | None = None,
    score: Score | None = None,
    scale: float | None = None,
) -> Array:
    """How much attention each key gets: its weights, summed over queries. For cache eviction.

    Args: as for `dot_product_attention`.

    Returns:
        (B, S, K) float32, summed over the T queries and the N // K heads that share the key; no
        gradient.

    Source: the score of H2O, Zhang et al. 2023, arXiv 2306.14048.
    """
    query, key, score = jax.lax.stop_gradient((query, key, score))
    wide = jnp.promote_types(query.dtype, jnp.float32)
    query, key = query.astype(wide), key.astype(wide)

    def total(value: Array) -> Array:
        return dot_product_attention(
            query, key, value, mask=mask, score=score, scale=scale
        ).sum()

    # Each weight is the slope of the sum by its key's value.
    return jax.grad(total)(jnp.zeros((*key.shape[:3], 1), wide))[..., 0]


def largest_logit(
    query: Array,
    key: Array,
    *,
    mask: Mask | Array | None = None,
    score: Score | None = None,
    scale: float | None = None,
) -> Array:
    """The largest logit of each row, over the keys it may attend to: what QK-clip watches.

    Args: as for `dot_product_attention`.

    Returns:
        (B, T, N) float32; -inf for a row that may attend to nothing; no gradient.

    Source: Kimi Team 2025, arXiv 2507.20534, section 2.1 (QK-Clip).
    """
    query, key, score = jax.lax.stop_gradient((query, key, score))
    score, scale = static_scale(query, score, scale)
    return largest_scores(
        query,
        key,
        mask=supported(as_mask(mask), score),
        score=score,
        scale=scale,
    )
