"""What is done with a score before the softmax: rules as frozen pytrees, composed in order.

A score rule maps the scaled score of a query-key pair and its global indices to another score.
Captured arrays are arguments, so that gradients reach them.
"""

import functools
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkv_jax.ops.masks import Blocks, Mask, Tile, filled, index_arrays

Array = jax.Array


@dataclass(frozen=True, kw_only=True)
class Score:
    """A rule on scores. Make one with the functions of this module."""

    def apply(self, score: Array, b: Array, h: Array, q: Array, k: Array) -> Array:
        """The new score; `score` and the index arrays broadcast together."""
        raise NotImplementedError

    def support(self) -> Mask | None:
        """The pairs that the rule leaves any weight to, for whole blocks to be skipped; None: all."""
        return None

    def over(self, scores: Array) -> Array:
        """The rule applied to all of the scores, (B, N, T, S)."""
        return self.apply(scores, *index_arrays(scores.shape))

    def fill(self, grid: Blocks) -> "Score":
        """The same rule, its arrays checked against the grid and filled up to whole blocks."""
        return self

    def tile(self, tile: Tile) -> "Score":
        """The rule with just what it needs within a block, to be given to `within`."""
        return self

    def within(self, scores: Array, tile: Tile) -> Array:
        """The rule, cut by `tile`, applied to a block's scores, (1, 1, queries, keys)."""
        return self.apply(scores, *tile.index)

    def add(self, slopes: "Score", tile: Tile) -> "Score":
        """Of gradients as rules: these plus `slopes` of a rule that `tile` cut."""
        return jax.tree.map(jnp.add, self, slopes)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Modifier(Score):
    arrays: tuple[Array, ...]
    fn: Callable[..., Array] = field(metadata={"static": True})

    def apply(self, score, b, h, q, k):
        # A numpy array within a compiled function cannot be indexed by what is traced.
        return self.fn(score, b, h, q, k, *map(jnp.asarray, self.arrays))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SoftCap(Score):
    value: Array

    def apply(self, score, b, h, q, k):
        value = jnp.asarray(self.value).astype(score.dtype)
        if value.ndim:
            value = value[h]
        return value * jnp.tanh(score / value)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Bias(Score):
    array: Array

    def apply(self, score, b, h, q, k):
        at = (
            index if size > 1 else 0
            for index, size in zip((b, h, q, k), self.array.shape)
        )
        return score + self.array[tuple(at)].astype(score.dtype)

    def over(self, scores):
        if any(
            have not in (1, want) for have, want in zip(self.array.shape, scores.shape)
        ):
            raise ValueError(
                f"bias must broadcast to (B, N, T, S) = {scores.shape}; got {self.array.shape}."
            )
        return scores + self.array.astype(scores.dtype)

    def fill(self, grid):
        jax.eval_shape(self.over, jax.ShapeDtypeStruct(grid.shape, self.array.dtype))
        return Bias(array=filled(self.array, grid))

    def tile(self, tile):
        return Bias(array=tile.cut(self.array))

    def within(self, scores, tile):
        return scores + self.array.astype(scores.dtype)

    def add(self, slopes, tile):
        total = tile.cut(self.array) + slopes.array
        return Bias(array=tile.paste(self.array, total))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class RelativeBias(Score):
    table: Array
    bidirectional: bool = field(metadata={"static": True})
    max_distance: int = field(metadata={"static": True})

    def apply(self, score, b, h, q, k):
        return score + self._of(k - q, h).astype(score.dtype)

    def over(self, scores):
        _, N, T, S = scores.shape
        h = jnp.arange(N, dtype=jnp.int32)[:, None]
        return scores + self._diagonals(h, 0, (T, S)).astype(scores.dtype)[None]

    def within(self, scores, tile):
        _, h, q, k = tile.start
        bias = self._diagonals(h.reshape(1, 1), k - q, tile.size)
        return scores + bias.astype(scores.dtype)[None]

    def _of(self, distance: Array, h: Array) -> Array:
        buckets = self.table.shape[0]
        at = relative_buckets(distance, buckets, self.bidirectional, self.max_distance)
        return self.table[at, h]

    def _diagonals(self, h: Array, corner, size: tuple[int, int]) -> Array:
        """The bias (N, queries, keys), one number a diagonal, whose corner pair is `corner` apart.

        By repeating and reshaping: no look-up a pair, and in reverse sums and no scatter.
        """
        rows, columns = size
        reach = jnp.arange(1 - rows, columns + 1, dtype=jnp.int32) + corner
        line = self._of(reach[None], h)  # (N, rows + columns); the last one is not used
        turns = jnp.broadcast_to(line[:, None], (len(line), rows, rows + columns))
        skewed = turns.reshape(len(line), -1)[:, : rows * (rows + columns - 1)]
        return skewed.reshape(len(line), rows, -1)[:, :, rows - 1 :]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class AdaptiveSpan(Score):
    spans: Array
    ramp: float = field(metadata={"static": True})

    def apply(self, score, b, h, q, k):
        spans = self.spans[h] if self.spans.ndim else self.spans
        left = (spans - jnp.abs(q - k).astype(spans.dtype)) / self.ramp + 1.0
        share = jnp.clip(jnp.where(left > 0.0, left, 1.0), None, 1.0)
        faded = score + jnp.log(share).astype(score.dtype)
        return jnp.where(left > 0.0, faded, -jnp.inf)

    def support(self):
        return Reach(limit=jax.lax.stop_gradient(self.spans) + self.ramp)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Reach(Mask):
    """Admits pairs less than `limit`, () or (N,), apart."""

    limit: Array

    def allowed(self, b, h, q, k):
        limit = self.limit[h] if self.limit.ndim else self.limit
        return jnp.abs(q - k) < limit

    def blocks(self, grid):
        limit = self.limit.reshape(1, -1, 1, 1)
        ahead, behind = grid.k - grid.q_last, grid.q - grid.k_last
        nearest = np.maximum(np.maximum(ahead, behind), 0)
        furthest = np.maximum(grid.k_last - grid.q, grid.q_last - grid.k)
        return nearest < limit, furthest < limit


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Chain(Score):
    rules: tuple[Score, ...]

    def apply(self, score, b, h, q, k):
        for rule in self.rules:
            score = rule.apply(score, b, h, q, k)
        return score

    def support(self):
        return _all(rule.support() for rule in self.rules)

    def over(self, scores):
        for rule in self.rules:
            scores = rule.over(scores)
        return scores

    def fill(self, grid):
        return Chain(rules=tuple(rule.fill(grid) for rule in self.rules))

    def tile(self, tile):
        return Chain(rules=tuple(rule.tile(tile) for rule in self.rules))

    def within(self, scores, tile):
        for rule in self.rules:
            scores = rule.within(scores, tile)
        return scores

    def add(self, slopes, tile):
        pairs = zip(self.rules, slopes.rules)
        return Chain(rules=tuple(mine.add(new, tile) for mine, new in pairs))


def modifier(fn: Callable[..., Array], *arrays: Any) -> Score:
    """The rule `fn(score, b, h, q, k, *arrays) -> score`; arrays are differentiable arguments."""
    return Modifier(arrays=tuple(map(jnp.asarray, arrays)), fn=fn)


def chain(*rules: Score) -> Score:
    """The rules one after another, the first applied first."""
    return Chain(rules=rules)


def soft_cap(value: float | Array) -> Score:
    """`value * tanh(score / value)`: scores stay within +-value (Gemma 2, arXiv 2408.00118).

    Args:
        value: a positive number, or () or (N,) floating, one a query head, differentiable.
    """
    if jnp.ndim(value) > 1:
        raise ValueError(f"value must be () or (N,); got shape {jnp.shape(value)}.")
    if isinstance(value, (int, float)):
        # Of numpy, so that within a compiled function it is still known.
        known: Any = np.asarray(value, jax.dtypes.canonicalize_dtype(float))
        return SoftCap(value=known)
    return SoftCap(value=jnp.asarray(value))


def bias(array: Array) -> Score:
    """Adds `array`, floating, with four axes that broadcast to (B, N, T, S)."""
    if jnp.ndim(array) != 4:
        raise ValueError(
            f"bias must broadcast to (B, N, T, S) with four axes; got {jnp.shape(array)}."
        )
    return Bias(array=jnp.asarray(array))


def alibi(slopes: Array) -> Score:
    """`score - slopes[h] * |q - k|`: attention with linear biases.

    Args:
        slopes: (N,) floating, one a query head, differentiable; see `alibi_slopes`.

    Source: Press et al. 2022, arXiv 2108.12409. Difference: symmetric where keys come after the
    query; with a causal mask, the same.
    """
    if jnp.ndim(slopes) != 1:
        raise ValueError(f"slopes must be (N,); got shape {jnp.shape(slopes)}.")
    return modifier(_alibi, slopes)


def alibi_slopes(heads: int) -> Array:
    """The paper's slopes, (N,) float32: a geometric series from 2 ** (-8 / N) to 2 ** -8.

    For a number of heads that is no power of two: those of the next smaller one, then every other
    slope of the next larger one, as in the authors' code.
    """
    if heads < 1:
        raise ValueError(f"heads must be at least 1; got {heads}.")
    whole = 2 ** (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (i + 1) / whole) for i in range(whole)]
    between = [2.0 ** (-4.0 * (i + 1) / whole) for i in range(0, 2 * whole, 2)]
    return jnp.asarray(slopes + between[: heads - whole], jnp.float32)


def relative_bias(
    table: Array, bidirectional: bool = True, max_distance: int = 128
) -> Score:
    """Adds `table[bucket(k - q), h]`: T5's learned bias of relative positions.

    Args:
        table: (buckets, N) floating, differentiable.
        bidirectional: True: half of the buckets are for keys after the query (encoders); False:
            those all share the bucket of distance 0 (decoders, under a causal mask).
        max_distance: from here on, all distances share the last bucket.

    Source: Raffel et al. 2020, arXiv 1910.10683, section 2.1; buckets as in their code.
    """
    if jnp.ndim(table) != 2:
        raise ValueError(f"table must be (buckets, N); got shape {jnp.shape(table)}.")
    exact = jnp.shape(table)[0] // (4 if bidirectional else 2)
    if exact < 1 or max_distance <= exact:
        raise ValueError(
            f"relative_bias needs at least {4 if bidirectional else 2} buckets, and max_distance "
            f"over the {exact} distances that have buckets of their own; got "
            f"{jnp.shape(table)[0]} buckets and max_distance = {max_distance}."
        )
    return RelativeBias(
        table=jnp.asarray(table),
        bidirectional=bool(bidirectional),
        max_distance=int(max_distance),
    )


def relative_buckets(
    distance: Array, buckets: int, bidirectional: bool = True, max_distance: int = 128
) -> Array:
    """T5's bucket, int32 of 0 .. buckets - 1, of distances k - q: small ones exact, then log-spaced."""
    later = jnp.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        later = jnp.where(distance > 0, buckets, 0)
        back = jnp.abs(distance)
    else:
        back = jnp.maximum(-distance, 0)
    exact = buckets // 2
    # Where a logarithm would be rounded to the wrong side, a table is exact.
    steps = np.arange(exact, max_distance + 1)
    spaced = np.log(steps / exact) / np.log(max_distance / exact) * (buckets - exact)
    coarse = jnp.asarray(np.minimum(exact + spaced.astype(np.int32), buckets - 1))
    far = coarse[jnp.clip(back, exact, max_distance) - exact].astype(distance.dtype)
    return (later + jnp.where(back < exact, back, far)).astype(jnp.int32)


def adaptive_span(spans: Array, ramp: float = 32.0) -> Score:
    """Multiplies weights by `clip((ramp + spans[h] - |q - k|) / ramp, 0, 1)`, before they are
    normalised: each head learns how far it looks.

    Pairs at spans[h] + ramp or further apart get nothing, and blocks of them are skipped.

    Args:
        spans: () or (N,) floating, in positions, differentiable; keep them at 0 or more.
        ramp: width in positions over which weights fade out, positive.

    Source: Sukhbaatar et al. 2019, arXiv 1905.07799, eq. 2 to 4. Difference: the distance is
    |q - k|; with a causal mask, the same.
    """
    if jnp.ndim(spans) > 1:
        raise ValueError(f"spans must be () or (N,); got shape {jnp.shape(spans)}.")
    if not ramp > 0:
        raise ValueError(f"ramp must be positive; got {ramp}.")
    return AdaptiveSpan(spans=jnp.asarray(spans), ramp=float(ramp))


def supported(mask: Mask | None, score: Score | None) -> Mask | None:
    """The mask, and what the score rule leaves any weight to."""
    return _all((mask, None if score is None else score.support()))


def _all(masks: Iterable[Mask | None]) -> Mask | None:
    known = [mask for mask in masks if mask is not None]
    return functools.reduce(operator.and_, known) if known else None


def _alibi(score, b, h, q, k, slopes):
    return score - slopes[h].astype(score.dtype) * jnp.abs(q - k).astype(score.dtype)
