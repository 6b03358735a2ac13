"""Who may attend: masks as frozen pytrees of index rules, closed under `&`, `|` and `~`.

A mask answers for any broadcastable arrays of indices `(b, h, q, k)`: batch row, query head,
query position, key position. Indices are global, so a rule means the same in a block, in a
shard and in the whole. Arrays that a rule needs are fields of the mask, hence arguments of
whatever is traced with it, never closures.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

Array = jax.Array
Rule = Callable[..., Array]


@dataclass(frozen=True, kw_only=True)
class Mask:
    """A rule that admits query-key pairs. Make one with the functions of this module."""

    def allowed(self, b: Array, h: Array, q: Array, k: Array) -> Array:
        """Whether query `q` of head `h` in row `b` may attend to key `k`; bool, broadcast."""
        raise NotImplementedError

    def materialise(self, shape: tuple[int, int, int, int]) -> Array:
        """The mask over all of (B, N, T, S), in the smallest bool array that broadcasts to it."""
        return self.allowed(*index_arrays(shape))

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


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class And(Mask):
    left: Mask
    right: Mask

    def allowed(self, b, h, q, k):
        return self.left.allowed(b, h, q, k) & self.right.allowed(b, h, q, k)

    def materialise(self, shape):
        return self.left.materialise(shape) & self.right.materialise(shape)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Or(Mask):
    left: Mask
    right: Mask

    def allowed(self, b, h, q, k):
        return self.left.allowed(b, h, q, k) | self.right.allowed(b, h, q, k)

    def materialise(self, shape):
        return self.left.materialise(shape) | self.right.materialise(shape)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Not(Mask):
    mask: Mask

    def allowed(self, b, h, q, k):
        return ~self.mask.allowed(b, h, q, k)

    def materialise(self, shape):
        return ~self.mask.materialise(shape)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Causal(Mask):
    offset: int = field(default=0, metadata={"static": True})

    def allowed(self, b, h, q, k):
        return k <= q + self.offset


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
        return super().materialise(shape)


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
