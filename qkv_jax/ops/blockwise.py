"""Attention without the T x S matrix, in plain XLA, skipping the blocks that the mask rules out.

Queries and keys are cut into blocks. A mask says of every block whether it is empty, full or in
doubt; empty ones are never looked at, and only those in doubt pay for the mask. Both directions are
loops over lists of blocks, so memory is O(T + S), whatever the mask. Axes: see reference.py.

Source: online softmax, Milakov and Gimelshein 2018, arXiv 1805.02867; its reverse rule, Dao et al.
2022, arXiv 2205.14135; skipping by a mask's structure, Dong et al. 2024, arXiv 2412.05496.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qkv_jax.ops import masks
from qkv_jax.ops.dropout import keep_by_seed
from qkv_jax.ops.masks import Blocks, Mask, Tile
from qkv_jax.ops.scores import Score

Array = jax.Array
BLOCK = 256


class _Plan(NamedTuple):
    """What is known at trace time: blocks' sizes, the scale, and the dropout rate."""

    shape: tuple[int, int, int, int]
    size: tuple[int, int]
    scale: float
    rate: float

    @property
    def grid(self) -> Blocks:
        return Blocks(self.shape, self.size)


def blockwise_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: Mask | None,
    score: Score | None,
    scale: float,
    dropout_rate: float,
    dropout_rng: Array | None,
    block_size: tuple[int, int] | None = None,
) -> tuple[Array, Array]:
    """Attention and its log-sum-exp, in O(T + S) memory. Arguments are checked already.

    Args:
        query, key, value, mask, score, scale, dropout_rate, dropout_rng: as for
            `dot_product_attention`.
        block_size: queries and keys in a block; None: chosen by T and S.

    Returns:
        out (B, T, N, E) in query's dtype; logsumexp (B, T, N) float32 (float64 for float64).
        Differentiable once, in reverse.
    """
    B, T, N, _ = query.shape
    S, _, E = value.shape[1:]
    if B * T * S * N == 0:
        wide = jnp.promote_types(query.dtype, jnp.float32)
        return jnp.zeros((B, T, N, E), query.dtype), jnp.full((B, T, N), -jnp.inf, wide)
    size = block_size or (_block(T), _block(S))
    plan = _Plan((B, N, T, S), size, scale, dropout_rate)
    grid = plan.grid
    mask = None if mask is None else mask.fill(grid)
    if grid.count[1] * size[1] > S:
        mask = masks.prefix(S) if mask is None else mask & masks.prefix(S)
    score = None if score is None else score.fill(grid)
    seed = None
    if dropout_rate > 0.0 and dropout_rng is not None:
        seed = jax.random.bits(dropout_rng, (), jnp.uint32)
    query, key, value = (
        _cut(x, count, width)
        for x, count, width in zip(
            (query, key, value),
            (grid.count[0], *2 * grid.count[1:]),
            (size[0], *2 * size[1:]),
        )
    )
    out, logsumexp = _attend(query, key, value, mask, score, seed, plan)
    logsumexp = logsumexp.reshape(B, N, -1)[:, :, :T].swapaxes(1, 2)
    return _join(out, T).astype(query.dtype), logsumexp


def _block(length: int) -> int:
    """A block is a multiple of 8, and the last one is not mostly filled up."""
    count = -(-length // BLOCK)
    return -(-length // (8 * count)) * 8


def _cut(x: Array, count: int, size: int) -> Array:
    """(B, T, N, H) -> (B, N, blocks, size, H), filled up with zeros."""
    B, T, N, H = x.shape
    x = jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, count * size - T), (0, 0)))
    return x.reshape(B, N, count, size, H)


def _join(x: Array, length: int) -> Array:
    """(B, N, blocks, size, H) -> (B, T, N, H)."""
    B, N, _, _, H = x.shape
    return x.reshape(B, N, -1, H)[:, :, :length].swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(query, key, value, mask, score, seed, plan: _Plan):
    return _forward(query, key, value, mask, score, seed, plan)[0]


def _forward(query, key, value, mask, score, seed, plan: _Plan):
    B, N, count, size, _ = query.shape
    K, E = key.shape[1], value.shape[-1]
    wide = jnp.promote_types(query.dtype, jnp.float32)
    lists = _lists(mask, plan, key, value)

    def block_of_queries(at):
        b, h, i = at // (N * count), at // count % N, at % count
        q = query[b, h, i]

        def visit(doubt):
            def step(place, carry):
                top, total, acc, bad = carry
                j, tile = _place(lists, plan, b, h, i, place)
                k, v = key[b, h // (N // K), j], value[b, h // (N // K), j]
                s, allowed, _ = _scores(
                    q, k, mask if doubt else None, score, tile, plan
                )
                if doubt:
                    bad = bad | jnp.any(allowed & ~_finite_rows(v), axis=1)
                    v = _finite(v)
                new_top = jnp.maximum(top, s.max(axis=1))
                safe = jnp.where(new_top == -jnp.inf, 0.0, new_top)
                p = jnp.exp(s - safe[:, None])
                shrink = jnp.exp(top - safe)
                total = total * shrink + p.sum(axis=1)
                p = _dropped(p, seed, tile, plan).astype(v.dtype)
                new = jnp.einsum("TS,SE->TE", p, v, preferred_element_type=wide)
                return new_top, total, acc * shrink[:, None] + new, bad

            return step

        carry = (
            jnp.full(size, -jnp.inf, wide),
            jnp.zeros(size, wide),
            jnp.zeros((size, E), wide),
            jnp.zeros(size, bool),
        )
        top, total, acc, bad = _walk(lists, plan, b, h, i, visit, carry)
        empty = total == 0.0
        total = jnp.where(empty, 1.0, total)
        out = acc / total[:, None]
        out = jnp.where(bad[:, None], jnp.nan, out).astype(query.dtype)
        return out, jnp.where(empty, 0.0, top), total, empty

    out, top, total, empty = jax.lax.map(block_of_queries, jnp.arange(B * N * count))
    out = out.reshape(B, N, count, size, E)
    top, total, empty = (x.reshape(B, N, count, size) for x in (top, total, empty))
    logsumexp = jnp.where(empty, -jnp.inf, jnp.log(total) + top)
    # Apart, for where scores are of hundreds their sum loses what the weights need.
    saved = (query, key, value, mask, score, seed, out, top, total)
    return (out, logsumexp), saved


def _backward(plan: _Plan, saved, cotangents):
    query, key, value, mask, score, seed, out, top, total = saved
    d_out, d_logsumexp = cotangents
    B, N, count, size, H = query.shape
    K, keys, E = key.shape[1], key.shape[2], value.shape[-1]
    G = N // K
    wide = top.dtype
    lists = _lists(mask, plan, key, value)
    if mask is not None:
        # A value that is not finite makes whole rows NaN: constants, which have no gradient.
        constant = jnp.isnan(out).all(axis=-1, keepdims=True) & ~jnp.isnan(
            total[..., None]
        )
        d_out, out = (jnp.where(constant, 0, x).astype(x.dtype) for x in (d_out, out))
    lowered = jnp.sum(d_out.astype(wide) * out.astype(wide), axis=-1) - d_logsumexp

    def head_of_keys(slopes, at):
        b, kv = at // K, at % K

        def block_of_queries(carry, at):
            h, i = kv * G + at // count, at % count
            q, d_o = query[b, h, i], d_out[b, h, i]
            low = lowered[b, h, i][:, None]
            most, summed = top[b, h, i][:, None], total[b, h, i][:, None]

            def visit(doubt):
                def step(place, carry):
                    d_q, d_key, d_value, slopes = carry
                    j, tile = _place(lists, plan, b, h, i, place)
                    k, v = key[b, kv, j], value[b, kv, j]
                    s, allowed, pull = _scores(
                        q, k, mask if doubt else None, score, tile, plan
                    )
                    p = jnp.exp(s - most) / summed
                    if doubt:
                        p = jnp.where(allowed, p, 0.0)
                        k, v = _finite(k), _finite(v)
                    d_p = jnp.einsum("TE,SE->TS", d_o, v, preferred_element_type=wide)
                    d_p = _dropped(d_p, seed, tile, plan)
                    d_s = p * (d_p - low)
                    if doubt:
                        d_s = jnp.where(allowed, d_s, 0.0)
                    d_s, d_score = pull(d_s)
                    if slopes is not None:
                        slopes = slopes.add(d_score, tile)
                    d_s = (d_s * plan.scale).astype(q.dtype)
                    p = _dropped(p, seed, tile, plan).astype(d_o.dtype)
                    product = functools.partial(jnp.einsum, preferred_element_type=wide)
                    d_q = d_q + product("TS,SH->TH", d_s, k)
                    d_key = d_key.at[j].add(product("TS,TH->SH", d_s, q))
                    d_value = d_value.at[j].add(product("TS,TE->SE", p, d_o))
                    return d_q, d_key, d_value, slopes

                return step

            d_q = jnp.zeros((size, H), wide)
            d_q, *carry = _walk(lists, plan, b, h, i, visit, (d_q, *carry))
            return tuple(carry), d_q.astype(query.dtype)

        width = key.shape[3]
        begin = jnp.zeros((keys, width, H), wide), jnp.zeros((keys, width, E), wide)
        (d_key, d_value, slopes), d_query = jax.lax.scan(
            block_of_queries, (*begin, slopes), jnp.arange(G * count)
        )
        return slopes, (d_query, d_key.astype(key.dtype), d_value.astype(value.dtype))

    slopes, (d_query, d_key, d_value) = jax.lax.scan(
        head_of_keys, _zero_slopes(score), jnp.arange(B * K)
    )
    d_score = None if score is None else jax.tree.map(_cotangent, slopes, score)
    return (
        d_query.reshape(query.shape),
        d_key.reshape(key.shape),
        d_value.reshape(value.shape),
        None,
        d_score,
        None,
    )


_attend.defvjp(_forward, _backward)


def _scores(q, k, mask, score, tile: Tile, plan: _Plan):
    """A block's scores, what the mask admits of it, and the pull-back through the score rule."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    clean = k if mask is None else _finite(k)
    s = jnp.einsum("TH,SH->TS", q, clean, preferred_element_type=wide) * plan.scale
    good = None
    if mask is not None:
        good = _finite_rows(k)
        s = jnp.where(good, s, jnp.nan)
    back = None
    if score is not None:
        cut = score.tile(tile)
        s, back = jax.vjp(
            lambda s, rule: rule.within(s[None, None], tile)[0, 0].astype(wide), s, cut
        )

    def pull(d):
        if back is None:
            return d, None
        d_s, d_rule = back(d)
        d_s = d_s if good is None else jnp.where(good, d_s, 0.0)
        return d_s, jax.tree.map(_dense, d_rule, cut)

    if mask is None:
        return s, None, pull
    # A row that only fills up a block could see a NaN, and hand it on to the keys' gradients.
    allowed = mask.tile(tile) & (tile.index[2] < plan.shape[2])
    allowed = jnp.broadcast_to(allowed[0, 0], s.shape)
    return jnp.where(allowed, s, -jnp.inf), allowed, pull


class _Lists(NamedTuple):
    """The blocks of keys that each block of queries looks at: full ones first, then in doubt.

    Attributes:
        order: (B or 1, N or 1, blocks of queries, blocks of keys) int32.
        full, some: (B or 1, N or 1, blocks of queries) int32: where each kind ends.
    """

    order: Any
    full: Any
    some: Any


def _lists(mask: Mask | None, plan: _Plan, key, value) -> _Lists | None:
    """None: there is no mask, every block is full.

    With a NaN or inf in any key or value, all blocks are in doubt: only there is it kept from the
    rows that may not see it, and shown whole to those that may.
    """
    if mask is None:
        return None
    grid = plan.grid
    some, every = mask.blocks(grid)
    known = isinstance(some, np.ndarray) and isinstance(every, np.ndarray)
    xp = np if known else jnp
    shape = np.broadcast_shapes(some.shape, every.shape, (1, 1, *grid.count))
    kind = xp.broadcast_to(xp.where(every, 0, xp.where(some, 1, 2)), shape)
    order = xp.argsort(kind, axis=-1, stable=True).astype(np.int32)
    full, some = ((kind < end).sum(-1).astype(np.int32) for end in (1, 2))
    clean = jnp.all(jnp.isfinite(key)) & jnp.all(jnp.isfinite(value))
    return _Lists(jnp.asarray(order), jnp.where(clean, full, 0), jnp.asarray(some))


def _walk(lists: _Lists | None, plan: _Plan, b, h, i, visit, carry):
    """Runs visit(doubt)(place, carry) over a block of queries' list, doubtful ones last."""
    if lists is None:
        return jax.lax.fori_loop(0, plan.grid.count[1], visit(False), carry)
    full, some = (_of_head(ends, b, h)[i] for ends in (lists.full, lists.some))
    carry = jax.lax.fori_loop(0, full, visit(False), carry)
    return jax.lax.fori_loop(full, some, visit(True), carry)


def _of_head(array: Array, b, h) -> Array:
    return array[b if array.shape[0] > 1 else 0, h if array.shape[1] > 1 else 0]


def _place(lists: _Lists | None, plan: _Plan, b, h, i, place):
    """Which block of keys stands at a place of a list, and its tile."""
    j = place if lists is None else _of_head(lists.order, b, h)[i, place]
    return j, Tile((b, h, i * plan.size[0], j * plan.size[1]), plan.size)


def _dropped(p: Array, seed: Array | None, tile: Tile, plan: _Plan) -> Array:
    if seed is None:
        return p
    kept = keep_by_seed(seed, plan.rate, *tile.index)[0, 0]
    return jnp.where(kept, p / (1.0 - plan.rate), 0.0)


def _finite(x: Array) -> Array:
    return jnp.where(jnp.isfinite(x), x, jnp.zeros((), x.dtype))


def _finite_rows(x: Array) -> Array:
    """(S, size) -> (1, S): whether all components are finite."""
    return jnp.all(jnp.isfinite(x), axis=1)[None]


def _zero_slopes(score: Score | None) -> Score | None:
    """Where gradients of a rule's arrays are summed: float32 at least."""

    def zeros(x):
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        dtype = jnp.promote_types(x.dtype, jnp.float32) if floating else x.dtype
        return jnp.zeros(x.shape, dtype)

    return jax.tree.map(zeros, score)


def _dense(slope: Array, like: Array) -> Array:
    """A gradient that can be summed; that of an integer is 0 and not of type float0."""
    return jnp.zeros_like(like) if slope.dtype == jax.dtypes.float0 else slope


def _cotangent(slope: Array, like: Array) -> Any:
    if jnp.issubdtype(like.dtype, jnp.floating):
        return slope.astype(like.dtype)
    return np.zeros(like.shape, jax.dtypes.float0)
