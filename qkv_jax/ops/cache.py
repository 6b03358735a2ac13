"""The key/value cache of decoding, as frozen pytrees.

Beams share one cache. At step t the Z live hypotheses of a row append their Z keys side by side
(slot t * Z + z), and nothing moves afterwards: what changes when a beam is reordered is a table
of ancestors, (B, Z, steps) small integers, and the mask read from it. So a reorder costs
O(B Z steps) bytes, not a copy of every layer's keys and values.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import lax

from qkv_jax.ops.masks import Mask, dense

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys (B, S, K, H) and values (B, S, K, E) of one layer; slots not yet written are zero."""

    key: Array
    value: Array

    @classmethod
    def zeros(cls, batch: int, length: int, heads: int, size: int, dtype) -> "KVCache":
        empty = jnp.zeros((batch, length, heads, size), dtype)
        return cls(key=empty, value=empty)

    def write(self, key: Array, value: Array, at: Array) -> "KVCache":
        """A cache with `key` (B, Z, K, H) and `value` (B, Z, K, E) in slots at .. at + Z - 1."""
        return KVCache(
            key=lax.dynamic_update_slice_in_dim(
                self.key, key.astype(self.key.dtype), at, 1
            ),
            value=lax.dynamic_update_slice_in_dim(
                self.value, value.astype(self.value.dtype), at, 1
            ),
        )


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
