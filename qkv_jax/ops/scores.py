"""What is done with a score before the softmax: rules as frozen pytrees, composed in order.

A score rule maps the scaled score of a query-key pair and its global indices to another score.
Captured arrays are arguments, so that gradients reach them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from qkv_jax.ops.masks import Blocks, Tile, filled, index_arrays

Array = jax.Array


@dataclass(frozen=True, kw_only=True)
class Score:
    """A rule on scores. Make one with the functions of this module."""

    def apply(self, score: Array, b: Array, h: Array, q: Array, k: Array) -> Array:
        """The new score; `score` and the index arrays broadcast together."""
        raise NotImplementedError

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
        return self.fn(score, b, h, q, k, *self.arrays)


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
class Chain(Score):
    rules: tuple[Score, ...]

    def apply(self, score, b, h, q, k):
        for rule in self.rules:
            score = rule.apply(score, b, h, q, k)
        return score

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
    """`value * tanh(score / value)`: scores stay within +-value (Gemma 2, arXiv 2408.00118)."""
    return modifier(_soft_cap, value)


def bias(array: Array) -> Score:
    """Adds `array`, floating, with four axes that broadcast to (B, N, T, S)."""
    if jnp.ndim(array) != 4:
        raise ValueError(
            f"bias must broadcast to (B, N, T, S) with four axes; got {jnp.shape(array)}."
        )
    return Bias(array=jnp.asarray(array))


def _soft_cap(score, b, h, q, k, value):
    value = value.astype(score.dtype)
    return value * jnp.tanh(score / value)
