"""Key/value caches for decoding in which rows differ in length: full, sliding, int8 and paged.

Each is a frozen pytree with the same three methods, and `cached_attention` works with any of them:

    append(key, value, counts=None) -> cache    the next T positions of every row
    read() -> (key, value)                      (B, S, K, H) and (B, S, K, E), by slot
    positions                                   (B, S) int32: what stands in a slot; -1: nothing

Masks and scores keep meaning global positions, wherever a cache has put a key. Shapes do not change
as rows grow, hence nothing is compiled again. What does not fit is dropped, and `overflowed` says
of which rows; nothing that stands in the cache is overwritten by it.

The cache of beam search, which shares prompts and reorders, is in cache.py.
"""

from dataclasses import dataclass, field, replace
from typing import Protocol

import jax
import jax.numpy as jnp

from qkv_jax.ops.attention import dot_product_attention
from qkv_jax.ops.cache import to_int8
from qkv_jax.ops.masks import Mask, as_mask
from qkv_jax.ops.scores import Score

Array = jax.Array


class Cache(Protocol):
    """What `cached_attention` needs; `start` (B,): the position of the last append's first key."""

    @property
    def start(self) -> Array: ...
    @property
    def positions(self) -> Array: ...
    @property
    def reach(self) -> tuple[int, int] | None: ...
    def read(self) -> tuple[Array, Array]: ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SlotCache:
    """A cache of fixed slots a row. Make one with `full_cache`, `sliding_cache` or `int8_cache`.

    Attributes:
        key, value: (B, S, K, H) and (B, S, K, E), as stored.
        scales: what int8 keys and values are multiplied by, (B, S, K, 1) float32 each, or None.
        positions: (B, S) int32.
        start: (B,) int32, the position of the last append's first key.
        lengths: (B,) int32, how many positions each row has had.
        overflowed: (B,) bool.
        reach: (window, sinks) of a sliding cache, or None.
    """

    key: Array
    value: Array
    scales: tuple[Array, Array] | None
    positions: Array
    start: Array
    lengths: Array
    overflowed: Array
    reach: tuple[int, int] | None = field(metadata={"static": True})

    def append(
        self, key: Array, value: Array, counts: Array | None = None
    ) -> "SlotCache":
        """The cache with the next T positions of every row.

        Args:
            key: (B, T, K, H); value: (B, T, K, E).
            counts: (B,) int, how many of the T are real (prompts of several lengths); None: all.
        """
        _expect_like("key", key, self.key)
        _expect_like("value", value, self.value)
        T, slots = key.shape[1], self.key.shape[1]
        places, real = _places(self.lengths, T, counts)
        if self.reach is None:
            at = jnp.where(real, places, slots)
        else:
            window, sinks = self.reach
            ring = slots - sinks
            if T > ring - window + 1:
                raise ValueError(
                    f"key has {T} positions, but this sliding cache takes {ring - window + 1} at "
                    "a time: append in pieces, or make it with a larger `chunk`."
                )
            around = sinks + (places - sinks) % ring
            at = jnp.where(real, jnp.where(places < sinks, places, around), slots)
        row = jnp.arange(key.shape[0], dtype=jnp.int32)[:, None]

        def write(stored: Array, new: Array) -> Array:
            return stored.at[row, at].set(new.astype(stored.dtype), mode="drop")

        scales = self.scales
        if scales is not None:
            key, key_scale = to_int8(key, 3)
            value, value_scale = to_int8(value, 3)
            scales = write(scales[0], key_scale), write(scales[1], value_scale)
        return replace(
            self,
            key=write(self.key, key),
            value=write(self.value, value),
            scales=scales,
            positions=write(self.positions, places),
            start=self.lengths,
            lengths=self.lengths + real.sum(axis=1, dtype=jnp.int32),
            overflowed=self.overflowed | jnp.any(real & (at >= slots), axis=1),
        )

    def read(self) -> tuple[Array, Array]:
        """Keys (B, S, K, H) and values (B, S, K, E), by slot; int8 ones as float32."""
        if self.scales is None:
            return self.key, self.value
        key, value = (
            x.astype(jnp.float32) * scale
            for x, scale in zip((self.key, self.value), self.scales)
        )
        return key, value


def full_cache(
    batch: int, length: int, heads: int, key_size: int, value_size: int, dtype
) -> SlotCache:
    """An empty cache of up to `length` positions a row."""
    return _slot_cache(batch, length, heads, (key_size, value_size), dtype, None)


def sliding_cache(
    batch: int,
    window: int,
    heads: int,
    key_size: int,
    value_size: int,
    dtype,
    *,
    sinks: int = 0,
    chunk: int = 1,
) -> SlotCache:
    """A ring buffer: each query sees the last `window` positions, its own among them.

    Decoding with it equals `masks.causal() & (masks.window(window - 1, 0) | masks.prefix(sinks))`,
    at any length.

    Args:
        window: at least 1.
        sinks: first positions that are kept for ever (StreamingLLM).
        chunk: most positions that one append may bring; the ring has as many spare slots, less 1.

    Source of sinks: Xiao et al. 2023, arXiv 2309.17453.
    """
    if window < 1 or chunk < 1 or sinks < 0:
        raise ValueError(
            "window and chunk must be at least 1, and sinks at least 0; got "
            f"window = {window}, chunk = {chunk}, sinks = {sinks}."
        )
    slots = sinks + window + chunk - 1
    sizes = key_size, value_size
    return _slot_cache(batch, slots, heads, sizes, dtype, (window, sinks))


def int8_cache(
    batch: int, length: int, heads: int, key_size: int, value_size: int
) -> SlotCache:
    """A full cache of int8, with one float32 scale a position and head.

    Each number is off by at most 1 / 254 of the largest in its key or value.
    """
    cache = _slot_cache(batch, length, heads, (key_size, value_size), jnp.int8, None)
    scale = jnp.zeros((batch, length, heads, 1), jnp.float32)
    return replace(cache, scales=(scale, scale))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PagedCache:
    """Rows share a pool of pages, and hold as many as they need.

    Attributes:
        key, value: (pages, size, K, H) and (pages, size, K, E), the pool.
        table: (B, pages a row) int32, the pages of each row in order; -1: none yet.
        free: (pages,) bool.
        start, lengths, overflowed: as for SlotCache.

    Source: Kwon et al. 2023, arXiv 2309.06180 (vLLM).
    """

    key: Array
    value: Array
    table: Array
    free: Array
    start: Array
    lengths: Array
    overflowed: Array

    @property
    def reach(self) -> None:
        return None

    @property
    def positions(self) -> Array:
        count, size = self.table.shape[1], self.key.shape[1]
        place = jnp.arange(count * size, dtype=jnp.int32)[None]
        held = jnp.repeat(self.table >= 0, size, axis=1)
        return jnp.where(held & (place < self.lengths[:, None]), place, -1)

    def append(
        self, key: Array, value: Array, counts: Array | None = None
    ) -> "PagedCache":
        """The cache with the next T positions of every row; see SlotCache.append."""
        B, count = self.table.shape
        pages, size = self.key.shape[:2]
        for name, new, pool in (("key", key, self.key), ("value", value, self.value)):
            if new.ndim != 4 or (new.shape[0], *new.shape[2:]) != (B, *pool.shape[2:]):
                raise ValueError(
                    f"{name} must be (B, T, heads, size) = ({B}, T, {pool.shape[2]}, "
                    f"{pool.shape[3]}); got {new.shape}."
                )
        places, real = _places(self.lengths, key.shape[1], counts)
        lengths = self.lengths + real.sum(axis=1, dtype=jnp.int32)
        wanted = jnp.arange(count, dtype=jnp.int32)[None] * size < lengths[:, None]
        need = wanted & (self.table < 0)
        nth = jnp.cumsum(need.ravel(), dtype=jnp.int32).reshape(need.shape) - 1
        given = need & (nth < self.free.sum())
        supply = jnp.argsort(~self.free, stable=True).astype(jnp.int32)
        table = jnp.where(given, supply[jnp.clip(nth, 0, pages - 1)], self.table)
        row = jnp.arange(B, dtype=jnp.int32)[:, None]
        page = table.at[row, places // size].get(mode="fill", fill_value=-1)
        fits = real & (page >= 0)
        at = jnp.where(fits, page, pages), places % size

        def write(pool: Array, new: Array) -> Array:
            return pool.at[at].set(new.astype(pool.dtype), mode="drop")

        return replace(
            self,
            key=write(self.key, key),
            value=write(self.value, value),
            table=table,
            free=self.free.at[jnp.where(given, table, pages)].set(False, mode="drop"),
            start=self.lengths,
            lengths=lengths,
            overflowed=self.overflowed | jnp.any(real & ~fits, axis=1),
        )

    def release(self, rows: Array) -> "PagedCache":
        """Gives back the pages of `rows`, (B,) bool, which start anew."""
        pages = self.key.shape[0]
        gone = jnp.where(rows[:, None] & (self.table >= 0), self.table, pages)
        zero = jnp.zeros((), jnp.int32)
        return replace(
            self,
            table=jnp.where(rows[:, None], -1, self.table),
            free=self.free.at[gone].set(True, mode="drop"),
            start=jnp.where(rows, zero, self.start),
            lengths=jnp.where(rows, zero, self.lengths),
            overflowed=self.overflowed & ~rows,
        )

    def read(self) -> tuple[Array, Array]:
        """Keys and values gathered from the pages; O(B S) memory, S = pages a row * size."""
        B = self.table.shape[0]
        table = jnp.maximum(self.table, 0)
        key, value = (
            pool[table].reshape(B, -1, *pool.shape[2:])
            for pool in (self.key, self.value)
        )
        return key, value


def paged_cache(
    batch: int,
    pages: int,
    size: int,
    pages_a_row: int,
    heads: int,
    key_size: int,
    value_size: int,
    dtype,
) -> PagedCache:
    """An empty cache: a pool of `pages` of `size` positions, at most `pages_a_row` in a row."""
    pool = pages, size, heads
    zero = jnp.zeros(batch, jnp.int32)
    return PagedCache(
        key=jnp.zeros((*pool, key_size), dtype),
        value=jnp.zeros((*pool, value_size), dtype),
        table=jnp.full((batch, pages_a_row), -1, jnp.int32),
        free=jnp.ones(pages, bool),
        start=zero,
        lengths=zero,
        overflowed=jnp.zeros(batch, bool),
    )


def cached_attention(
    query: Array,
    cache: Cache,
    *,
    mask: Mask | Array | None = None,
    score: Score | None = None,
    scale: float | None = None,
) -> Array:
    """Causal attention of the positions that were appended last to all that the cache holds.

    Args:
        query: (B, T, N, H) floating, for the T positions of the last append.
        cache: after that append.
        mask, score: over global positions, besides causal order and the cache's own window.
        scale: default H ** -0.5.

    Returns:
        (B, T, N, E), dtype of query: what the full forward pass gives at these positions.
    """
    key, value = (x.astype(query.dtype) for x in cache.read())
    held: Mask = Held(start=cache.start, positions=cache.positions, reach=cache.reach)
    rule = as_mask(mask)
    if rule is not None:
        held = held & PlacedMask(
            start=cache.start, positions=cache.positions, inner=rule
        )
    if score is not None:
        score = PlacedScore(start=cache.start, positions=cache.positions, inner=score)
    return dot_product_attention(query, key, value, mask=held, score=score, scale=scale)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Held(Mask):
    """Admits slots that hold a position up to the query's, within the cache's reach."""

    start: Array
    positions: Array
    reach: tuple[int, int] | None = field(metadata={"static": True})

    def allowed(self, b, h, q, k):
        asks, held = self.start[b] + q, self.positions[b, k]
        inside = (held >= 0) & (held <= asks)
        if self.reach is None:
            return inside
        window, sinks = self.reach
        return inside & ((held > asks - window) | (held < sinks))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PlacedMask(Mask):
    """A mask over global positions, asked about slots."""

    start: Array
    positions: Array
    inner: Mask

    def allowed(self, b, h, q, k):
        return self.inner.allowed(b, h, self.start[b] + q, self.positions[b, k])


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PlacedScore(Score):
    """A score rule over global positions, applied to slots."""

    start: Array
    positions: Array
    inner: Score

    def apply(self, score, b, h, q, k):
        return self.inner.apply(score, b, h, self.start[b] + q, self.positions[b, k])

    def support(self):
        inner = self.inner.support()
        if inner is None:
            return None
        return PlacedMask(start=self.start, positions=self.positions, inner=inner)


def _slot_cache(batch, slots, heads, sizes, dtype, reach) -> SlotCache:
    zero = jnp.zeros(batch, jnp.int32)
    key, value = (jnp.zeros((batch, slots, heads, size), dtype) for size in sizes)
    return SlotCache(
        key=key,
        value=value,
        scales=None,
        positions=jnp.full((batch, slots), -1, jnp.int32),
        start=zero,
        lengths=zero,
        overflowed=jnp.zeros(batch, bool),
        reach=reach,
    )


def _places(lengths: Array, count: int, counts: Array | None) -> tuple[Array, Array]:
    """(B, T): the positions that an append brings, and which of them are real."""
    step = jnp.arange(count, dtype=jnp.int32)[None]
    places = lengths[:, None] + step
    if counts is None:
        return places, jnp.ones(places.shape, bool)
    return places, step < counts[:, None]


def _expect_like(name: str, new: Array, stored: Array) -> None:
    want = stored.shape[0], *stored.shape[2:]
    if new.ndim != 4 or (new.shape[0], *new.shape[2:]) != want:
        raise ValueError(
            f"{name} must be (B, T, heads, size) = ({want[0]}, T, {want[1]}, {want[2]}); "
            f"got {new.shape}."
        )
