"""The key/value cache of decoding, as frozen pytrees.

Beams share one cache. At step t the Z live hypotheses of a row append their Z keys side by side
(slot t * Z + z), and nothing moves afterwards: what changes when a beam is reordered is a table
of ancestors, (B, Z, steps) small integers, and the mask read from it. So a reorder costs
O(B Z steps) bytes, not a copy of every layer's keys and values.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jax import lax

from qkv_jax.ops.masks import Mask, dense
from qkv_jax.ops.scores import Score, supported

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys and values of one layer, in the layouts whose products with few queries are fastest.

    On a CPU a step of 32 rows and 4 hypotheses spends 0.3 ms a layer in the two products so, and
    2 ms where both have the layout of `dot_product_attention`, which have to be transposed.

    Attributes:
        key: (B, K, H, S); value: (B, K, S, E). Slots not yet written are zero.
        scales: of int8, what the key and the value of each head and slot are multiplied by,
            (B, K, 1, S) and (B, K, S, 1) float32. Each number is off by at most 1 / 254 of the
            largest in its key or value. None: key and value are floats.
    """

    key: Array
    value: Array
    scales: tuple[Array, Array] | None = None

    @classmethod
    def zeros(cls, batch: int, length: int, heads: int, size: int, dtype) -> "KVCache":
        """An empty cache of a dtype; int8: with scales."""
        key = jnp.zeros((batch, heads, size, length), dtype)
        value = jnp.zeros((batch, heads, length, size), dtype)
        if jnp.dtype(dtype) != jnp.int8:
            return cls(key=key, value=value)
        scale = jnp.zeros((batch, heads, 1, length), jnp.float32)
        return cls(key=key, value=value, scales=(scale, scale.transpose(0, 1, 3, 2)))

    @classmethod
    def of(cls, key: Array, value: Array) -> "KVCache":
        """A full cache of keys (B, S, K, H) and values (B, S, K, E)."""
        return cls(key=key.transpose(0, 2, 3, 1), value=value.transpose(0, 2, 1, 3))

    def astype(self, dtype) -> "KVCache":
        """The same keys and values, as floats of a dtype, or as int8 with scales."""
        if jnp.dtype(dtype) == jnp.int8:
            if self.scales is not None:
                return self
            key, key_scale = to_int8(self.key, 2)
            value, value_scale = to_int8(self.value, 3)
            return KVCache(key=key, value=value, scales=(key_scale, value_scale))
        key, value = self.key, self.value
        if self.scales is not None:
            key, value = (x * scale for x, scale in zip((key, value), self.scales))
        return KVCache(key=key.astype(dtype), value=value.astype(dtype))

    def rows(self) -> tuple[Array, Array]:
        """Keys (B, S, K, H) and values (B, S, K, E), as `of` takes them; of int8, as float32."""
        floats = self if self.scales is None else self.astype(jnp.float32)
        return floats.key.transpose(0, 3, 1, 2), floats.value.transpose(0, 2, 1, 3)

    def write(self, key: Array, value: Array, at: Array) -> "KVCache":
        """A cache with `key` (B, Z, K, H) and `value` (B, Z, K, E) in slots at .. at + Z - 1."""
        new = KVCache.of(key, value).astype(self.key.dtype)

        def put(stored: Array, new: Array, axis: int) -> Array:
            return lax.dynamic_update_slice_in_dim(stored, new, at, axis)

        scales = None
        if self.scales is not None and new.scales is not None:
            (key_scale, value_scale), (new_key, new_value) = self.scales, new.scales
            scales = put(key_scale, new_key, 3), put(value_scale, new_value, 2)
        return KVCache(
            key=put(self.key, new.key, 3),
            value=put(self.value, new.value, 2),
            scales=scales,
        )

    def attend(
        self,
        query: Array,
        *,
        mask: Mask | None = None,
        score: Score | None = None,
        scale: float | None = None,
        filled: Array | None = None,
    ) -> Array:
        """What `dot_product_attention` gives for a few queries, in O(T S) time and memory.

        Args:
            query: (B, T, N, H); K divides N.
            mask: who may attend, over (B, N, T, S); None: all.
            score: a rule on the scaled scores.
            scale: default H ** -0.5.
            filled: () int, the first slot from which on the mask admits none: where it is in the
                first quarter or half of the slots, the others are not read. None, or with a
                score: all are.

        Returns:
            (B, T, N, E), dtype of query; 0 for a query that may attend to nothing. Difference:
            what is not finite in the cache reaches every query of its row, masked or not.
        """
        B, T, N, H = query.shape
        slots = self.key.shape[3]
        scale = H**-0.5 if scale is None else scale
        mask = supported(mask, score)
        allowed = None if mask is None else mask.materialise((B, N, T, slots))
        if filled is None or score is not None or allowed is None:
            return self._attend(query, allowed, score, scale)
        parts = sorted({-(-slots // 4), -(-slots // 2), slots})

        def first(count: int) -> Callable[["KVCache", Array, Array], Array]:
            return lambda cache, query, allowed: cache._first(count)._attend(
                query, allowed[..., :count], None, scale
            )

        stage = sum((filled > count).astype(jnp.int32) for count in parts[:-1])
        return lax.switch(
            stage, [first(count) for count in parts], self, query, allowed
        )

    def _first(self, count: int) -> "KVCache":
        scales = self.scales
        if scales is not None:
            scales = scales[0][..., :count], scales[1][:, :, :count]
        return KVCache(
            key=self.key[..., :count], value=self.value[:, :, :count], scales=scales
        )

    def _attend(
        self, query: Array, allowed: Array | None, score: Score | None, scale: float
    ) -> Array:
        B, T, N, H = query.shape
        K, S = self.key.shape[1], self.key.shape[3]
        dtype = jnp.promote_types(query.dtype, jnp.float32)
        grouped = query.transpose(0, 2, 1, 3).reshape(B, K, N // K * T, H)
        key, value = self.key, self.value
        if self.scales is not None:
            key, value = key.astype(query.dtype), value.astype(query.dtype)
        logits = jnp.einsum(
            "BKQH,BKHS->BKQS", grouped, key, preferred_element_type=dtype
        )
        if self.scales is not None:
            # Of numbers times one scale a slot, the sum times it.
            logits = logits * self.scales[0]
        logits = logits.reshape(B, N, T, S) * jnp.asarray(scale, dtype)
        logits = logits if score is None else score.over(logits)
        if allowed is not None:
            logits = jnp.where(allowed, logits, -jnp.inf)
        top = jnp.maximum(logits.max(-1, keepdims=True), jnp.finfo(dtype).min)
        weights = jnp.exp(logits - top)
        total = jnp.maximum(weights.sum(-1, keepdims=True), jnp.finfo(dtype).tiny)
        weights = weights.reshape(B, K, N // K * T, S)
        if self.scales is not None:
            weights = weights * self.scales[1].transpose(0, 1, 3, 2)
        out = jnp.einsum(
            "BKQS,BKSE->BKQE",
            weights.astype(query.dtype),
            value,
            preferred_element_type=dtype,
        ).reshape(B, N, T, -1)
        return (out / total).astype(query.dtype).transpose(0, 2, 1, 3)


def to_int8(x: Array, axis: int) -> tuple[Array, Array]:
    """int8 along an axis of heads' components, and what the largest of them has as its unit."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=axis, keepdims=True) / 127.0
    numbers = jnp.round(x / jnp.where(scale == 0.0, 1.0, scale))
    return numbers.astype(jnp.int8), scale


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Ancestry:
    """Which slots the Z hypotheses of each row descend from.

    Attributes:
        slots: (B, Z, steps) int32; slots[b, z, t] is the place, 0 .. Z - 1, that hypothesis z's
            ancestor had at step t. Entries at and past `step` mean nothing yet.
        step: () int32, how many steps have been written.
    """

    slots: Array
    step: Array

    @classmethod
    def start(cls, batch: int, hypotheses: int, steps: int) -> "Ancestry":
        own = jnp.arange(hypotheses, dtype=jnp.int32)[None, :, None]
        return cls(
            slots=jnp.broadcast_to(own, (batch, hypotheses, steps)),
            step=jnp.zeros((), jnp.int32),
        )

    def reorder(self, parents: Array) -> "Ancestry":
        """New hypothesis z of row b goes on from old hypothesis parents[b, z]; (B, Z) int32."""
        past = jnp.take_along_axis(self.slots, parents[:, :, None], axis=1)
        steps = jnp.arange(self.slots.shape[2], dtype=jnp.int32)[None, None, :]
        return replace(self, slots=jnp.where(steps < self.step, past, self.slots))

    def advance(self) -> "Ancestry":
        return replace(self, step=self.step + 1)

    def mask(self) -> Mask:
        """For Z queries, one a hypothesis: its own ancestors' slots and its own, (B, 1, Z, S)."""
        B, Z, steps = self.slots.shape
        place = jnp.arange(Z, dtype=jnp.int32)[None, None, None, :]
        written = (jnp.arange(steps, dtype=jnp.int32) <= self.step)[None, None, :, None]
        mine = (self.slots[..., None] == place) & written
        return dense(mine.reshape(B, 1, Z, steps * Z))

    def mask_over_slots(self, mask: Mask) -> Mask:
        """A mask over positions as one over slots, for the queries of this step."""
        return SlotMask(mask=mask, step=self.step, hypotheses=self.slots.shape[1])

    def score_over_slots(self, score: Score) -> Score:
        """A score rule over positions as one over slots, for the queries of this step."""
        return SlotScore(score=score, step=self.step, hypotheses=self.slots.shape[1])


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SlotMask(Mask):
    """Of queries at `step`, and keys whose slot s was written in step s // hypotheses."""

    mask: Mask
    step: Array
    hypotheses: int = field(metadata={"static": True})

    def allowed(self, b, h, q, k):
        at = jnp.broadcast_to(self.step, jnp.shape(q))
        return self.mask.allowed(b, h, at, k // self.hypotheses)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SlotScore(Score):
    """The same of a score rule."""

    score: Score
    step: Array
    hypotheses: int = field(metadata={"static": True})

    def apply(self, score, b, h, q, k):
        at = jnp.broadcast_to(self.step, jnp.shape(q))
        return self.score.apply(score, b, h, at, k // self.hypotheses)

    def support(self):
        mask = self.score.support()
        return (
            None
            if mask is None
            else SlotMask(mask=mask, step=self.step, hypotheses=self.hypotheses)
        )
