"""Attention linear in length: a kernel of features in place of the softmax.

out_t = phi(q_t) sum_s phi(k_s) v_s^T / phi(q_t) sum_s phi(k_s). The causal form goes through the
sequence in chunks, so that time and memory are O(T) in both directions, and its state is all that
decoding needs. Axes: see reference.py, and F features.

Sources: Katharopoulos et al. 2020, arXiv 2006.16236; Choromanski et al. 2021, arXiv 2009.14794.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from qkv_jax.ops.attention import check_arguments

Array = jax.Array
CHUNK = 64


def elu_plus_one(x: Array) -> Array:
    """The feature map of Katharopoulos et al.: elu(x) + 1, positive."""
    return jax.nn.elu(x) + 1.0


def linear_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    feature_map: Callable[[Array], Array] = elu_plus_one,
    key_mask: Array | None = None,
) -> Array:
    """Attention with the kernel phi(q) . phi(k); every query sees every key.

    O((T + S) F E) time.

    Args:
        query: (B, T, N, H) floating.
        key: (B, S, K, H), dtype of query; K divides N.
        value: (B, S, K, E), dtype of query.
        feature_map: (..., H) -> (..., F), not negative.
        key_mask: (B, S) bool; False: the key is not there. None: all are.

    Returns:
        (B, T, N, E), dtype of query; a row with no key is exactly 0.

    Source: Katharopoulos et al. 2020, eq. 5.
    """
    queries, keys, values = _features(query, key, value, feature_map, key_mask)
    memory = jnp.einsum("BSKF,BSKE->BKFE", keys, values)
    top = jnp.einsum("BTKGF,BKFE->BTKGE", queries, memory)
    bottom = jnp.einsum("BTKGF,BKF->BTKG", queries, keys.sum(axis=1))
    return _ratio(top, bottom, query)


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
    """
    if query.shape[1] != key.shape[1]:
        raise ValueError(
            "query and key must be of one length in the causal form; got "
            f"{query.shape} and {key.shape}."
        )
    T = query.shape[1]
    parts = _features(query, key, value, feature_map, key_mask)
    size = min(CHUNK, max(T, 1))

    def cut(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, -T % size), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1)

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
        x.swapaxes(0, 1).reshape(B, -1, *x.shape[3:])[:, :T] for x in (top, bottom)
    )
    return _ratio(top, bottom, query)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LinearState:
    """What decoding needs of the past: memory (B, K, F, E) and norm (B, K, F), float32 at least."""

    memory: Array
    norm: Array

    @classmethod
    def zeros(cls, batch: int, heads: int, features: int, size: int) -> "LinearState":
        memory, norm = _zeros(batch, heads, features, size, jnp.float32)
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
    q, k, v = _features(query, key, value, feature_map, None)
    memory = state.memory + jnp.einsum("BSKF,BSKE->BKFE", k, v)
    norm = state.norm + k.sum(axis=1)
    top = jnp.einsum("BTKGF,BKFE->BTKGE", q, memory)
    bottom = jnp.einsum("BTKGF,BKF->BTKG", q, norm)
    return _ratio(top, bottom, query), LinearState(memory=memory, norm=norm)


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

    Source: Choromanski et al. 2021, lemma 1 (SM+).
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
) -> Array:
    """FAVOR+: an estimate, linear in length, of softmax attention with scale H ** -0.5.

    Args:
        query, key, value, key_mask: as for `linear_attention`.
        projection: (F, H), see `favor_projection`; the error falls as F ** -0.5.
        causal: query t sees keys 0 .. t. All keys are scaled by the largest exponent of their
            head, those to come included: a constant, which cancels.

    Source: Choromanski et al. 2021, arXiv 2009.14794.
    """
    if projection.ndim != 2 or projection.shape[1] != query.shape[3]:
        raise ValueError(
            f"projection must be (F, {query.shape[3]}); got shape {projection.shape}."
        )
    wide = jnp.promote_types(query.dtype, jnp.float32)
    query32, key32 = (x.astype(wide) * query.shape[3] ** -0.25 for x in (query, key))
    projection = projection.astype(wide)
    if key_mask is not None:
        key32 = jnp.where(key_mask[:, :, None, None], key32, 0.0)
    tops = [jax.lax.stop_gradient(_exponents(x, projection)) for x in (query32, key32)]
    shift = tops[0].max(axis=-1, keepdims=True)
    q = favor_features(query32, projection, shift=shift)
    shift = tops[1].max(axis=(1, 3), keepdims=True, initial=-jnp.inf)
    k = favor_features(key32, projection, shift=shift)
    attend = causal_linear_attention if causal else linear_attention
    out = attend(q, k, value.astype(wide), feature_map=lambda x: x, key_mask=key_mask)
    return out.astype(query.dtype)


def _exponents(x: Array, projection: Array) -> Array:
    half = jnp.sum(x * x, axis=-1, keepdims=True) / 2
    return jnp.einsum("...H,FH->...F", x, projection) - half


def _features(query, key, value, feature_map, key_mask):
    """phi of queries (B, T, K, G, F) and keys (B, S, K, F), and values, all float32 at least."""
    check_arguments(query, key, value, None)
    B, T, N, _ = query.shape
    K = key.shape[2]
    wide = jnp.promote_types(query.dtype, jnp.float32)
    value = value.astype(wide)
    if key_mask is not None:
        if jnp.shape(key_mask) != key.shape[:2]:
            raise ValueError(
                f"key_mask must be (B, S) = {key.shape[:2]}; got {jnp.shape(key_mask)}."
            )
        there = key_mask[:, :, None, None]
        key, value = (jnp.where(there, x, jnp.zeros((), x.dtype)) for x in (key, value))
    queries, keys = (feature_map(x.astype(wide)) for x in (query, key))
    if key_mask is not None:
        keys = jnp.where(there, keys, 0.0)
    return queries.reshape(B, T, K, N // K, -1), keys, value


def _zeros(batch: int, heads: int, features: int, size: int, dtype):
    shape = batch, heads, features
    return jnp.zeros((*shape, size), dtype), jnp.zeros(shape, dtype)


def _ratio(top: Array, bottom: Array, query: Array) -> Array:
    bottom = jnp.where(bottom == 0.0, 1.0, bottom)[..., None]
    out = top / bottom
    return out.reshape(*query.shape[:3], -1).astype(query.dtype)
