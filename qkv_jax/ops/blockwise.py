"""Attention without the T x S matrix, in plain XLA, skipping the blocks that the mask rules out.

Queries and keys are cut into blocks. A mask says of every block whether it is empty, full or in
doubt; empty ones are never looked at, and only those in doubt pay for the mask. Both directions are
loops over lists of blocks, so memory is O(T + S), whatever the mask. Axes: see reference.py.

Source: online softmax, Milakov and Gimelshein 2018, arXiv 1805.02867; its reverse rule, Dao et al.
2022, arXiv 2205.14135; skipping by a mask's structure, Dong et al. 2024, arXiv 2412.05496.
"""

import functools
import math
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from qkv_jax.ops import masks
from qkv_jax.ops.dropout import keep_by_seed
from qkv_jax.ops.masks import Blocks, Mask, Tile
from qkv_jax.ops.scores import Score

Array = jax.Array
# Nanoseconds a query-key pair costs in blocks of at most so many queries and keys, forward and
# backward, float32, H = 64, on 2 cores (`python -m benchmarks.attention --sweep-blocks`): XLA has
# the cores share products that are large.
LIMITS = {(128, 128): 13.0, (512, 256): 9.6, (512, 512): 8.5}
# What a block needs: nothing; the mask; the mask, and care for what is not finite.
Kind = Literal["full", "masked", "guarded"]


class _Plan(NamedTuple):
    """What is known at trace time: blocks' sizes, the scale, and the dropout rate."""

    shape: tuple[int, int, int, int]
    size: tuple[int, int]
    scale: float
    rate: float

    @property
    def grid(self) -> Blocks:
        return Blocks(self.shape, self.size)

    def early(self, dtype) -> float:
        """The scale if queries can be multiplied by it without a loss, else 1."""
        return self.scale if jnp.promote_types(dtype, jnp.float32) == dtype else 1.0

    def late(self, dtype) -> float:
        """The scale if it is left to the scores, else 1."""
        return self.scale if self.early(dtype) != self.scale else 1.0


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
        block_size: queries and keys in a block; None: see `choose_blocks`.

    Returns:
        out (B, T, N, E) in query's dtype; logsumexp (B, T, N) float32 (float64 for float64).
        Differentiable once, in reverse.
    """
    B, T, N, _ = query.shape
    S, _, E = value.shape[1:]
    if B * T * S * N == 0:
        wide = jnp.promote_types(query.dtype, jnp.float32)
        return jnp.zeros((B, T, N, E), query.dtype), jnp.full((B, T, N), -jnp.inf, wide)
    size = block_size or choose_blocks(mask, (B, N, T, S))
    plan = _Plan((B, N, T, S), size, scale, dropout_rate)
    seed = None
    if dropout_rate > 0.0 and dropout_rng is not None:
        seed = jax.random.bits(dropout_rng, (), jnp.uint32)
    arguments = _filled(query, key, value, mask, score, plan)
    out, logsumexp = _attend(*arguments, seed, plan)
    return out[:, :T], logsumexp[:, :T]


def largest_scores(
    query: Array, key: Array, *, mask: Mask | None, score: Score | None, scale: float
) -> Array:
    """The largest score of each row, (B, T, N) float32; -inf where it may attend to nothing."""
    B, T, N, _ = query.shape
    S = key.shape[1]
    if B * T * S * N == 0:
        wide = jnp.promote_types(query.dtype, jnp.float32)
        return jnp.full((B, T, N), -jnp.inf, wide)
    size = choose_blocks(mask, (B, N, T, S))
    plan = _Plan((B, N, T, S), size, scale, 0.0)
    value = jnp.zeros((*key.shape[:3], 1), key.dtype)
    query, key, value, mask, score = _filled(query, key, value, mask, score, plan)
    *_, top, _ = _forward(query, key, value, mask, score, None, plan)[1]
    return top[:, :T, :, 0]


def choose_blocks(
    mask: Mask | None, shape: tuple[int, int, int, int]
) -> tuple[int, int]:
    """Queries and keys in a block, by a model of the time that the blocks looked at would take.

    Of a mask that is traced, all blocks are taken to be looked at.

    Args:
        mask: of the attention.
        shape: (B, N, T, S).
    """

    def cost(limits: tuple[int, int]) -> float:
        size = even_block(shape[2], limits[0]), even_block(shape[3], limits[1])
        grid = Blocks(shape, size)
        some = np.ones((1, 1, 1, 1), bool)
        if mask is not None and not jax.tree.leaves(mask):
            some = mask.blocks(grid)[0]
        share = np.broadcast_to(some, (*some.shape[:2], *grid.count)).mean()
        return share * math.prod(grid.count) * math.prod(size) * LIMITS[limits]

    best = min(LIMITS, key=cost)
    return even_block(shape[2], best[0]), even_block(shape[3], best[1])


def even_block(length: int, limit: int) -> int:
    """A block of at most `limit`: a multiple of 8, and the last one is not mostly filled up."""
    count = -(-length // limit)
    return -(-length // (8 * count)) * 8


def _filled(query, key, value, mask: Mask | None, score: Score | None, plan: _Plan):
    """The arguments filled up to whole blocks, with a mask that rules out what fills up the keys."""
    grid = plan.grid
    T, S = (count * size for count, size in zip(grid.count, plan.size))
    mask = None if mask is None else mask.fill(grid)
    if S > plan.shape[3]:
        inside = masks.prefix(plan.shape[3])
        mask = inside if mask is None else mask & inside
    score = None if score is None else score.fill(grid)

    def fill(x: Array, length: int) -> Array:
        return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)))

    return fill(query, T), fill(key, S), fill(value, S), mask, score


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(query, key, value, mask, score, seed, plan: _Plan):
    return _forward(query, key, value, mask, score, seed, plan)[0]


def _forward(query, key, value, mask, score, seed, plan: _Plan):
    B, T, N, _ = query.shape
    G, E = N // key.shape[2], value.shape[3]
    size, width = plan.size
    count = plan.grid.count[0]
    wide = jnp.promote_types(query.dtype, jnp.float32)
    lists = _lists(mask, plan, query, key, value)

    def block_of_queries(written, at):
        b, h, i = at // (N * count), at // count % N, at % count
        q = _read(query, b, h, i, size) * plan.early(query.dtype)

        def visit(kind):
            def step(place, carry):
                top, total, acc, bad = carry
                j, tile = _place(lists, plan, b, h, i, place)
                k, v = _read_keys(key, value, b, h // G, j, width, place)
                good = _finite_rows(k) if kind == "guarded" else None
                k = _finite(k) if kind == "guarded" else k
                s = jnp.einsum("TH,SH->TS", q, k, preferred_element_type=wide)
                s, allowed, _ = _scores(
                    s * plan.late(q.dtype), good, kind, mask, score, tile, plan, _as_is
                )
                if kind == "guarded":
                    bad = bad | jnp.any(allowed & ~_finite_rows(v), axis=1)
                    v = _finite(v)
                new_top = jnp.maximum(top, s.max(axis=1))
                safe = jnp.where(new_top == -jnp.inf, 0.0, new_top)
                p = jnp.exp(s - safe[:, None])
                shrink = jnp.exp(top - safe)
                total = total * shrink + p.sum(axis=1)
                p = _dropped(p, _kept(seed, tile, plan), plan).astype(v.dtype)
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
        total = jnp.where(total == 0.0, 1.0, total)
        out = jnp.where(bad[:, None], jnp.nan, acc / total[:, None])
        rows = (_write(x, b, h, i, y) for x, y in zip(written, (out, top, total)))
        return tuple(rows), None

    written = (
        jnp.zeros((B, T, N, E), query.dtype),
        *2 * (jnp.zeros((B, T, N, 1), wide),),
    )
    (out, top, total), _ = jax.lax.scan(
        block_of_queries, written, jnp.arange(B * N * count, dtype=jnp.int32)
    )
    # Apart, for where scores are of hundreds their sum loses what the weights need.
    saved = (query, key, value, mask, score, seed, out, top, total)
    return (out, (jnp.log(total) + top)[..., 0]), saved


def _backward(plan: _Plan, saved, cotangents):
    query, key, value, mask, score, seed, out, top, total = saved
    d_out, d_logsumexp = cotangents
    B, _, N, _ = query.shape
    G = N // key.shape[2]
    size, width = plan.size
    count = plan.grid.count[0]
    wide = top.dtype
    lists = _lists(mask, plan, query, key, value, d_out, d_logsumexp)
    # A value that is not finite makes whole rows NaN: constants, which have no gradient.
    constant = jnp.isnan(out).all(-1) & ~jnp.isnan(total[..., 0]) & (mask is not None)
    lowered = jnp.sum(d_out.astype(wide) * out.astype(wide), axis=-1)
    lowered = jnp.where(constant, 0.0, lowered) - d_logsumexp
    top, total = jnp.where(top == -jnp.inf, 0.0, top), 1.0 / total

    def block_of_queries(carry, at):
        d_query, *carry = carry
        b, h, i = at // (N * count), at // count % N, at % count
        q, d_o = (_read(x, b, h, i, size) for x in (query, d_out))
        low, most, share, zero = (
            _read(x, b, h, i, size).T
            for x in (lowered[..., None], top, total, constant[..., None])
        )
        q = q * plan.early(q.dtype)
        d_o = jnp.where(zero.T, 0, d_o).astype(d_o.dtype)

        def visit(kind):
            def step(place, carry):
                d_q, d_key, d_value, slopes = carry
                j, tile = _place(lists, plan, b, h, i, place)
                k, v = _read_keys(key, value, b, h // G, j, width, place)
                good = _finite_rows(k).T if kind == "guarded" else None
                if kind == "guarded":
                    k, v = _finite(k), _finite(v)
                # Keys by queries: so all but one of the products read along rows.
                s = product("SH,TH->ST", k, q) * plan.late(q.dtype)
                s, allowed, pull = _scores(
                    s, good, kind, mask, score, tile, plan, jnp.transpose
                )
                p = jnp.exp(s - most) * share
                if kind == "guarded":
                    p = jnp.where(allowed, p, 0.0)
                kept = _kept(seed, tile, plan, jnp.transpose)
                d_p = _dropped(product("SE,TE->ST", v, d_o), kept, plan)
                d_s = p * (d_p - low)
                if kind == "guarded":
                    d_s = jnp.where(allowed, d_s, 0.0)
                d_s, d_score = pull(d_s)
                if slopes is not None:
                    slopes = slopes.add(d_score, tile)
                d_s = (d_s * plan.late(q.dtype)).astype(q.dtype)
                p = _dropped(p, kept, plan).astype(d_o.dtype)
                d_q = d_q + product("SH,ST->HT", k, d_s)
                d_key = _add(d_key, b, h // G, j, product("ST,TH->SH", d_s, q))
                d_value = _add(d_value, b, h // G, j, product("ST,TE->SE", p, d_o))
                return d_q, d_key, d_value, slopes

            return step

        d_q = jnp.zeros(q.shape[::-1], wide)
        d_q, *carry = _walk(lists, plan, b, h, i, visit, (d_q, *carry))
        d_q = d_q.T * plan.early(q.dtype)
        return (_write(d_query, b, h, i, d_q), *carry), None

    product = functools.partial(jnp.einsum, preferred_element_type=wide)
    sums = (jnp.zeros(x.shape, wide) for x in (key, value))
    carry: Any = (jnp.zeros_like(query), *sums, _zero_slopes(score))
    (d_query, d_key, d_value, slopes), _ = jax.lax.scan(
        block_of_queries, carry, jnp.arange(B * N * count, dtype=jnp.int32)
    )
    d_score = None if score is None else jax.tree.map(_cotangent, slopes, score)
    d_key, d_value = d_key.astype(key.dtype), d_value.astype(value.dtype)
    return d_query, d_key, d_value, None, d_score, None


_attend.defvjp(_forward, _backward)


def _scores(s, good, kind: Kind, mask, score, tile: Tile, plan: _Plan, turn):
    """A block's scores, what the mask admits, and the pull-back through the rule.

    Args:
        s: (T, S), scaled, or (S, T) where `turn` transposes; of the same form are all results.
        good: whether each key is finite, broadcasts to s; None: the block is not guarded.
    """
    if good is not None:
        s = jnp.where(good, s, jnp.nan)
    back = None
    if score is not None:
        cut = score.tile(tile)

        def bend(s, rule):
            return turn(rule.within(turn(s)[None, None], tile)[0, 0]).astype(s.dtype)

        s, back = jax.vjp(bend, s, cut)

    def pull(d):
        if back is None:
            return d, None
        d_s, d_rule = back(d)
        d_s = d_s if good is None else jnp.where(good, d_s, 0.0)
        return d_s, jax.tree.map(_dense, d_rule, cut)

    if kind == "full":
        return s, None, pull
    allowed = mask.tile(tile)
    if kind == "guarded":
        # A row that only fills up a block could see a NaN, and hand it on to keys' gradients.
        allowed = allowed & (tile.index[2] < plan.shape[2])
    allowed = jnp.broadcast_to(turn(allowed[0, 0]), s.shape)
    return jnp.where(allowed, s, -jnp.inf), allowed, pull


def _as_is(x: Array) -> Array:
    return x


def _read(x: Array, b, h, i, size: int) -> Array:
    """Block i of a row and a head of (B, T, N, H): (size, H)."""
    part = (1, size, 1, x.shape[3])
    return jax.lax.dynamic_slice(x, (b, i * size, h, jnp.int32(0)), part)[0, :, 0]


def _read_keys(key: Array, value: Array, b, h, j, size: int, place):
    """Block j of keys and of values."""
    k, v = (_read(x, b, h, j, size) for x in (key, value))
    if key.shape[1] == size:
        # A lone block does not depend on the loop: XLA would work on it even in those not run.
        k, v, _ = jax.lax.optimization_barrier((k, v, place))
    return k, v


def _write(x: Array, b, h, i, block: Array) -> Array:
    """`x` with that block replaced; a block of one axis stands for one of size 1."""
    block = block.reshape(1, block.shape[0], 1, -1).astype(x.dtype)
    return jax.lax.dynamic_update_slice(
        x, block, (b, i * block.shape[1], h, jnp.int32(0))
    )


def _add(x: Array, b, h, i, block: Array) -> Array:
    return _write(x, b, h, i, _read(x, b, h, i, block.shape[0]) + block)


class _Lists(NamedTuple):
    """The blocks of keys that each block of queries looks at: full, then masked, then guarded.

    Attributes:
        order: (B or 1, N or 1, blocks of queries, blocks of keys) int32.
        ends: of the three kinds, (B or 1, N or 1, blocks of queries) int32 each.
    """

    order: Any
    ends: tuple[Any, Any, Any]


def _lists(mask: Mask | None, plan: _Plan, *arrays: Array) -> _Lists | None:
    """None: there is no mask, every block is full.

    With a NaN or inf in any of the arrays, all blocks are guarded: only there is it kept from the
    rows that may not see it, and shown whole to those that may.
    """
    if mask is None:
        return None
    grid = plan.grid
    some, every = mask.blocks(grid)
    known = isinstance(some, np.ndarray) and isinstance(every, np.ndarray)
    xp = np if known else jnp
    shape = np.broadcast_shapes(some.shape, every.shape, (1, 1, *grid.count))
    rank = xp.broadcast_to(xp.where(every, 0, xp.where(some, 1, 2)), shape)
    order = xp.argsort(rank, axis=-1, stable=True).astype(np.int32)
    full, some = ((rank < end).sum(-1).astype(np.int32) for end in (1, 2))
    clean = functools.reduce(jnp.logical_and, map(_all_finite, arrays))
    ends = jnp.where(clean, full, 0), jnp.where(clean, some, 0), jnp.asarray(some)
    return _Lists(jnp.asarray(order), ends)


def _walk(lists: _Lists | None, plan: _Plan, b, h, i, visit, carry):
    """Runs visit(kind)(place, carry) over a block of queries' list."""
    if lists is None:
        return jax.lax.fori_loop(0, plan.grid.count[1], visit("full"), carry)
    begin: Any = 0
    for kind, ends in zip(get_args(Kind), lists.ends):
        end = _of_head(ends, b, h)[i]
        carry = jax.lax.fori_loop(begin, end, visit(kind), carry)
        begin = end
    return carry


def _of_head(array: Array, b, h) -> Array:
    return array[b if array.shape[0] > 1 else 0, h if array.shape[1] > 1 else 0]


def _place(lists: _Lists | None, plan: _Plan, b, h, i, place):
    """Which block of keys stands at a place of a list, and its tile."""
    if lists is not None:
        place = _of_head(lists.order, b, h)[i, place]
    j = jnp.asarray(place, jnp.int32)
    return j, Tile((b, h, i * plan.size[0], j * plan.size[1]), plan.size)


def _kept(seed: Array | None, tile: Tile, plan: _Plan, turn=_as_is) -> Array | None:
    """(T, S), turned: which weights of a block dropout leaves; None: there is no dropout."""
    if seed is None:
        return None
    return turn(keep_by_seed(seed, plan.rate, *tile.index)[0, 0])


def _dropped(p: Array, kept: Array | None, plan: _Plan) -> Array:
    return p if kept is None else jnp.where(kept, p / (1.0 - plan.rate), 0.0)


def _finite(x: Array) -> Array:
    return jnp.where(jnp.isfinite(x), x, jnp.zeros((), x.dtype))


def _all_finite(x: Array) -> Array:
    return jnp.all(jnp.isfinite(x))


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
