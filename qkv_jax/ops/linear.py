"""Attention linear in length: a kernel of features in place of the softmax.

out_t = phi(q_t) sum_s phi(k_s) v_s^T / phi(q_t) sum_s phi(k_s). The causal form goes through the
sequence in chunks, so that time and memory are O(T) in both directions, and its state is all that
decoding needs. Sums are float32 at least. NaN or inf in a key or value makes those rows NaN that
are allowed to see it, and no others. Axes: see reference.py, and F features.

Sources: Katharopoulos et al. 2020, arXiv 2006.16236; Choromanski et al. 2021, arXiv 2009.14794.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from qkv_jax.ops.attention import check_arguments

Array = jax.Array
CHUNK = 64


def elu_plus_one(x: Array) -> Array:
    """The feature map of Katharopoulos et al.: elu(x) + 1, positive."""
    # jax.nn.elu(x) + 1 cancels: it is 0 below -17 in float32, and so may be all of a row's weights.
    return jnp.where(x > 0.0, x + 1.0, jnp.exp(jnp.where(x > 0.0, 0.0, x)))


def linear_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    feature_map: Callable[[Array], Array] = elu_plus_one,
    key_mask: Array | None = None,
    mask: Array | None = None,
) -> Array:
    """Attention with the kernel phi(q) . phi(k); every query sees every key.

    O((T + S) F E) time; with a mask of pairs, O(T S).

    Args:
        query: (B, T, N, H) floating.
        key: (B, S, K, H), dtype of query; K divides N.
        value: (B, S, K, E), dtype of query.
        feature_map: (..., H) -> (..., F), not negative.
        key_mask: (B, S) bool; False: the key is not there. None: all are.
        mask: bool that broadcasts to (B, N, T, S): for few queries, such as those of a step of
            decoding over many hypotheses. None: all pairs.

    Returns:
        (B, T, N, E), dtype of query; a row with no key is exactly 0.

    Source: Katharopoulos et al. 2020, eq. 5.
    """
    queries, keys, values, bad = _features(query, key, value, feature_map, key_mask)
    if mask is not None:
        _, T, K, G, _ = queries.shape
        allowed = jnp.broadcast_to(mask, (len(query), K * G, T, key.shape[1]))
        pairs = jnp.einsum("BTKGF,BSKF->BKGTS", queries, keys)
        pairs = jnp.where(allowed.reshape(pairs.shape), pairs, 0.0)
        top = jnp.einsum("BKGTS,BSKE->BTKGE", pairs, values)
        bottom = jnp.moveaxis(pairs.sum(-1), 3, 1)
        return _ratio(top, bottom, bad.any(axis=1, keepdims=True), query)
    memory = jnp.einsum("BSKF,BSKE->BKFE", keys, values)
    top = jnp.einsum("BTKGF,BKFE->BTKGE", queries, memory)
    bottom = jnp.einsum("BTKGF,BKF->BTKG", queries, keys.sum(axis=1))
    return _ratio(top, bottom, bad.any(axis=1, keepdims=True), query)


def causal_linear_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    feature_map: Callable[[Array], Array] = elu_plus_one,
    key_mask: Array | None = None,
) -> Array:
    """The same, but query t sees the keys 0 .. t: T = S.

    O(T F E) time and O(T (F + E) + T / CHUNK F E) memory, in reverse, too.

    Source: Katharopoulos et al. 2020, section 3.3. Difference: in chunks.
    """
    if query.shape[1] != key.shape[1]:
        raise ValueError(
            "query and key must be of one length in the causal form; got "
            f"{query.shape} and {key.shape}."
        )
    T = query.shape[1]
    *parts, bad = _features(query, key, value, feature_map, key_mask)
    size = min(CHUNK, max(T, 1))

    def cut(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, -T % size), *((0, 0),) * (x.ndim - 2)))
        x = x.reshape(x.shape[0], x.shape[1] // size, size, *x.shape[2:])
        return x.swapaxes(0, 1)

    earlier = jnp.tril(jnp.ones((size, size), bool))[None, None, None]

    @jax.checkpoint
    def step(state, chunk):
        memory, norm = state
        q, k, v = chunk
        pairs = jnp.einsum("BTKGF,BSKF->BKGTS", q, k)
        pairs = jnp.where(earlier, pairs, 0.0)
        top = jnp.einsum("BKGTS,BSKE->BTKGE", pairs, v)
        top = top + jnp.einsum("BTKGF,BKFE->BTKGE", q, memory)
        bottom = jnp.moveaxis(pairs.sum(-1), 3, 1)
        bottom = bottom + jnp.einsum("BTKGF,BKF->BTKG", q, norm)
        memory = memory + jnp.einsum("BSKF,BSKE->BKFE", k, v)
        return (memory, norm + k.sum(axis=1)), (top, bottom)

    B, _, K, F = parts[1].shape
    state = _zeros(B, K, F, value.shape[3], parts[1].dtype)
    _, (top, bottom) = jax.lax.scan(step, state, tuple(map(cut, parts)))
    top, bottom = (
        x.swapaxes(0, 1).reshape(B, len(x) * size, *x.shape[3:])[:, :T]
        for x in (top, bottom)
    )
    return _ratio(top, bottom, jnp.cumsum(bad, axis=1) > 0, query)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LinearState:
    """What decoding needs of the past: memory (B, K, F, E) and norm (B, K, F), float32 at least."""

    memory: Array
    norm: Array

    @classmethod
    def zeros(
        cls, batch: int, heads: int, features: int, size: int, dtype=jnp.float32
    ) -> "LinearState":
        """Of no past: for `heads` = K, `features` = F and `size` = E; dtype float64 for float64."""
        memory, norm = _zeros(batch, heads, features, size, dtype)
        return cls(memory=memory, norm=norm)


def linear_attention_step(
    query: Array,
    key: Array,
    value: Array,
    state: LinearState,
    *,
    feature_map: Callable[[Array], Array] = elu_plus_one,
) -> tuple[Array, LinearState]:
    """One position of `causal_linear_attention`: query (B, 1, N, H), key and value likewise.

    Returns:
        (B, 1, N, E), dtype of query; the next state. Time and memory do not grow with the past.
    """
    if query.shape[1] != 1 or key.shape[1] != 1:
        raise ValueError(
            f"query and key must be of length 1; got {query.shape} and {key.shape}."
        )
    q, k, v, bad = _features(query, key, value, feature_map, None)
    memory = state.memory + jnp.einsum("BSKF,BSKE->BKFE", k, v)
    norm = jnp.where(bad[:, 0, :, None], jnp.nan, state.norm + k.sum(axis=1))
    top = jnp.einsum("BTKGF,BKFE->BTKGE", q, memory)
    bottom = jnp.einsum("BTKGF,BKF->BTKG", q, norm)
    return _ratio(top, bottom, bad, query), LinearState(memory=memory, norm=norm)


def favor_projection(rng: Array, features: int, size: int) -> Array:
    """Orthogonal random directions for `performer_attention`, (features, size) float32.

    Each block of `size` rows is orthogonal; lengths are those of Gaussian vectors.

    Source: Choromanski et al. 2021, section 2.4 (ORF).
    """
    if features < 1 or size < 1:
        raise ValueError(
            f"features and size must be at least 1; got {features} and {size}."
        )
    rows, lengths = jax.random.split(rng)
    count = -(-features // size)
    blocks, upper = jnp.linalg.qr(jax.random.normal(rows, (count, size, size)))
    # Without these signs, the directions are not uniform, and the estimate is biased.
    signs = jnp.sign(jnp.diagonal(upper, axis1=1, axis2=2))[:, None]
    directions = (blocks * signs).swapaxes(1, 2).reshape(-1, size)[:features]
    norms = jnp.linalg.norm(jax.random.normal(lengths, (features, size)), axis=-1)
    return directions * norms[:, None]


def favor_features(x: Array, projection: Array, *, shift: Array) -> Array:
    """Positive random features of the softmax kernel: exp(w . x - |x|^2 / 2 - shift).

    Args:
        x: (..., H), already multiplied by H ** -0.25.
        projection: (F, H), see `favor_projection`.
        shift: broadcasts to (..., 1): what keeps the exponents small. It cancels in attention if it
            is the same for all keys of a head; a query may have its own.

    Source: Choromanski et al. 2021, lemma 1 (SM+). Difference: no factor F ** -0.5, which cancels.
    """
    return jnp.exp(_exponents(x, projection) - shift)


def performer_attention(
    query: Array,
    key: Array,
    value: Array,
    projection: Array,
    *,
    causal: bool = False,
    key_mask: Array | None = None,
    mask: Array | None = None,
) -> Array:
    """FAVOR+: an estimate, linear in length, of softmax attention with scale H ** -0.5.

    Args:
        query, key, value, key_mask, mask: as for `linear_attention`; causal needs no mask.
        projection: (F, H), see `favor_projection`; the error falls as F ** -0.5.
        causal: query t sees keys 0 .. t.

    Returns:
        (B, T, N, E), dtype of query; a row with no key is exactly 0.

    All keys are scaled by the largest exponent of their head, those to come included: a constant,
    which cancels. Keys whose exponents are all about 87 below it are lost in float32.

    Source: Choromanski et al. 2021, arXiv 2009.14794. Difference: no epsilon is added to the
    features, as the authors' code does, for which such a constant does not cancel.
    """
    check_arguments(query, key, value, None)
    if jnp.ndim(projection) != 2 or jnp.shape(projection)[1] != query.shape[3]:
        raise ValueError(
            f"projection must be (F, {query.shape[3]}); got shape {jnp.shape(projection)}."
        )
    wide = jnp.promote_types(query.dtype, jnp.float32)
    projection = jnp.asarray(projection, wide)
    there = _there(key, key_mask)
    finite = jnp.isfinite(key).all(axis=-1, keepdims=True)
    keys = jnp.where(there & finite, key, jnp.zeros((), key.dtype))
    q, k = (x.astype(wide) * query.shape[3] ** -0.25 for x in (query, keys))
    tops = [jax.lax.stop_gradient(_exponents(x, projection)) for x in (q, k)]
    # A key that is not there must not set the scale: those that are might all be lost.
    heads = tops[1].max((1, 3), keepdims=True, where=there & finite, initial=-jnp.inf)
    q = favor_features(q, projection, shift=tops[0].max(axis=-1, keepdims=True))
    k = favor_features(k, projection, shift=jnp.where(heads == -jnp.inf, 0.0, heads))
    k = jnp.where(finite, k, jnp.nan)
    options: dict[str, Any] = {"feature_map": lambda x: x, "key_mask": key_mask}
    if causal and mask is None:
        out = causal_linear_attention(q, k, value.astype(wide), **options)
    elif causal:
        raise ValueError("a mask says what is causal: give one of the two.")
    else:
        out = linear_attention(q, k, value.astype(wide), mask=mask, **options)
    return out.astype(query.dtype)


def _exponents(x: Array, projection: Array) -> Array:
    half = jnp.sum(x * x, axis=-1, keepdims=True) / 2
    return jnp.einsum("...H,FH->...F", x, projection) - half


def _there(key, key_mask):
    """(B, S, 1, 1) bool: the keys that are there."""
    if key_mask is None:
        return jnp.ones((*key.shape[:2], 1, 1), bool)
    if jnp.shape(key_mask) != key.shape[:2]:
        raise ValueError(
            f"key_mask must be (B, S) = {key.shape[:2]}; got {jnp.shape(key_mask)}."
        )
    if key_mask.dtype != jnp.bool_:
        raise TypeError(f"key_mask must be bool, True is there; got {key_mask.dtype}.")
    return jnp.asarray(key_mask)[:, :, None, None]


def _features(query, key, value, feature_map, key_mask):
    """phi of queries (B, T, K, G, F) and keys (B, S, K, F), and values, all float32 at least.

    Also which keys are there and not finite, (B, S, K) bool. As those that are not there, they have
    no features: 0 times NaN would be NaN, for rows that do not see them and in gradients.
    """
    check_arguments(query, key, value, None)
    B, T, N, _ = query.shape
    K = key.shape[2]
    wide = jnp.promote_types(query.dtype, jnp.float32)
    there = _there(key, key_mask)
    finite = jnp.isfinite(key).all(-1) & jnp.isfinite(value).all(-1)
    used = there & finite[..., None]
    key, value = (jnp.where(used, x.astype(wide), 0.0) for x in (key, value))
    queries, keys = feature_map(query.astype(wide)), feature_map(key)
    queries = queries.reshape(B, T, K, N // K, queries.shape[-1])
    return queries, jnp.where(used, keys, 0.0), value, there[..., 0] & ~finite


def _zeros(batch: int, heads: int, features: int, size: int, dtype):
    shape = batch, heads, features
    return jnp.zeros((*shape, size), dtype), jnp.zeros(shape, dtype)


def _ratio(top: Array, bottom: Array, bad: Array, query: Array) -> Array:
    """top (B, T, K, G, E) / bottom (B, T, K, G), or 0 where that is; NaN where bad (B, T or 1, K)."""
    # First by a constant: the slope of 1 / bottom would overflow where bottom is small.
    size = jax.lax.stop_gradient(jnp.where(bottom == 0.0, 1.0, bottom))
    bottom = jnp.where(bottom == 0.0, 1.0, bottom / size)
    out = top / size[..., None] / bottom[..., None]
    out = jnp.where(bad[..., None, None], jnp.nan, out)
    return out.reshape(*query.shape[:3], top.shape[-1]).astype(query.dtype)
