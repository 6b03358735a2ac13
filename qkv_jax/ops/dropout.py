"""Dropout whose pattern is a function of (rng, index) alone.

Each element's fate is a hash of a 32-bit seed and its own indices: the same in any block, under
any sharding and after any re-batching. It is arithmetic on an iota, so XLA can fuse it into its
consumer, and no random bits are stored.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array
# 2**32 over the golden ratio, odd: spreads neighbouring indices.
GOLDEN = np.uint32(0x9E3779B9)


def keep(rng: Array, rate: float, *indices: Array) -> Array:
    """Which elements survive: True with probability `1 - rate`, independent for each index.

    Args:
        rng: a `jax.random` key; two draws of the same key and indices are equal.
        rate: probability of a drop, in [0, 1), known to about 2**-32.
        indices: integer arrays that broadcast together, outermost first.

    Returns:
        bool, of the indices' broadcast shape.

    Source: the mixer is `lowbias32` of C. Wellons' hash prospector, folded once an axis.
    """
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"rate must be in [0, 1); got {rate}.")
    return keep_by_seed(jax.random.bits(rng, (), jnp.uint32), rate, *indices)


def keep_by_seed(state: Array, rate: float, *indices: Array) -> Array:
    """`keep` for a seed that was drawn from the key already, uint32."""
    for index in indices:
        state = _mix(state ^ (index.astype(jnp.uint32) * GOLDEN))
    return state >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))


def index_bits(seed: Array, shape: tuple[int, ...]) -> Array:
    """Random uint32 of a shape, each a hash of a uint32 seed and its own place alone."""
    place = jnp.zeros(shape, jnp.uint32)
    for size, index in zip(shape, _indices(shape)):
        place = place * jnp.uint32(size) + index
    return _mix(seed ^ (place * GOLDEN))


def dropout(x: Array, rate: float, rng: Array | None) -> Array:
    """Zeroes elements of `x` at `rate` and scales the others by `1 / (1 - rate)`.

    Args:
        x: floating, any shape.
        rate: probability of a drop, in [0, 1).
        rng: a `jax.random` key, or None: `x` comes back as it is (evaluation).

    Source: Srivastava et al. 2014 (inverted form).
    """
    if rng is None or rate == 0.0:
        return x
    return jnp.where(
        keep(rng, rate, *_indices(x.shape)), x / (1.0 - rate), jnp.zeros((), x.dtype)
    )


def split_rng(rng: Array | None, count: int) -> list[Array | None]:
    """`count` independent keys for as many dropouts; of None (no dropout), as many None."""
    return [None] * count if rng is None else list(jax.random.split(rng, count))


def _indices(shape: tuple[int, ...]) -> Iterator[Array]:
    """Indices along each axis, which broadcast to the shape."""
    for axis in range(len(shape)):
        along = tuple(n if i == axis else 1 for i, n in enumerate(shape))
        yield lax.broadcasted_iota(jnp.uint32, along, axis)


def _mix(x: Array) -> Array:
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> jnp.uint32(15))) * jnp.uint32(0x846CA68B)
    return x ^ (x >> jnp.uint32(16))
