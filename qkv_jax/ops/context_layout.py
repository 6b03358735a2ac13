"""Where sequences lie whose length is shared out: chunks, their blocks, and which a device holds."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qkv_jax.ops import blockwise

Array = jax.Array


def held(device: Any, each: int, devices: int, halves: int) -> Array:
    """Which of the whole's blocks a device holds, (halves * each,) int32."""
    parts = [device, 2 * devices - 1 - device][:halves]
    blocks = jnp.arange(each, dtype=jnp.int32)
    return jnp.concatenate([part * each + blocks for part in parts])


def zigzag(x: Array, *, axis: str, devices: int, back: bool = False) -> Array:
    """Chunks 2i and 2i + 1 of the length on device i -> chunks i and 2n - 1 - i; or back."""
    # Device i's two chunks go each to one device, and no two of a kind to the same.
    owner = [min(c, 2 * devices - 1 - c) for c in range(2 * devices)]
    roads = [[(i, owner[2 * i + odd]) for i in range(devices)] for odd in (0, 1)]
    even = jax.lax.axis_index(axis) % 2 == 0

    def swap(halves):
        """Of chunks i and 2n - 1 - i, the even one was a first half."""
        one, other = halves
        return jnp.where(even, one, other), jnp.where(even, other, one)

    halves = jnp.split(x, 2, axis=1)
    if back:
        roads = [[(there, here) for here, there in road] for road in roads]
        halves = swap(halves)
    halves = [jax.lax.ppermute(x, axis, road) for x, road in zip(halves, roads)]
    return jnp.concatenate(halves if back else swap(halves), axis=1)


def chunk(length: int, parts: int, limit: int) -> int:
    """The length of each of so many equal parts, which even blocks of at most `limit` fill."""
    part = -(-length // parts)
    if part <= limit:
        return part
    size = blockwise.even_block(part, limit)
    return -(-part // size) * size


def cut(chunks: Sequence[int], limits: tuple[int, int]) -> tuple[Any, Any]:
    """The size of blocks that chunks of queries and of keys divide into, and how many there are.

    The largest of at most `limits`.
    """
    size = tuple(
        next(n for n in range(min(length, limit), 0, -1) if length % n == 0)
        for length, limit in zip(chunks, limits)
    )
    return size, tuple(length // n for length, n in zip(chunks, size))


def halves(method: str) -> int:
    """Chunks of the length that a device holds."""
    return 2 if method == "zigzag" else 1
