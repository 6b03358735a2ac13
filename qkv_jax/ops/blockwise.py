"""Attention without the T x S matrix, in plain XLA, skipping the blocks that the mask rules out.

The loops are those of block_loops.py. Axes: see reference.py.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkv_jax.ops import masks
from qkv_jax.ops.axes import vary
from qkv_jax.ops.block_loops import backward_blocks, block_ranks, forward_blocks
from qkv_jax.ops.derivatives import differentiable
from qkv_jax.ops.masks import Blocks, Mask
from qkv_jax.ops.part_dense import backward_dense, forward_dense
from qkv_jax.ops.parts import (
    WHOLE,
    Inputs,
    Part,
    Plan,
    Rows,
    Softmax,
    cotangents,
    filled_up,
    rows_of,
)
from qkv_jax.ops.scores import Score

Array = jax.Array
# Nanoseconds a query-key pair costs in blocks of at most so many queries and keys, forward and
# backward, float32, H = 64, on 2 cores (`python -m benchmarks.attention --sweep-blocks`): XLA has
# the cores share products that are large.
LIMITS = {(128, 128): 13.0, (512, 256): 9.6, (512, 512): 8.5}


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
        Differentiable twice, in both modes; see derivatives.py.
    """
    B, T, N, _ = query.shape
    S, _, E = value.shape[1:]
    if B * T * S * N == 0:
        wide = jnp.promote_types(query.dtype, jnp.float32)
        return jnp.zeros((B, T, N, E), query.dtype), jnp.full((B, T, N), -jnp.inf, wide)
    size = block_size or choose_blocks(mask, (B, N, T, S))
    plan = Plan((B, N, T, S), size, scale, dropout_rate)
    seed = seed_of(dropout_rate, dropout_rng)
    out, logsumexp = attend(filled(query, key, value, mask, score, seed, plan), plan)
    return out[:, :T], logsumexp[:, :T]


def largest_scores(
    query: Array, key: Array, *, mask: Mask | None, score: Score | None, scale: float
) -> Array:
    """The largest score of each row, (B, T, N) float32; -inf where it may attend to nothing."""
    B, T, N, _ = query.shape
    S = key.shape[1]
    wide = jnp.promote_types(query.dtype, jnp.float32)
    if B * T * S * N == 0:
        return jnp.full((B, T, N), -jnp.inf, wide)
    plan = Plan((B, N, T, S), choose_blocks(mask, (B, N, T, S)), scale, 0.0)
    value = jnp.zeros((*key.shape[:3], 1), key.dtype)
    inputs = filled(query, key, value, mask, score, None, plan)
    return forward_blocks(inputs, plan, block_ranks(inputs, plan), wide).top[
        :, :T, :, 0
    ]


def choose_blocks(
    mask: Mask | None, shape: tuple[int, int, int, int]
) -> tuple[int, int]:
    """Queries and keys in a block, see `choose_limits`."""
    limits = choose_limits(mask, shape)
    return even_block(shape[2], limits[0]), even_block(shape[3], limits[1])


def choose_limits(
    mask: Mask | None, shape: tuple[int, int, int, int]
) -> tuple[int, int]:
    """The most queries and keys in a block, by a model of the time that those looked at would take.

    Of a mask that is traced, all blocks are taken to be looked at; of several joined by `&`, those
    that any of the known ones rules out are not.

    Args:
        mask: of the attention.
        shape: (B, N, T, S).
    """

    def cost(limits: tuple[int, int]) -> float:
        size = even_block(shape[2], limits[0]), even_block(shape[3], limits[1])
        grid = Blocks(shape, size)
        some = _not_known_empty(mask, grid)
        share = np.broadcast_to(some, (*some.shape[:2], *grid.count)).mean()
        return share * math.prod(grid.count) * math.prod(size) * LIMITS[limits]

    return min(LIMITS, key=cost)


def _not_known_empty(mask: Mask | None, grid: Blocks) -> np.ndarray:
    """The blocks that what is known of a mask at trace time does not rule out."""
    if isinstance(mask, masks.And):
        return _not_known_empty(mask.left, grid) & _not_known_empty(mask.right, grid)
    if mask is None or jax.tree.leaves(mask):
        return np.ones((1, 1, 1, 1), bool)
    return mask.blocks(grid)[0]


def even_block(length: int, limit: int) -> int:
    """A block of at most `limit`: a multiple of 8, and the last one is not mostly filled up."""
    count = -(-length // limit)
    return -(-length // (8 * count)) * 8


def seed_of(dropout_rate: float, dropout_rng: Array | None) -> Array | None:
    """() uint32, what dropout's pattern is made from; None: no dropout."""
    if dropout_rate == 0.0 or dropout_rng is None:
        return None
    return jax.random.bits(dropout_rng, (), jnp.uint32)


def filled(
    query: Array,
    key: Array,
    value: Array,
    mask: Mask | None,
    score: Score | None,
    seed: Array | None,
    plan: Plan,
    part: Part = WHOLE,
) -> Inputs:
    """The inputs filled up to whole blocks, with a mask that rules out what fills up the keys."""
    grid = plan.grid
    mask = None if mask is None else mask.fill(grid)
    if grid.count[1] * plan.size[1] > plan.shape[3]:
        inside = masks.prefix(plan.shape[3])
        mask = inside if mask is None else mask & inside
    score = None if score is None else score.fill(grid)

    query, key, value = (
        filled_up(x, -(-x.shape[1] // size) * size)
        for x, size in zip((query, key, value), (*plan.size, plan.size[1]))
    )
    inputs = Inputs(query, key, value, mask, score, seed, part)
    return vary(inputs, like=inputs)


def look(inputs: Inputs, plan: Plan, ranks: Any, dtype: Any) -> Softmax:
    """Attention over the keys at hand as the plan says; see `forward_blocks`."""
    if plan.dense:
        return forward_dense(inputs, plan, dtype)
    return forward_blocks(inputs, plan, ranks, dtype)


def look_back(inputs: Inputs, rows: Rows, plan: Plan, ranks: Any, dtype: Any) -> Any:
    """The slopes of its inputs; see `backward_blocks`."""
    if plan.dense:
        return backward_dense(inputs, rows, plan, dtype)
    return backward_blocks(inputs, rows, plan, ranks, dtype)


def _there(inputs: Inputs, plan: Plan) -> Softmax:
    """Attention over the keys at hand and its log-sum-exp, for inputs that are filled up."""
    return look(inputs, plan, block_ranks(inputs, plan), inputs.query.dtype)


def _back(inputs: Inputs, found: Softmax, slopes: Any, plan: Plan) -> list[Array]:
    rows = rows_of(found, slopes, inputs.mask is not None)
    ranks = block_ranks(inputs, plan)
    return cotangents(inputs, *look_back(inputs, rows, plan, ranks, inputs.query.dtype))


attend = differentiable(_there, _back)
