"""`dot_product_attention`: checks the arguments and chooses an implementation.

Axes and layouts are those of `jax.nn`: query (B, T, N, H), key (B, S, K, H), value (B, S, K, E).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args, overload

import jax
import jax.numpy as jnp

from qkv_jax.ops.blockwise import blockwise_attention
from qkv_jax.ops.kernels import (
    cudnn_attention,
    tokamax_attention,
    why_not_cudnn,
    why_not_tokamax,
)
from qkv_jax.ops.masks import Mask, as_mask
from qkv_jax.ops.reference import reference_attention, reference_weights
from qkv_jax.ops.scores import Score, chain, modifier, supported

Array = jax.Array
Implementation = Literal["reference", "blockwise", "cudnn", "tokamax"]
# Up to this many pairs a head, the dense form stands in one block's memory, and is faster.
DENSE_PAIRS = 256 * 256


@overload
def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: Mask | Array | None = None,
    score: Score | None = None,
    scale: float | Array | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    implementation: Implementation | None = None,
    return_residuals: Literal[False] = False,
) -> Array: ...


@overload
def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: Mask | Array | None = None,
    score: Score | None = None,
    scale: float | Array | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    implementation: Implementation | None = None,
    return_residuals: Literal[True],
) -> tuple[Array, Array]: ...


def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: Mask | Array | None = None,
    score: Score | None = None,
    scale: float | Array | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    implementation: Implementation | None = None,
    return_residuals: bool = False,
) -> Array | tuple[Array, Array]:
    """Softmax(query key^T * scale) value, with any mask and any rule on the scores.

    "reference" is differentiable to any order, "blockwise" in forward mode to any, too, and at most
    twice in reverse; the others as their kernels are.

    Args:
        query: (B, T, N, H) floating.
        key: (B, S, K, H), dtype of query; K divides N, each key head serves N // K query heads.
        value: (B, S, K, E), dtype of query.
        mask: a `Mask`, or bool that broadcasts to (B, N, T, S) with four axes; True may attend.
            None: all may.
        score: a `Score`, applied to the scaled scores before the mask.
        scale: multiplies the scores first, a number or () floating; default H ** -0.5.
        dropout_rate: probability that a weight is dropped after the softmax, in [0, 1).
        dropout_rng: a `jax.random` key; needed when dropout_rate > 0. The pattern depends on
            (rng, b, h, q, k) alone.
        implementation: None chooses, see `explain`; "reference" forces the dense definition,
            "blockwise" O(T + S) memory and skipping of blocks that the mask rules out, "cudnn" and
            "tokamax" other people's kernels.
        return_residuals: True: the log-sum-exp of the masked scores comes back too.

    Returns:
        (B, T, N, E), dtype of query; a row with no allowed key is exactly 0. With
        return_residuals, also logsumexp (B, T, N), float32, -inf for such a row.

    Raises:
        ValueError, TypeError: an argument's shape or dtype does not fit; the message says which.
        NotImplementedError: the implementation cannot do what was asked.

    Source: Vaswani et al. 2017, arXiv 1706.03762, eq. 1; grouped heads: Ainslie et al. 2023,
    arXiv 2305.13245.
    """
    check_arguments(query, key, value, score)
    check_dropout(dropout_rate, dropout_rng)
    score, scale = static_scale(query, score, scale)
    mask = supported(as_mask(mask), score)
    options = {"mask": mask, "score": score, "dropout_rate": dropout_rate}
    chosen = _choose(
        query, key, value, implementation, options, return_residuals=return_residuals
    )
    out, logsumexp = _RUN[chosen.implementation](
        query, key, value, scale=scale, dropout_rng=dropout_rng, **options
    )
    return (out, logsumexp) if return_residuals else out


_RUN: dict[str, Callable[..., tuple[Array, Any]]] = {
    "reference": reference_attention,
    "blockwise": blockwise_attention,
    "cudnn": cudnn_attention,
    "tokamax": tokamax_attention,
}


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Which implementation would run; prints as a few lines.

    Attributes:
        implementation: its name.
        reasons: why it, and why not each other, by name.
    """

    implementation: Implementation
    reasons: dict[str, str]

    def __str__(self) -> str:
        return "\n".join(
            f"{'->' if name == self.implementation else '  '} {name}: {reason}"
            for name, reason in self.reasons.items()
        )


def explain(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: Mask | Array | None = None,
    score: Score | None = None,
    scale: float | Array | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    implementation: Implementation | None = None,
    return_residuals: bool = False,
) -> Explanation:
    """Which implementation `dot_product_attention` of the same arguments would run, and why.

    Query, key and value may be `jax.ShapeDtypeStruct`s: nothing is computed.

    Raises:
        ValueError, TypeError, NotImplementedError: as `dot_product_attention` would.
    """
    check_arguments(query, key, value, score)
    score, _ = static_scale(query, score, scale)
    options = {
        "mask": supported(as_mask(mask), score),
        "score": score,
        "dropout_rate": dropout_rate,
    }
    return _choose(
        query, key, value, implementation, options, return_residuals=return_residuals
    )


def static_scale(
    query: Array, score: Score | None, scale: Any
) -> tuple[Score | None, float]:
    """The rule and the scale as a number; one that is an array becomes the first of the rules."""
    if scale is None:
        return score, query.shape[-1] ** -0.5
    if jnp.ndim(scale):
        raise ValueError(
            f"scale must be a number, or (); got shape {jnp.shape(scale)}."
        )
    if not isinstance(scale, jax.Array):
        return score, float(scale)
    first = modifier(_scaled, scale)
    return (first if score is None else chain(first, score)), 1.0


def _scaled(score, b, h, q, k, scale):
    return score * scale.astype(score.dtype)


def _choose(
    query: Array,
    key: Array,
    value: Array,
    forced: Implementation | None,
    options: dict[str, Any],
    *,
    return_residuals: bool,
) -> Explanation:
    if forced not in (None, *get_args(Implementation)):
        raise NotImplementedError(
            f"implementation {forced!r} is not one of: "
            f"{', '.join(map(repr, get_args(Implementation)))}."
        )
    T, S = query.shape[1], key.shape[1]
    short = T * S <= DENSE_PAIRS
    pairs = f"{T} x {S} pairs a head, {'at most' if short else 'over'} {DENSE_PAIRS:,}"
    reasons: dict[str, str] = {
        "reference": f"dense, O(T S) memory; chosen for short sequences: {pairs}",
        "blockwise": f"O(T + S) memory, skips blocks; chosen for long sequences: {pairs}",
    }
    chosen: Implementation = "reference" if short else "blockwise"
    accelerated = jax.default_backend() in ("gpu", "tpu")
    kernels: dict[Implementation, Callable[..., str | None]] = {
        "tokamax": why_not_tokamax,
        "cudnn": why_not_cudnn,
    }
    for name, why_not in kernels.items():
        reason = why_not(
            query, key, value, return_residuals=return_residuals, **options
        )
        if reason is not None:
            reasons[name] = reason
            if name == forced:
                raise NotImplementedError(f"{name} {reason}.")
        elif accelerated and (name == "cudnn" or not short):
            chosen = name
            reasons[name] = "can; chosen where there is an accelerator"
        else:
            reasons[name] = f"can, but is slower here: {jax.default_backend()}, {pairs}"
    if forced is not None:
        chosen = forced
        reasons[forced] = "asked for by name"
    names = get_args(Implementation)
    return Explanation(
        implementation=chosen, reasons={name: reasons[name] for name in names}
    )


def attention_weights(
    query: Array,
    key: Array,
    *,
    mask: Mask | Array | None = None,
    score: Score | None = None,
    scale: float | None = None,
) -> Array:
    """The weights (B, N, T, S), float32, that `dot_product_attention` would average values with.

    For looking at a model, not for computing with it: always O(T S) memory. Arguments as there.
    """
    check_arguments(query, key, None, score)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return reference_weights(
        query, key, mask=supported(as_mask(mask), score), score=score, scale=scale
    )


def check_dropout(rate: float, rng: Array | None) -> None:
    """Raises what `dot_product_attention` raises for a dropout that does not go."""
    if rate > 0.0 and rng is None:
        raise ValueError(
            "dropout_rng must be a jax.random key when dropout_rate > 0; got None."
        )
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"dropout_rate must be in [0, 1); got {rate}.")


def check_arguments(
    query: Array, key: Array, value: Array | None, score: Score | None
) -> None:
    """Raises what `dot_product_attention` raises for shapes and dtypes that do not fit."""
    arrays = {"query": query, "key": key} | ({} if value is None else {"value": value})
    for name, array in arrays.items():
        if array.ndim != 4:
            raise ValueError(
                f"{name} must be (batch, length, heads, size); got shape {array.shape}."
            )
        if not jnp.issubdtype(array.dtype, jnp.floating) or array.dtype != query.dtype:
            raise TypeError(
                f"{name} must be floating, of query's dtype {query.dtype}; got {array.dtype}."
            )
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ValueError(
            f"query and key must agree in batch and size; got {query.shape} and {key.shape}."
        )
    if key.shape[2] == 0 or query.shape[2] % key.shape[2]:
        raise ValueError(
            f"key heads K must divide query heads N; got K = {key.shape[2]}, N = {query.shape[2]}."
        )
    if value is not None and value.shape[:3] != key.shape[:3]:
        raise ValueError(
            "key and value must agree in batch, length and heads; got "
            f"{key.shape} and {value.shape}."
        )
    if score is not None and not isinstance(score, Score):
        raise TypeError(
            f"score must be a Score, such as scores.modifier(fn); got {type(score).__name__}."
        )
