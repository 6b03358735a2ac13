"""Attention linear in length: a kernel of features in place of the softmax.

out_t = phi(q_t) sum_s phi(k_s) v_s^T / phi(q_t) sum_s phi(k_s). The causal form goes through the
sequence in chunks, so that time and memory are O(T) in both directions, and its state is all that
decoding needs. Sums are float32 at least. NaN or inf in a key or value makes those rows NaN that
are allowed to see it, and no others. Axes: see reference.py, and F features.

Sources: Katharopoulos et al. 2020, arXiv 2006.16236; Choromanski et al. 2021, arXiv 2009.14794.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from qkv_jax.ops.attention import check_arguments

Array = jax.Array
Feature = Callable[[Array], Array]
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
    feature_map: Feature = elu_plus_one,
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
    there = _there(key, key_mask)
    return _all(query, key, value, there, (feature_map, feature_map), mask)


def causal_linear_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    feature_map: Feature = elu_plus_one,
    key_mask: Array | None = None,
) -> Array:
    """The same, but query t sees the keys 0 .. t: T = S.

    O(T F E) time and O(T (H + E) + T / CHUNK F E) memory, in reverse, too: features are made a chunk
    at a time, and made again in reverse.

    Source: Katharopoulos et al. 2020, section 3.3. Difference: in chunks.
    """
    there = _there(key, key_mask)
    return _causal(query, key, value, there, (feature_map, feature_map))


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
    feature_map: Feature = elu_plus_one,
) -> tuple[Array, LinearState]:
    """One position of `causal_linear_attention`: query (B, 1, N, H), key and value likewise.

    Returns:
        (B, 1, N, E), dtype of query; the next state. Time and memory do not grow with the past.
    """
    if query.shape[1] != 1 or key.shape[1] != 1:
        raise ValueError(
            f"query and key must be of length 1; got {query.shape} and {key.shape}."
        )
    maps = feature_map, feature_map
    q, k, v, bad = _features(query, key, value, _there(key, None), maps)
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
    scale = query.shape[3] ** -0.25
    there = _there(key, key_mask)
    used = there & jnp.isfinite(key).all(axis=-1, keepdims=True)
    keys = jax.lax.stop_gradient(jnp.where(used, key, jnp.zeros((), key.dtype)))
    tops = _exponents(keys.astype(wide) * scale, projection)
    # A key that is not there must not set the scale: those that are might all be lost.
    tops = tops.max((1, 3), keepdims=True, where=used, initial=-jnp.inf)
    tops = jnp.where(tops == -jnp.inf, 0.0, tops)

    def of_queries(x: Array) -> Array:
        exponents = _exponents(x * scale, projection)
        top = exponents.max(axis=-1, keepdims=True)
        return jnp.exp(exponents - jax.lax.stop_gradient(top))

    def of_keys(x: Array) -> Array:
        return favor_features(x * scale, projection, shift=tops)

    maps = of_queries, of_keys
    if not causal:
        return _all(query, key, value, there, maps, mask)
    if mask is not None:
        raise ValueError("a mask says what is causal: give one of the two.")
    return _causal(query, key, value, there, maps)


def _all(query, key, value, there, maps, mask):
    """Every query with every key, or with those of a mask."""
    queries, keys, values, bad = _features(query, key, value, there, maps)
    bad = bad.any(axis=1, keepdims=True)
    if mask is not None:
        _, T, K, G, _ = queries.shape
        allowed = jnp.broadcast_to(mask, (len(query), K * G, T, key.shape[1]))
        pairs = jnp.einsum("BTKGF,BSKF->BKGTS", queries, keys)
        pairs = jnp.where(allowed.reshape(pairs.shape), pairs, 0.0)
        top = jnp.einsum("BKGTS,BSKE->BTKGE", pairs, values)
        bottom = jnp.moveaxis(pairs.sum(-1), 3, 1)
        return _ratio(top, bottom, bad, query)
    memory = jnp.einsum("BSKF,BSKE->BKFE", keys, values)
    top = jnp.einsum("BTKGF,BKFE->BTKGE", queries, memory)
    bottom = jnp.einsum("BTKGF,BKF->BTKG", queries, keys.sum(axis=1))
    return _ratio(top, bottom, bad, query)


def _causal(query, key, value, there, maps):
    """A chunk at a time: what is of the sequence's length are the arguments and the output alone."""
    if query.shape[1] != key.shape[1]:
        raise ValueError(
            "query and key must be of one length in the causal form; got "
            f"{query.shape} and {key.shape}."
        )
    check_arguments(query, key, value, None)
    B, T, _, _ = query.shape
    K, E = value.shape[2:]
    size = min(CHUNK, max(T, 1))

    def cut(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, -T % size), *((0, 0),) * (x.ndim - 2)))
        x = x.reshape(x.shape[0], x.shape[1] // size, size, *x.shape[2:])
        return x.swapaxes(0, 1)

    earlier = jnp.tril(jnp.ones((size, size), bool))[None, None, None]

    @jax.checkpoint
    def step(state, chunk):
        memory, norm, before = state
        rows, keys, values, here = chunk
        q, k, v, bad = _features(rows, keys, values, here, maps)
        pairs = jnp.einsum("BTKGF,BSKF->BKGTS", q, k)
        pairs = jnp.where(earlier, pairs, 0.0)
        top = jnp.einsum("BKGTS,BSKE->BTKGE", pairs, v)
        top = top + jnp.einsum("BTKGF,BKFE->BTKGE", q, memory)
        bottom = jnp.moveaxis(pairs.sum(-1), 3, 1)
        bottom = bottom + jnp.einsum("BTKGF,BKF->BTKG", q, norm)
        memory = memory + jnp.einsum("BSKF,BSKE->BKFE", k, v)
        bad = before[:, None] | (jnp.cumsum(bad, axis=1) > 0)
        out = _ratio(top, bottom, bad, rows)
        return (memory, norm + k.sum(axis=1), bad[:, -1]), out

    features = jax.eval_shape(maps[1], key).shape[-1]
    wide = jnp.promote_types(query.dtype, jnp.float32)
    state = *_zeros(B, K, features, E, wide), jnp.zeros((B, K), bool)
    _, out = jax.lax.scan(step, state, tuple(map(cut, (query, key, value, there))))
    return out.swapaxes(0, 1).reshape(B, len(out) * size, *out.shape[3:])[:, :T]


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


def _features(query, key, value, there, maps):
    """Features of queries (B, T, K, G, F) and keys (B, S, K, F), and values, all float32 at least.

    Also which keys are there and not finite, (B, S, K) bool. As those that are not there, they have
    no features: 0 times NaN would be NaN, for rows that do not see them and in gradients.
    """
    check_arguments(query, key, value, None)
    B, T, N, _ = query.shape
    K = key.shape[2]
    wide = jnp.promote_types(query.dtype, jnp.float32)
    finite = jnp.isfinite(key).all(-1) & jnp.isfinite(value).all(-1)
    used = there & finite[..., None]
    key, value = (jnp.where(used, x.astype(wide), 0.0) for x in (key, value))
    queries, keys = maps[0](query.astype(wide)), maps[1](key)
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
