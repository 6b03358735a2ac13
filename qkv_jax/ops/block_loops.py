"""The loops over blocks that every implementation without a T x S matrix is made of.

Queries and keys are cut into blocks of the whole attention's grid; the arrays at hand may be all of
it, or the part of it that a device holds. A mask says of every block whether it is empty, full or
in doubt; empty ones are never looked at, and only those in doubt pay for the mask. Both directions
are loops over lists of blocks, so memory is O(T + S), whatever the mask. Axes: see reference.py.

Source: online softmax, Milakov and Gimelshein 2018, arXiv 1805.02867; its reverse rule, Dao et al.
2022, arXiv 2205.14135; skipping by a mask's structure, Dong et al. 2024, arXiv 2412.05496.
"""

import functools
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from qkv_jax.ops.axes import vary
from qkv_jax.ops.dropout import keep_by_seed
from qkv_jax.ops.masks import Tile
from qkv_jax.ops.parts import (
    Inputs,
    Part,
    Plan,
    Rows,
    Softmax,
    all_finite,
    dense_slope,
    zero_slopes,
)
from qkv_jax.ops.reference import finite

Array = jax.Array
# What a block needs: nothing; the mask; the mask, and care for what is not finite.
Kind = Literal["full", "masked", "guarded"]


def forward_blocks(inputs: Inputs, plan: Plan, ranks: Any, dtype: Any) -> Softmax:
    """Attention over the keys at hand, its `out` in dtype.

    Args:
        inputs: see there.
        plan: see there.
        ranks: what the mask says of the blocks at hand, see `block_ranks`.
        dtype: of `out`.
    """
    query, key, value, mask, score, seed, part = inputs
    B, T, N, _ = query.shape
    G, E = N // key.shape[2], value.shape[3]
    size, width = plan.size
    count = T // size
    wide = jnp.promote_types(query.dtype, jnp.float32)
    lists = _lists(ranks, query, key, value)
    zeros = functools.partial(vary, like=inputs)

    def block_of_queries(written, at):
        b, h, i = at // (N * count), at // count % N, at % count
        q = _read(query, b, h, i, size) * plan.early(query.dtype)

        def visit(kind):
            def step(place, carry):
                top, total, acc, bad = carry
                j, tile = _place(lists, plan, part, b, h, i, place)
                k, v = _read_keys(key, value, b, h // G, j, width, place)
                good = _finite_rows(k) if kind == "guarded" else None
                k = finite(k) if kind == "guarded" else k
                s = jnp.einsum("TH,SH->TS", q, k, preferred_element_type=wide)
                s, allowed, _ = _scores(
                    s * plan.late(q.dtype), good, kind, mask, score, tile, plan, _as_is
                )
                if kind == "guarded":
                    bad = bad | jnp.any(allowed & ~_finite_rows(v), axis=1)
                    v = finite(v)
                new_top = jnp.maximum(top, jax.lax.stop_gradient(s).max(axis=1))
                safe = jnp.where(new_top == -jnp.inf, 0.0, new_top)
                p = jnp.exp(s - safe[:, None])
                shrink = jnp.exp(top - safe)
                total = total * shrink + p.sum(axis=1)
                p = _dropped(p, _kept(seed, tile, plan), plan).astype(v.dtype)
                new = jnp.einsum("TS,SE->TE", p, v, preferred_element_type=wide)
                return new_top, total, acc * shrink[:, None] + new, bad

            return step

        carry = zeros(
            (
                jnp.full(size, -jnp.inf, wide),
                jnp.zeros(size, wide),
                jnp.zeros((size, E), wide),
                jnp.zeros(size, bool),
            )
        )
        top, total, acc, bad = _walk(lists, key, width, b, h, i, visit, carry)
        total = jnp.where(total == 0.0, 1.0, total)
        out = jnp.where(bad[:, None], jnp.nan, acc / total[:, None])
        new = Softmax(out, top, total)
        return Softmax(*(_write(x, b, h, i, y) for x, y in zip(written, new))), None

    lines = (jnp.zeros((B, T, N, 1), wide) for _ in range(2))
    written = zeros(Softmax(jnp.zeros((B, T, N, E), dtype), *lines))
    return jax.lax.scan(
        block_of_queries, written, jnp.arange(B * N * count, dtype=jnp.int32)
    )[0]


def backward_blocks(inputs: Inputs, rows: Rows, plan: Plan, ranks: Any, dtype: Any):
    """The slopes of query, in dtype; of key, value and the rule's arrays, float32 at least.

    The gradient of what the keys at hand contribute. Arguments as for `forward_blocks`.
    """
    query, key, value, mask, score, seed, part = inputs
    B, T, N, _ = query.shape
    G = N // key.shape[2]
    size, width = plan.size
    count = T // size
    wide = rows.top.dtype
    lists = _lists(ranks, query, key, value, clean=rows.clean)
    zeros = functools.partial(vary, like=(inputs, rows))

    def block_of_queries(carry, at):
        d_query, *carry = carry
        b, h, i = at // (N * count), at // count % N, at % count
        q, d_o = (_read(x, b, h, i, size) for x in (query, rows.d_out))
        low, most, share, zero = (_read(x, b, h, i, size).T for x in rows[1:5])
        q = q * plan.early(q.dtype)
        d_o = jnp.where(zero.T, 0, d_o).astype(d_o.dtype)

        def visit(kind):
            def step(place, carry):
                d_q, d_key, d_value, slopes = carry
                j, tile = _place(lists, plan, part, b, h, i, place)
                k, v = _read_keys(key, value, b, h // G, j, width, place)
                good = _finite_rows(k).T if kind == "guarded" else None
                if kind == "guarded":
                    k, v = finite(k), finite(v)
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

        d_q = zeros(jnp.zeros(q.shape[::-1], wide))
        d_q, *carry = _walk(lists, key, width, b, h, i, visit, (d_q, *carry))
        d_q = d_q.T * plan.early(q.dtype)
        return (_write(d_query, b, h, i, d_q), *carry), None

    product = functools.partial(jnp.einsum, preferred_element_type=wide)
    sums = (jnp.zeros(x.shape, wide) for x in (key, value))
    carry: Any = (jnp.zeros(query.shape, dtype), *sums, zero_slopes(score))
    return jax.lax.scan(
        block_of_queries, zeros(carry), jnp.arange(B * N * count, dtype=jnp.int32)
    )[0]


def _scores(s, good, kind: Kind, mask, score, tile: Tile, plan: Plan, turn):
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
        return d_s, jax.tree.map(dense_slope, d_rule, cut)

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


def block_ranks(inputs: Inputs, plan: Plan) -> Any:
    """What the mask says of the blocks of the queries at hand and of all keys.

    Returns:
        0 full, 1 in doubt, 2 empty; (B or 1, N or 1, blocks, blocks), of numpy if they are known,
        else int32. None: there is no mask, all are full.
    """
    mask, part = inputs.mask, inputs.part
    if mask is None:
        return None
    grid = plan.grid
    some, every = mask.blocks(grid)
    known = isinstance(some, np.ndarray) and isinstance(every, np.ndarray)
    xp = np if known else jnp
    shape = np.broadcast_shapes(some.shape, every.shape, (1, 1, *grid.count))
    ranks = xp.where(every, 0, xp.where(some, 1, 2)).astype(np.int32)
    ranks = xp.broadcast_to(ranks, shape)
    if all(x is None for x in part):
        return ranks
    ranks = jnp.asarray(ranks)
    if part.row is not None and ranks.shape[0] > 1:
        ranks = jax.lax.dynamic_slice_in_dim(ranks, part.row, inputs.query.shape[0], 0)
    if part.head is not None and ranks.shape[1] > 1:
        ranks = jax.lax.dynamic_slice_in_dim(ranks, part.head, inputs.query.shape[2], 1)
    return ranks if part.queries is None else ranks[:, :, part.queries]


def _lists(ranks: Any, *arrays: Array, clean: Any = True) -> _Lists | None:
    """The lists of blocks by their ranks; None: every block is full.

    With a NaN or inf in any of the arrays, all blocks are guarded: only there is it kept from the
    rows that may not see it, and shown whole to those that may.
    """
    if ranks is None:
        return None
    xp = np if isinstance(ranks, np.ndarray) else jnp
    order = xp.argsort(ranks, axis=-1, stable=True).astype(np.int32)
    full, some = ((ranks < end).sum(-1).astype(np.int32) for end in (1, 2))
    clean = functools.reduce(jnp.logical_and, map(all_finite, arrays), clean)
    ends = jnp.where(clean, full, 0), jnp.where(clean, some, 0), jnp.asarray(some)
    return _Lists(jnp.asarray(order), ends)


def _walk(lists: _Lists | None, key: Array, width: int, b, h, i, visit, carry):
    """Runs visit(kind)(place, carry) over a block of queries' list."""
    if lists is None:
        return jax.lax.fori_loop(0, key.shape[1] // width, visit("full"), carry)
    begin: Any = vary(jnp.zeros((), jnp.int32), like=lists)
    for kind, ends in zip(get_args(Kind), lists.ends):
        end = vary(_of_head(ends, b, h)[i], like=lists)
        carry = jax.lax.fori_loop(begin, end, visit(kind), carry)
        begin = end
    return carry


def _of_head(array: Array, b, h) -> Array:
    return array[b if array.shape[0] > 1 else 0, h if array.shape[1] > 1 else 0]


def _place(lists: _Lists | None, plan: Plan, part: Part, b, h, i, place):
    """Which of the blocks of keys at hand stands at a place of a list, and its tile."""
    if lists is not None:
        place = _of_head(lists.order, b, h)[i, place]
    j = jnp.asarray(place, jnp.int32)
    row = b if part.row is None else b + part.row
    head = h if part.head is None else h + part.head
    q = i if part.queries is None else part.queries[i]
    k = j if part.keys is None else part.keys[j]
    return j, Tile((row, head, q * plan.size[0], k * plan.size[1]), plan.size)


def _kept(seed: Array | None, tile: Tile, plan: Plan, turn=_as_is) -> Array | None:
    """(T, S), turned: which weights of a block dropout leaves; None: there is no dropout."""
    if seed is None:
        return None
    return turn(keep_by_seed(seed, plan.rate, *tile.index)[0, 0])


def _dropped(p: Array, kept: Array | None, plan: Plan) -> Array:
    return p if kept is None else jnp.where(kept, p / (1.0 - plan.rate), 0.0)


def _finite_rows(x: Array) -> Array:
    """(S, size) -> (1, S): whether all components are finite."""
    return jnp.all(jnp.isfinite(x), axis=1)[None]
