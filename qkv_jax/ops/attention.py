"""`dot_product_attention`: checks the arguments and chooses an implementation.

Axes and layouts are those of `jax.nn`: query (B, T, N, H), key (B, S, K, H), value (B, S, K, E).
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args, overload

import jax
import jax.numpy as jnp

from qkv_jax.ops.blockwise import blockwise_attention
from qkv_jax.ops.masks import Mask, as_mask
from qkv_jax.ops.reference import reference_attention, reference_weights
from qkv_jax.ops.scores import Score, supported

Array = jax.Array
Implementation = Literal["reference", "blockwise"]
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
    scale: float | None = None,
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
    scale: float | None = None,
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
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    implementation: Implementation | None = None,
    return_residuals: bool = False,
) -> Array | tuple[Array, Array]:
    """Softmax(query key^T * scale) value, with any mask and any rule on the scores.

    Args:
        query: (B, T, N, H) floating.
        key: (B, S, K, H), dtype of query; K divides N, each key head serves N // K query heads.
        value: (B, S, K, E), dtype of query.
        mask: a `Mask`, or bool that broadcasts to (B, N, T, S) with four axes; True may attend.
            None: all may.
        score: a `Score`, applied to the scaled scores before the mask.
        scale: multiplies the scores first; default H ** -0.5.
        dropout_rate: probability that a weight is dropped after the softmax, in [0, 1).
        dropout_rng: a `jax.random` key; needed when dropout_rate > 0. The pattern depends on
            (rng, b, h, q, k) alone.
        implementation: None chooses, see `explain`; "reference" forces the dense definition,
            "blockwise" O(T + S) memory and skipping of blocks that the mask rules out.
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
    if dropout_rate > 0.0 and dropout_rng is None:
        raise ValueError(
            "dropout_rng must be a jax.random key when dropout_rate > 0; got None."
        )
    if not 0.0 <= dropout_rate < 1.0:
        raise ValueError(f"dropout_rate must be in [0, 1); got {dropout_rate}.")
    chosen = _choose(query, key, scale, implementation)
    run = {"reference": reference_attention, "blockwise": blockwise_attention}
    out, logsumexp = run[chosen.implementation](
        query,
        key,
        value,
        mask=supported(as_mask(mask), score),
        score=score,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        dropout_rate=dropout_rate,
        dropout_rng=dropout_rng,
    )
    return (out, logsumexp) if return_residuals else out


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
    scale: float | None = None,
    implementation: Implementation | None = None,
    **options: Any,
) -> Explanation:
    """Which implementation `dot_product_attention` of the same arguments would run, and why.

    Arrays may be `jax.ShapeDtypeStruct`s: nothing is computed.

    Raises:
        ValueError, TypeError, NotImplementedError: as `dot_product_attention` would.
    """
    check_arguments(query, key, value, options.get("score"))
    return _choose(query, key, scale, implementation)


def _choose(
    query: Array, key: Array, scale: Any, forced: Implementation | None
) -> Explanation:
    if forced not in (None, *get_args(Implementation)):
        raise NotImplementedError(
            f"implementation {forced!r} is not one of: "
            f"{', '.join(map(repr, get_args(Implementation)))}."
        )
    T, S = query.shape[1], key.shape[1]
    traced_scale = isinstance(scale, jax.core.Tracer)
    short = T * S <= DENSE_PAIRS
    pairs = f"{T} x {S} pairs a head, {'at most' if short else 'over'} {DENSE_PAIRS:,}"
    reasons = {
        "reference": f"dense, O(T S) memory; chosen for short sequences: {pairs}",
        "blockwise": f"O(T + S) memory, skips blocks; chosen for long sequences: {pairs}",
    }
    if traced_scale:
        reasons["blockwise"] = (
            "cannot take a traced scale: give a Python number, or scale the query"
        )
    if forced is not None:
        if forced == "blockwise" and traced_scale:
            raise NotImplementedError(f"blockwise {reasons['blockwise']}.")
        reasons = {
            name: "asked for by name" if name == forced else f"{forced!r} was asked for"
            for name in reasons
        }
        return Explanation(implementation=forced, reasons=reasons)
    if not short and traced_scale:
        raise NotImplementedError(
            f"no implementation: blockwise {reasons['blockwise']}; or ask for 'reference', "
            "which is dense."
        )
    chosen: Implementation = "reference" if short else "blockwise"
    return Explanation(implementation=chosen, reasons=reasons)


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
