"""Attention over a part of the whole: what goes in, what comes out, and how parts are joined.

Whoever computes it, in loops over blocks (block_loops.py) or at once (part_dense.py), takes and
gives the same, on one device or on many. Axes: see reference.py.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qkv_jax.ops.masks import Blocks, Mask
from qkv_jax.ops.scores import Score

Array = jax.Array


class Plan(NamedTuple):
    """What is known at trace time.

    Attributes:
        shape: (B, N, T, S) of the whole attention.
        size: queries and keys in a block.
        scale: of the scores.
        rate: of dropout.
        blocks: of queries and of keys in the whole; None: as few as hold T and S.
        dense: whether all pairs of a part are computed at once.
    """

    shape: tuple[int, int, int, int]
    size: tuple[int, int]
    scale: float
    rate: float
    blocks: tuple[int, int] | None = None
    dense: bool = False

    @property
    def grid(self) -> Blocks:
        return Blocks(self.shape, self.size, self.blocks)

    def early(self, dtype) -> float:
        """The scale if queries can be multiplied by it without a loss, else 1."""
        return self.scale if jnp.promote_types(dtype, jnp.float32) == dtype else 1.0

    def late(self, dtype) -> float:
        """The scale if it is left to the scores, else 1."""
        return self.scale if self.early(dtype) != self.scale else 1.0


class Part(NamedTuple):
    """Where the arrays at hand stand in the whole attention.

    Attributes:
        row, head: of the first row and the first query head, () int32; None: 0.
        queries, keys: which of the whole's blocks each of theirs is, (blocks,) int32; None: all.
    """

    row: Any = None
    head: Any = None
    queries: Any = None
    keys: Any = None


WHOLE = Part()


class Inputs(NamedTuple):
    """What attention is computed from; query, key and value are filled up to whole blocks.

    Attributes:
        query, key, value: of the part at hand.
        mask, score: rules over the whole, filled up.
        seed: of dropout, () uint32; None: there is none.
        part: which part it is.
    """

    query: Array
    key: Array
    value: Array
    mask: Mask | None
    score: Score | None
    seed: Array | None
    part: Part


class Softmax(NamedTuple):
    """Attention over some of the keys, each (B, T, N, E or 1), float32 at least.

    Attributes:
        out: averaged values; NaN in rows that saw a value that is not finite.
        top: the largest score of each row; -inf where it may attend to nothing.
        total: the sum of exp(score - top); 1 where it may attend to nothing.
    """

    out: Array
    top: Array
    total: Array


def merged(one: Softmax, other: Softmax) -> Softmax:
    """Attention over both sets of keys."""
    top = jnp.maximum(one.top, other.top)
    safe = jnp.where(top == -jnp.inf, 0.0, top)
    shares = [x.total * jnp.exp(x.top - safe) for x in (one, other)]
    total = shares[0] + shares[1]
    total = jnp.where(total == 0.0, 1.0, total)
    out = (one.out * shares[0] + other.out * shares[1]) / total
    return Softmax(out, top, total)


def logsumexp(found: Softmax) -> Array:
    """(B, T, N)."""
    return (jnp.log(found.total) + found.top)[..., 0]


class Rows(NamedTuple):
    """What the way back needs of each query besides its components, (B, T, N, E or 1).

    Attributes:
        d_out: the slope of the output.
        lowered: what is taken off the slopes of a row's weights.
        top, share: the weights are exp(score - top) * share.
        constant: rows that are NaN by a value, hence constants, which have no gradient.
        clean: (), whether all that comes from above is finite.
    """

    d_out: Array
    lowered: Array
    top: Array
    share: Array
    constant: Array
    clean: Array


def rows_of(found: Softmax, slopes: tuple[Array, Array], masked: bool) -> Rows:
    """The rows of the way back, from what the way there found and the slopes of its results."""
    (out, top, total), (d_out, d_logsumexp) = found, slopes
    wide = top.dtype
    constant = jnp.isnan(out).all(-1, keepdims=True) & ~jnp.isnan(total) & masked
    lowered = jnp.sum(d_out.astype(wide) * out.astype(wide), axis=-1, keepdims=True)
    lowered = jnp.where(constant, 0.0, lowered) - d_logsumexp[..., None]
    clean = all_finite(d_out) & all_finite(d_logsumexp)
    top = jnp.where(top == -jnp.inf, 0.0, top)
    return Rows(d_out, lowered, top, 1.0 / total, constant, clean)


def zero_slopes(score: Score | None) -> Score | None:
    """Where gradients of a rule's arrays are summed: float32 at least."""

    def zeros(x):
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        dtype = jnp.promote_types(x.dtype, jnp.float32) if floating else x.dtype
        return jnp.zeros(x.shape, dtype)

    return jax.tree.map(zeros, score)


def dense_slope(slope: Array, like: Array) -> Array:
    """A gradient that can be summed; that of an integer is 0 and not of type float0."""
    return jnp.zeros_like(like) if slope.dtype == jax.dtypes.float0 else slope


def cotangents(
    inputs: Inputs, d_query: Array, d_key: Array, d_value: Array, slopes: Score | None
) -> list[Array]:
    """The slopes of query, key, value and the floating arrays of the score, in their dtypes."""
    found = jax.tree.leaves((d_query, d_key, d_value, slopes))
    arrays = jax.tree.leaves((*inputs[:3], inputs.score))
    return [
        slope.astype(array.dtype)
        for slope, array in zip(found, arrays)
        if jnp.issubdtype(array.dtype, jnp.floating)
    ]


def filled_up(x: Array, length: int) -> Array:
    """(B, T, N, H) with zeros after its T rows, up to a length."""
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)))


def all_finite(x: Array) -> Array:
    return jnp.all(jnp.isfinite(x))
