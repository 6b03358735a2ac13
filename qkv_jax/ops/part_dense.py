"""A part of attention with all of its pairs at once: for parts so short that loops do not pay.

As reference.py, but of a part of the whole, and with the way back written out, from the maxima and
sums of the whole. Axes: see there.
"""

from typing import Any

import jax
import jax.numpy as jnp

from qkv_jax.ops.dropout import keep_by_seed
from qkv_jax.ops.masks import index_arrays
from qkv_jax.ops.parts import (
    Inputs,
    Plan,
    Rows,
    Softmax,
    dense_slope,
    zero_slopes,
)
from qkv_jax.ops.reference import finite, nonfinite_keys

Array = jax.Array


def forward_dense(inputs: Inputs, plan: Plan, dtype: Any) -> Softmax:
    """Attention over the keys at hand, its `out` in dtype."""
    value, mask = inputs.value, inputs.mask
    scores, allowed, _ = _scores(inputs, plan)
    if allowed is not None:
        scores = jnp.where(allowed, scores, -jnp.inf)
    top = jax.lax.stop_gradient(scores).max(axis=-1, keepdims=True)
    p = jnp.exp(scores - jnp.where(top == -jnp.inf, 0.0, top))
    total = p.sum(axis=-1, keepdims=True)
    total = jnp.where(total == 0.0, 1.0, total)
    p = _dropped(p, inputs, plan)
    out = _product("BKGTS,BSKE->BKGTE", p, value if mask is None else finite(value))
    out = out / total
    if allowed is not None:
        bad = jnp.any(allowed & nonfinite_keys(value, out.shape[1]), -1, keepdims=True)
        out = jnp.where(bad, jnp.nan, out)
    out, top, total = (x.swapaxes(1, 2) for x in (out, top, total))
    return Softmax(out.astype(dtype), top, total)


def backward_dense(inputs: Inputs, rows: Rows, plan: Plan, dtype: Any) -> Any:
    """What `backward_blocks` gives, see there."""
    query, key, value = inputs[:3]
    wide = rows.top.dtype
    scores, allowed, pull = _scores(inputs, plan)
    d_out, low, top, share, constant = (x.swapaxes(1, 2) for x in rows[:5])
    d_out = jnp.where(constant, 0, d_out)
    p = jnp.exp(scores - top) * share
    if allowed is not None:
        key, value = finite(key), finite(value)
        p = jnp.where(allowed, p, 0.0)
    d_p = _product("BKGTE,BSKE->BKGTS", d_out, value)
    d_s = p * (_dropped(d_p, inputs, plan) - low)
    if allowed is not None:
        d_s = jnp.where(allowed, d_s, 0.0)
    d_s, slopes = pull(d_s)
    d_s = (d_s * plan.scale).astype(query.dtype)
    p = _dropped(p, inputs, plan).astype(value.dtype)
    turned = query.swapaxes(1, 2)
    d_query = _product("BKGTS,BSKH->BKGTH", d_s, key).swapaxes(1, 2)
    d_key = _of_keys("BKGTS,BKGTH->BSKH", d_s, turned, key.shape[2], wide)
    d_value = _of_keys(
        "BKGTS,BKGTE->BSKE", p, d_out.astype(p.dtype), key.shape[2], wide
    )
    return d_query.astype(dtype), d_key, d_value, slopes


def _scores(inputs: Inputs, plan: Plan) -> tuple[Array, Array | None, Any]:
    """The scores (B, N, T, S), what the mask admits, and the pull-back through the rule."""
    query, key, _, mask, score, _, _ = inputs
    index = _indices(inputs, plan)
    turned = query.swapaxes(1, 2)
    s = _product("BKGTH,BSKH->BKGTS", turned, key if mask is None else finite(key))
    s = s * jnp.asarray(plan.scale, s.dtype)
    good = None if mask is None else ~nonfinite_keys(key, query.shape[2])
    if good is not None:
        s = jnp.where(good, s, jnp.nan)
    back = None
    if score is not None:
        s, back = jax.vjp(
            lambda s, rule: rule.apply(s, *index).astype(s.dtype), s, score
        )

    def pull(d: Array) -> tuple[Array, Any]:
        if back is None:
            return d, None
        d_s, d_rule = back(d)
        d_s = d_s if good is None else jnp.where(good, d_s, 0.0)
        sums = jax.tree.map(dense_slope, d_rule, score)
        return d_s, jax.tree.map(jnp.add, zero_slopes(score), sums)

    if mask is None:
        return s, None, pull
    allowed = mask.allowed(*index) & (index[2] < plan.shape[2])
    return s, jnp.broadcast_to(allowed, s.shape), pull


def _indices(inputs: Inputs, plan: Plan) -> tuple[Array, Array, Array, Array]:
    """The indices in the whole of rows, heads, queries and keys, to be broadcast to (B, N, T, S)."""
    (B, T, N, _), S, part = inputs.query.shape, inputs.key.shape[1], inputs.part
    b, h, q, k = index_arrays((B, N, T, S))

    def placed(at: Array, places: Any, size: int) -> Array:
        return at if places is None else places[at // size] * size + at % size

    return (
        b if part.row is None else b + part.row,
        h if part.head is None else h + part.head,
        placed(q, part.queries, plan.size[0]),
        placed(k, part.keys, plan.size[1]),
    )


def _dropped(x: Array, inputs: Inputs, plan: Plan) -> Array:
    if inputs.seed is None:
        return x
    kept = keep_by_seed(inputs.seed, plan.rate, *_indices(inputs, plan))
    return jnp.where(kept, x / (1.0 - plan.rate), 0.0)


def _product(rule: str, x: Array, keys: Array) -> Array:
    """Of (B, N, T, size or S) with keys (B, S, K, size): (B, N, T, S or size), float32 at least."""
    wide = jnp.promote_types(keys.dtype, jnp.float32)
    x = _grouped(x.astype(keys.dtype), keys.shape[2])
    found = jnp.einsum(rule, x, keys, preferred_element_type=wide)
    return found.reshape(found.shape[0], -1, *found.shape[3:])


def _of_keys(rule: str, weights: Array, x: Array, heads: int, wide: Any) -> Array:
    """Sums over queries and the heads of a group: (B, S, K, size)."""
    weights, x = _grouped(weights, heads), _grouped(x, heads)
    return jnp.einsum(rule, weights, x, preferred_element_type=wide)


def _grouped(x: Array, heads: int) -> Array:
    """(B, N, T, size) -> (B, K, G, T, size)."""
    B, N, *rest = x.shape
    return x.reshape(B, heads, N // heads, *rest)
