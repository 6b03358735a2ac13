"""Who may attend: masks as frozen pytrees of index rules, closed under `&`, `|` and `~`.

A mask answers for any broadcastable arrays of indices `(b, h, q, k)`: batch row, query head,
query position, key position. Indices are global, so a rule means the same in a block, in a
shard and in the whole. Arrays that a rule needs are fields of the mask, hence arguments of
whatever is traced with it, never closures.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Rule = Callable[..., Array]
# Of each block: whether any pair may be admitted, and whether all are; bool arrays that broadcast
# to (B, N, blocks of queries, blocks of keys), of numpy where they are known at trace time.
BlockStates = tuple[Any, Any]


class Blocks:
    """The grid of blocks that (B, N, T, S) is cut into.

    Attributes:
        shape: (B, N, T, S), T and S before they are filled up to whole blocks.
        size: (queries, keys) in a block.
        count: blocks along T and S; more than hold them where devices get equal numbers of blocks.
        b, h: row and head indices, (B, 1, 1, 1) and (1, N, 1, 1).
        q, k: first query and key of each block, (1, 1, count, 1) and (1, 1, 1, count).
        q_last, k_last: the last ones.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        size: tuple[int, int],
        count: tuple[int, int] | None = None,
    ):
        B, N, T, S = self.shape = shape
        self.size = size
        self.count = count or (-(-T // size[0]), -(-S // size[1]))
        self.b = np.arange(B, dtype=np.int32).reshape(-1, 1, 1, 1)
        self.h = np.arange(N, dtype=np.int32).reshape(1, -1, 1, 1)
        self.q = (np.arange(self.count[0], dtype=np.int32) * size[0])[
            None, None, :, None
        ]
        self.k = (np.arange(self.count[1], dtype=np.int32) * size[1])[None, None, None]
        self.q_last, self.k_last = self.q + (size[0] - 1), self.k + (size[1] - 1)


class Tile:
    """One block of one head: where it starts, and the indices of its pairs.

    Attributes:
        start: (b, h, q, k) int32 scalars, of the block's first pair.
        size: (queries, keys).
        index: b, h, q, k as arrays that broadcast to (1, 1, queries, keys).
    """

    def __init__(self, start: tuple[Array, Array, Array, Array], size: tuple[int, int]):
        self.start, self.size = tuple(jnp.asarray(x, jnp.int32) for x in start), size
        b, h, q, k = (x.reshape(1, 1, 1, 1) for x in self.start)
        rows = jax.lax.broadcasted_iota(jnp.int32, (1, 1, size[0], 1), 2)
        columns = jax.lax.broadcasted_iota(jnp.int32, (1, 1, 1, size[1]), 3)
        self.index = b, h, q + rows, k + columns

    def cut(self, array: Array) -> Array:
        """The block's part of an array whose axes are 1 or those of the filled-up (B, N, T, S)."""
        sizes = (
            1 if have == 1 else size
            for have, size in zip(array.shape, (1, 1, *self.size))
        )
        return jax.lax.dynamic_slice(array, self._corner(array), tuple(sizes))

    def paste(self, array: Array, part: Array) -> Array:
        """`array` with the block's part, see `cut`, replaced."""
        return jax.lax.dynamic_update_slice(array, part, self._corner(array))

    def _corner(self, array: Array) -> list[Array]:
        zero = jnp.zeros((), jnp.int32)
        return [zero if n == 1 else at for n, at in zip(array.shape, self.start)]


@dataclass(frozen=True, kw_only=True)
class Mask:
    """A rule that admits query-key pairs. Make one with the functions of this module."""

    def allowed(self, b: Array, h: Array, q: Array, k: Array) -> Array:
        """Whether query `q` of head `h` in row `b` may attend to key `k`; bool, broadcast."""
        raise NotImplementedError

    def materialise(self, shape: tuple[int, int, int, int]) -> Array:
        """The mask over all of (B, N, T, S), in the smallest bool array that broadcasts to it."""
        return self.allowed(*index_arrays(shape))

    def blocks(self, grid: Blocks) -> BlockStates:
        """What the rule says of whole blocks; a block in doubt may have some, and not all."""
        return np.ones((1, 1, 1, 1), bool), np.zeros((1, 1, 1, 1), bool)

    def tile(self, tile: Tile) -> Array:
        """The rule within a block, bool that broadcasts to (1, 1, queries, keys)."""
        return self.allowed(*tile.index)

    def fill(self, grid: Blocks) -> "Mask":
        """The same mask, its arrays checked against the grid and filled up to whole blocks."""
        return self

    def __and__(self, other: "Mask") -> "Mask":
        return And(left=self, right=other)

    def __or__(self, other: "Mask") -> "Mask":
        return Or(left=self, right=other)

    def __invert__(self) -> "Mask":
        return Not(mask=self)


def index_arrays(shape: tuple[int, ...]) -> tuple[Array, Array, Array, Array]:
    """The indices b, h, q, k of a (B, N, T, S) grid as int32 arrays that broadcast to it."""
    return tuple(  # type: ignore[return-value]
        jnp.arange(size, dtype=jnp.int32).reshape(
            [-1 if i == axis else 1 for i in range(4)]
        )
        for axis, size in enumerate(shape)
    )


@dataclass(frozen=True, kw_only=True)
class Joined(Mask):
    """Two masks, asked alike, their answers joined by `join`."""

    left: Mask
    right: Mask

    @staticmethod
    def join(one: Any, other: Any) -> Any:
        raise NotImplementedError

    def allowed(self, b, h, q, k):
        return self.join(self.left.allowed(b, h, q, k), self.right.allowed(b, h, q, k))

    def materialise(self, shape):
        return self.join(self.left.materialise(shape), self.right.materialise(shape))

    def tile(self, tile):
        return self.join(self.left.tile(tile), self.right.tile(tile))

    def fill(self, grid):
        return type(self)(left=self.left.fill(grid), right=self.right.fill(grid))

    def blocks(self, grid):
        pairs = zip(self.left.blocks(grid), self.right.blocks(grid))
        return tuple(self.join(left, right) for left, right in pairs)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class And(Joined):
    @staticmethod
    def join(one, other):
        return one & other


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Or(Joined):
    @staticmethod
    def join(one, other):
        return one | other


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Not(Mask):
    mask: Mask

    def allowed(self, b, h, q, k):
        return ~self.mask.allowed(b, h, q, k)

    def materialise(self, shape):
        return ~self.mask.materialise(shape)

    def tile(self, tile):
        return ~self.mask.tile(tile)

    def fill(self, grid):
        return Not(mask=self.mask.fill(grid))

    def blocks(self, grid):
        some, every = self.mask.blocks(grid)
        return ~every, ~some


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Causal(Mask):
    offset: int = field(default=0, metadata={"static": True})

    def allowed(self, b, h, q, k):
        return k <= q + self.offset

    def blocks(self, grid):
        some = grid.k <= grid.q_last + self.offset
        return some, grid.k_last <= grid.q + self.offset


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Window(Mask):
    left: int = field(metadata={"static": True})
    right: int = field(metadata={"static": True})

    def allowed(self, b, h, q, k):
        return (k >= q - self.left) & (k <= q + self.right)

    def blocks(self, grid):
        some = grid.k_last >= grid.q - self.left
        every = grid.k >= grid.q_last - self.left
        some = some & (grid.k <= grid.q_last + self.right)
        return some, every & (grid.k_last <= grid.q + self.right)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Prefix(Mask):
    length: int = field(metadata={"static": True})

    def allowed(self, b, h, q, k):
        return k < self.length

    def blocks(self, grid):
        return grid.k < self.length, grid.k_last < self.length


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Lengths(Mask):
    query: Array | None
    key: Array | None

    def allowed(self, b, h, q, k):
        inside = jnp.ones((1, 1, 1, 1), bool)
        if self.query is not None:
            inside = inside & (q < self.query[b])
        if self.key is not None:
            inside = inside & (k < self.key[b])
        return inside

    def materialise(self, shape):
        for name, array in (("query", self.query), ("key", self.key)):
            if array is not None:
                _expect("lengths", f"{name} (B,)", array.shape, shape[:1])
        # Without looking a row up, which would gather the lengths of a batch that is split.
        _, _, q, k = index_arrays(shape)
        inside = jnp.ones((1, 1, 1, 1), bool)
        if self.query is not None:
            inside = inside & (q < self.query.reshape(-1, 1, 1, 1))
        if self.key is not None:
            inside = inside & (k < self.key.reshape(-1, 1, 1, 1))
        return inside

    def fill(self, grid):
        for name, array in (("query", self.query), ("key", self.key)):
            if array is not None:
                _expect("lengths", f"{name} (B,)", array.shape, grid.shape[:1])
        return self

    def blocks(self, grid):
        some = every = np.ones((1, 1, 1, 1), bool)
        if self.query is not None:
            length = self.query.reshape(-1, 1, 1, 1)
            some, every = some & (grid.q < length), every & (grid.q_last < length)
        if self.key is not None:
            length = self.key.reshape(-1, 1, 1, 1)
            some, every = some & (grid.k < length), every & (grid.k_last < length)
        return some, every


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Segments(Mask):
    query: Array
    key: Array

    def allowed(self, b, h, q, k):
        return self.query[b, q] == self.key[b, k]

    def materialise(self, shape):
        _expect("segments", "query (B, T)", self.query.shape, (shape[0], shape[2]))
        _expect("segments", "key (B, S)", self.key.shape, (shape[0], shape[3]))
        return self.query[:, None, :, None] == self.key[:, None, None, :]

    def fill(self, grid):
        B, _, T, S = grid.shape
        _expect("segments", "query (B, T)", self.query.shape, (B, T))
        _expect("segments", "key (B, S)", self.key.shape, (B, S))
        return self

    def blocks(self, grid):
        # By the least and the largest number in a block: exact where numbers never decrease.
        low_q, high_q = _extremes(self.query, grid.size[0], grid.count[0])
        low_k, high_k = _extremes(self.key, grid.size[1], grid.count[1])
        low_q, high_q = low_q[:, None, :, None], high_q[:, None, :, None]
        low_k, high_k = low_k[:, None, None], high_k[:, None, None]
        some = (low_q <= high_k) & (low_k <= high_q)
        return some, (low_q == high_k) & (low_k == high_q) & (low_q == high_q)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Dense(Mask):
    array: Array

    def allowed(self, b, h, q, k):
        at = (
            index if size > 1 else 0
            for index, size in zip((b, h, q, k), self.array.shape)
        )
        return self.array[tuple(at)]

    def materialise(self, shape):
        if any(have not in (1, want) for have, want in zip(self.array.shape, shape)):
            raise ValueError(
                f"mask must broadcast to (B, N, T, S) = {shape}; got {self.array.shape}."
            )
        return self.array

    def fill(self, grid):
        self.materialise(grid.shape)
        return Dense(array=filled(self.array, grid))

    def tile(self, tile):
        return tile.cut(self.array)

    def blocks(self, grid):
        # The array is filled up already; what fills it admits nothing, and is asked for nothing.
        B, N, T, S = self.array.shape
        size_q = 1 if T == 1 else grid.size[0]
        size_k = 1 if S == 1 else grid.size[1]
        cut = self.array.reshape(B, N, T // size_q, size_q, S // size_k, size_k)
        return cut.any((3, 5)), cut.all((3, 5))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Predicate(Mask):
    arrays: tuple[Array, ...]
    fn: Rule = field(metadata={"static": True})

    def allowed(self, b, h, q, k):
        return self.fn(b, h, q, k, *self.arrays)


def causal(offset: int = 0) -> Mask:
    """Admits `k <= q + offset`, for T != S too: offset S - T aligns the last query and key."""
    return Causal(offset=int(offset))


def window(left: int, right: int) -> Mask:
    """Admits `q - left <= k <= q + right`."""
    return Window(left=int(left), right=int(right))


def prefix(length: int | Array) -> Mask:
    """Admits the first `length` keys: an int for all rows, or int (B,)."""
    if isinstance(length, (int, np.integer)):
        return Prefix(length=int(length))
    return lengths(key=length)


def lengths(query: Array | None = None, key: Array | None = None) -> Mask:
    """Admits the first `query[b]` queries and `key[b]` keys of row b; each int (B,) or None."""
    for name, array in (("query", query), ("key", key)):
        if array is not None and jnp.ndim(array) != 1:
            raise ValueError(
                f"lengths: {name} must be (B,); got shape {jnp.shape(array)}."
            )
    return Lengths(query=_optional(query), key=_optional(key))


def segments(query: Array, key: Array | None = None) -> Mask:
    """Admits pairs of one segment: query (B, T) and key (B, S) int ids; key defaults to query."""
    key = query if key is None else key
    for name, array in (("query", query), ("key", key)):
        if jnp.ndim(array) != 2:
            raise ValueError(
                f"segments: {name} must be (B, length); got shape {jnp.shape(array)}."
            )
    return Segments(query=jnp.asarray(query), key=jnp.asarray(key))


def dense(array: Array) -> Mask:
    """Admits where `array`, bool that broadcasts to (B, N, T, S) with all four axes, is True."""
    array = jnp.asarray(array)
    if array.dtype != jnp.bool_:
        raise TypeError(f"mask must be bool, True may attend; got {array.dtype}.")
    if array.ndim != 4:
        raise ValueError(
            f"mask must broadcast to (B, N, T, S) with four axes; got {array.shape}. "
            "Add head and query axes: mask[:, None, None, :]."
        )
    return Dense(array=array)


def predicate(fn: Rule, *arrays: Array) -> Mask:
    """Admits where `fn(b, h, q, k, *arrays)` is True.

    Args:
        fn: gets int32 index arrays that broadcast together and the whole captured arrays;
            returns bool. Two masks of one function object share a compiled program.
        arrays: what the rule looks up; pass them here, not by closure.
    """
    return Predicate(arrays=tuple(map(jnp.asarray, arrays)), fn=fn)


def as_mask(mask: "Mask | Array | None") -> Mask | None:
    """A Mask from what `dot_product_attention` accepts: a Mask, a bool array, or None."""
    return mask if mask is None or isinstance(mask, Mask) else dense(mask)


def _optional(array: Array | None) -> Array | None:
    return None if array is None else jnp.asarray(array)


def _expect(owner: str, name: str, got: tuple[int, ...], want: tuple[int, ...]) -> None:
    if got != want:
        raise ValueError(f"{owner}: {name} must have shape {want}; got {got}.")


def filled(array: Array, grid: Blocks) -> Array:
    """`array` with its last two axes, where they are not 1, filled up to whole blocks."""
    missing = [
        0 if have == 1 else count * size - have
        for have, count, size in zip(array.shape[2:], grid.count, grid.size)
    ]
    if not any(missing):
        return array
    return jnp.pad(array, ((0, 0), (0, 0), (0, missing[0]), (0, missing[1])))


def _extremes(ids: Array, size: int, count: int) -> tuple[Array, Array]:
    """The least and the largest number in each block of (B, length): (B, count) each."""
    missing = count * size - ids.shape[1]
    ids = jnp.pad(ids, ((0, 0), (0, missing)), mode="edge")
    ids = ids.reshape(ids.shape[0], -1, size)
    return ids.min(2), ids.max(2)
