"""Attention of recurrent encoder-decoders: Bahdanau's additive and Luong's four.

Each differs from `dot_product_attention` in the score alone (Luong's local form in the weights, too);
masks, empty rows and what is not finite are treated as there. Axes: see reference.py.
"""

import jax
import jax.numpy as jnp

from qkv_jax.ops.attention import check_arguments, dot_product_attention
from qkv_jax.ops.masks import Mask, as_mask, dense
from qkv_jax.ops.reference import _normalise, attend_with_logits, nonfinite_keys

Array = jax.Array
# Queries that are scored at a time: tanh of (B, ROWS, S, N, H) stands in memory.
ROWS = 32


def additive_attention(
    query: Array,
    key: Array,
    value: Array,
    weight: Array,
    *,
    mask: Mask | Array | None = None,
) -> Array:
    """Softmax(weight . tanh(query + key)) value: the attention of Bahdanau.

    O(T S H) time; O(T S + ROWS S H) memory, in reverse, too: no (T, S, H) array.

    Args:
        query: (B, T, N, H) floating, projected already (W_a s in the paper).
        key: (B, S, K, H), dtype of query, projected already (U_a h); K divides N.
        value: (B, S, K, E), dtype of query.
        weight: (N, H) floating (v_a).
        mask: as for `dot_product_attention`.

    Returns:
        (B, T, N, E), dtype of query; a row with no allowed key is exactly 0.

    Source: Bahdanau et al. 2015, arXiv 1409.0473, appendix A.1.2.
    """
    check_arguments(query, key, value, None)
    logits = _additive_logits(query, key, weight)
    return attend_with_logits(logits, query, key, value, as_mask(mask))


def additive_weights(
    query: Array, key: Array, weight: Array, *, mask: Mask | Array | None = None
) -> Array:
    """The weights (B, N, T, S), float32 at least, that `additive_attention` averages values with.

    The paper's soft alignment, figure 3. Arguments as there.
    """
    check_arguments(query, key, None, None)
    (B, T, N, _), S, rule = query.shape, key.shape[1], as_mask(mask)
    logits = _additive_logits(query, key, weight)
    logits = jnp.where(nonfinite_keys(key, N), jnp.nan, logits)
    allowed = None if rule is None else rule.materialise((B, N, T, S))
    return _normalise(logits, allowed)[0]


def _additive_logits(query: Array, key: Array, weight: Array) -> Array:
    """weight . tanh(query + key): (B, N, T, S), float32 at least, 0 standing for NaN and inf in key."""
    B, T, N, H = query.shape
    _expect("weight", "(N, H)", weight, (N, H))
    wide = jnp.promote_types(query.dtype, jnp.float32)
    clean = jnp.where(jnp.isfinite(key), key, 0.0).astype(wide)
    keys = jnp.repeat(clean, N // key.shape[2], axis=2)
    rows = min(ROWS, max(T, 1))
    blocks = jnp.pad(query.astype(wide), ((0, 0), (0, -T % rows), (0, 0), (0, 0)))
    blocks = blocks.reshape(B, blocks.shape[1] // rows, rows, N, H).swapaxes(0, 1)

    @jax.checkpoint
    def score(block: Array) -> Array:
        bent = jnp.tanh(block[:, :, None] + keys[:, None])
        return jnp.einsum("BTSNH,NH->BNTS", bent, weight.astype(wide))

    logits = jnp.moveaxis(jax.lax.map(score, blocks), 0, 2)
    return logits.reshape(B, N, len(blocks) * rows, key.shape[1])[:, :, :T]


def luong_dot(
    query: Array, key: Array, value: Array, *, mask: Mask | Array | None = None
) -> Array:
    """Softmax(query key^T) value: `dot_product_attention` without a scale.

    Source: Luong et al. 2015, arXiv 1508.04025, section 3.1, "dot".
    """
    return dot_product_attention(query, key, value, mask=mask, scale=1.0)


def luong_general(
    query: Array,
    key: Array,
    value: Array,
    matrix: Array,
    *,
    mask: Mask | Array | None = None,
) -> Array:
    """Softmax(query matrix key^T) value.

    Args:
        query: (B, T, N, C) floating; its size need not be the key's.
        key, value, mask: as for `dot_product_attention`.
        matrix: (N, C, H) floating (W_a).

    Source: Luong et al. 2015, arXiv 1508.04025, section 3.1, "general".
    """
    _expect_four_axes(query, key)
    _expect("matrix", "(N, C, H)", matrix, (*query.shape[2:], key.shape[3]))
    turned = jnp.einsum("BTNC,NCH->BTNH", query, matrix).astype(query.dtype)
    return luong_dot(turned, key, value, mask=mask)


def luong_concat(
    query: Array,
    key: Array,
    value: Array,
    matrix: Array,
    weight: Array,
    *,
    mask: Mask | Array | None = None,
) -> Array:
    """Softmax(weight . tanh(matrix [query; key])) value.

    Nothing is concatenated: the matrix is applied to each half, and the halves are added.

    Args:
        query: (B, T, N, C) floating.
        key: (B, S, N, D), dtype of query, as many heads as query.
        value: (B, S, N, E), dtype of query.
        matrix: (N, C + D, H) floating (W_a).
        weight: (N, H) floating (v_a).
        mask: as for `dot_product_attention`.

    Source: Luong et al. 2015, arXiv 1508.04025, section 3.1, "concat".
    """
    _expect_four_axes(query, key)
    (N, C), D = query.shape[2:], key.shape[3]
    H = jnp.shape(matrix)[-1] if jnp.ndim(matrix) else 0
    _expect("matrix", "(N, C + D, H)", matrix, (N, C + D, H))
    if key.shape[2] != N:
        raise ValueError(
            f"key must have query's {N} heads; got shape {key.shape}: repeat its heads."
        )
    # A masked key's gradient of 0, times its NaN, would be NaN in the matrix: NaN is put back after.
    finite = jnp.isfinite(key)
    clean = jnp.where(finite, key, jnp.zeros((), key.dtype))
    queries = jnp.einsum("BTNC,NCH->BTNH", query, matrix[:, :C]).astype(query.dtype)
    keys = jnp.einsum("BSND,NDH->BSNH", clean, matrix[:, C:]).astype(key.dtype)
    keys = jnp.where(finite.all(axis=-1, keepdims=True), keys, jnp.nan)
    return additive_attention(queries, keys, value, weight, mask=mask)


def monotonic_centres(batch: int, length: int) -> Array:
    """Where "local-m" looks: query t at key t; (B, T) float32."""
    return jnp.broadcast_to(jnp.arange(length, dtype=jnp.float32), (batch, length))


def predictive_centres(
    query: Array, matrix: Array, weight: Array, lengths: Array
) -> Array:
    """Where "local-p" looks: S sigmoid(weight . tanh(matrix query)), eq. 9.

    Args:
        query: (B, T, C) floating, the decoder's states.
        matrix: (C, H) (W_p).
        weight: (H,) (v_p).
        lengths: (B,) int, keys of each row (S in the paper).

    Returns:
        (B, T), float32 at least (in bfloat16, keys past 256 have no position of their own);
        positions from 0 to the row's length.
    """
    wide = jnp.promote_types(query.dtype, jnp.float32)
    query, matrix, weight = (jnp.asarray(x, wide) for x in (query, matrix, weight))
    share = jax.nn.sigmoid(jnp.tanh(query @ matrix) @ weight)
    return share * jnp.asarray(lengths, wide)[:, None]


def local_attention(
    query: Array,
    key: Array,
    value: Array,
    centres: Array,
    *,
    half_width: int,
    gaussian: bool = True,
    mask: Mask | Array | None = None,
) -> Array:
    """Luong's local attention: keys within half_width of each query's centre.

    O(T S) time and memory: the window is a mask.

    Args:
        query, key, value, mask: as for `dot_product_attention`; scores are not scaled.
        centres: (B, T) real positions, see `monotonic_centres` and `predictive_centres`.
        half_width: D in the paper, at least 1.
        gaussian: True ("local-p"): weights are multiplied, after the softmax, by
            exp(-2 (k - centre)^2 / half_width^2), eq. 10; centres get gradients by it. False
            ("local-m"): they are not.

    Returns:
        (B, T, N, E), dtype of query; a row with no allowed key is exactly 0.

    Source: Luong et al. 2015, arXiv 1508.04025, section 3.2.
    """
    check_arguments(query, key, value, None)
    if half_width < 1:
        raise ValueError(f"half_width must be at least 1; got {half_width}.")
    _expect("centres", "(B, T)", centres, query.shape[:2])
    wide = jnp.promote_types(query.dtype, jnp.float32)
    B, T, N, H = query.shape
    S, K = key.shape[1:3]
    clean = jnp.where(jnp.isfinite(key), key, jnp.zeros((), key.dtype))
    logits = jnp.einsum(
        "BTKGH,BSKH->BKGTS",
        query.reshape(B, T, K, N // K, H),
        clean,
        preferred_element_type=wide,
    ).reshape(B, N, T, S)
    away = jnp.arange(S, dtype=wide)[None, None, None] - centres[:, None, :, None]
    near, others = dense(jnp.abs(away) <= half_width), as_mask(mask)
    every = near if others is None else others & near
    factor = jnp.exp(-2.0 * (away / half_width) ** 2) if gaussian else None
    return attend_with_logits(logits, query, key, value, every, factor)


def _expect(name: str, axes: str, array: Array, want: tuple[int, ...]) -> None:
    if jnp.shape(array) != want:
        raise ValueError(
            f"{name} must be {axes} = {want}; got shape {jnp.shape(array)}."
        )


def _expect_four_axes(query: Array, key: Array) -> None:
    for name, array in (("query", query), ("key", key)):
        if array.ndim != 4:
            raise ValueError(
                f"{name} must be (batch, length, heads, size); got shape {array.shape}."
            )
