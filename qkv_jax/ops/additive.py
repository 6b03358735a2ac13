"""Attention of recurrent encoder-decoders: Bahdanau's additive and Luong's four.

Each differs from `dot_product_attention` in the score alone (Luong's local form in the weights, too);
masks, empty rows and what is not finite are treated as there. Axes: see reference.py.
"""

import jax
import jax.numpy as jnp

from qkv_jax.ops.attention import check_arguments, dot_product_attention
from qkv_jax.ops.masks import Mask, as_mask, dense
from qkv_jax.ops.reference import attend_with_logits

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

    O(T S H) time; O(T S) memory, and no (T, S, H) array, in reverse neither.

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
    B, T, N, H = query.shape
    if jnp.shape(weight) != (N, H):
        raise ValueError(
            f"weight must be (N, H) = {(N, H)}; got shape {jnp.shape(weight)}."
        )
    wide = jnp.promote_types(query.dtype, jnp.float32)
    clean = jnp.where(jnp.isfinite(key), key, 0.0).astype(wide)
    keys = jnp.repeat(clean, N // key.shape[2], axis=2)
    rows = min(ROWS, max(T, 1))
    blocks = jnp.pad(query.astype(wide), ((0, 0), (0, -T % rows), (0, 0), (0, 0)))
    blocks = blocks.reshape(B, -1, rows, N, H).swapaxes(0, 1)

    @jax.checkpoint
    def score(block: Array) -> Array:
        bent = jnp.tanh(block[:, :, None] + keys[:, None])
        return jnp.einsum("BTSNH,NH->BNTS", bent, weight.astype(wide))

    logits = jnp.moveaxis(jax.lax.map(score, blocks), 0, 2)
    logits = logits.reshape(B, N, -1, key.shape[1])[:, :, :T]
    return attend_with_logits(logits, query, key, value, as_mask(mask))


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
    want = (query.shape[2], query.shape[3], key.shape[3])
    if jnp.shape(matrix) != want:
        raise ValueError(
            f"matrix must be (N, C, H) = {want}; got shape {jnp.shape(matrix)}."
        )
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
    N, C, D = query.shape[2], query.shape[3], key.shape[3]
    want = (N, C + D, jnp.shape(weight)[-1])
    if jnp.shape(matrix) != want:
        raise ValueError(
            f"matrix must be (N, C + D, H) = {want}; got shape {jnp.shape(matrix)}."
        )
    if key.shape[2] != N:
        raise ValueError(
            f"key must have query's {N} heads; got shape {key.shape}: repeat its heads."
        )
    query, key = (
        jnp.einsum("BTNC,NCH->BTNH", x, part).astype(x.dtype)
        for x, part in ((query, matrix[:, :C]), (key, matrix[:, C:]))
    )
    return additive_attention(query, key, value, weight, mask=mask)


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
        (B, T) float32, positions from 0 to the row's length.
    """
    share = jax.nn.sigmoid(jnp.tanh(query @ matrix) @ weight)
    return share.astype(jnp.float32) * lengths.astype(jnp.float32)[:, None]


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
    if jnp.shape(centres) != query.shape[:2]:
        raise ValueError(
            f"centres must be (B, T) = {query.shape[:2]}; got {jnp.shape(centres)}."
        )
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
