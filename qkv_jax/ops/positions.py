"""Positions: those of packed rows, sinusoids to be added, and rotations of queries and keys."""

from typing import Literal

import jax
import jax.numpy as jnp

Array = jax.Array


def sinusoids(
    positions: Array,
    width: int,
    *,
    max_wavelength: float = 10_000.0,
    inclusive: bool = False,
) -> Array:
    """Sinusoidal encodings of integer or real positions.

    Args:
        positions: any shape.
        width: D, even.
        max_wavelength: the longest period is this times 2 pi positions.
        inclusive: whether the longest period is reached, as in tensor2tensor, or is the next in
            the series, as published.

    Returns:
        positions.shape + (D,), float32: the first D/2 components are sines, the others cosines,
        of wavelengths in a geometric series from 2 pi.

    Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.5. Difference: sines and cosines
    stand in two halves and not interleaved, as in tensor2tensor and Marian.
    """
    if width < 2 or width % 2:
        raise ValueError(f"width must be even and at least 2; got {width}.")
    intervals = max(1, width // 2 - 1) if inclusive else width // 2
    steps = jnp.arange(width // 2, dtype=jnp.float32) / intervals
    rates = jnp.exp(-jnp.log(jnp.float32(max_wavelength)) * steps)
    angles = jnp.expand_dims(jnp.asarray(positions, jnp.float32), -1) * jnp.reshape(
        rates, (1,) * jnp.ndim(positions) + (-1,)
    )
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def segment_positions(segments: Array) -> Array:
    """The position of each token within its own segment, from 0.

    Args:
        segments: (..., T) int, the same for all tokens of a run.

    Returns:
        (..., T) int32: how far each token is from the start of its run of equal numbers.
    """
    axis = jnp.ndim(segments) - 1
    index = jax.lax.broadcasted_iota(jnp.int32, segments.shape, axis)
    first = jnp.ones_like(segments[..., :1], bool)
    begins = jnp.concatenate([first, segments[..., 1:] != segments[..., :-1]], axis=-1)
    last = jax.lax.cummax(jnp.where(begins, index, 0), axis=axis)
    return index - last


def rope(
    x: Array,
    positions: Array,
    *,
    base: float = 10_000.0,
    pairs: Literal["halves", "interleaved"] = "halves",
) -> Array:
    """Rotary positions: turns queries or keys, so that their products depend on distances alone.

    Args:
        x: (B, T, N, H) floating, H even.
        positions: (T,) or (B, T), integer or real.
        base: pair i of H / 2 turns by positions * base ** (-2 i / H) radians.
        pairs: "halves": component i turns with i + H / 2 (GPT-NeoX, Llama, and their checkpoints);
            "interleaved": component 2 i with 2 i + 1 (the paper, GPT-J).

    Returns:
        x's shape and dtype; computed in float32 at least.

    Source: Su et al. 2021, arXiv 2104.09864, eq. 15 and 34.
    """
    B, T, _, H = x.shape
    if H % 2:
        raise ValueError(f"rope needs an even size H; got {H}.")
    if jnp.shape(positions) not in ((T,), (B, T)):
        raise ValueError(
            f"positions must be (T,) = {(T,)} or (B, T) = {(B, T)}; got {jnp.shape(positions)}."
        )
    if pairs not in ("halves", "interleaved"):
        raise ValueError(f"pairs must be 'halves' or 'interleaved'; got {pairs!r}.")
    wide = jnp.promote_types(x.dtype, jnp.float32)
    rates = jnp.asarray(base, wide) ** (-2.0 * jnp.arange(H // 2, dtype=wide) / H)
    places = jnp.asarray(positions, wide).reshape(-1, T, 1, 1)
    angles = places * rates[None, None, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    axis = 3 if pairs == "halves" else 4
    split = (2, H // 2) if pairs == "halves" else (H // 2, 2)
    parts = x.astype(wide).reshape(*x.shape[:3], *split)
    one, two = (jnp.squeeze(part, axis) for part in jnp.split(parts, 2, axis))
    turned = jnp.stack([one * cos - two * sin, one * sin + two * cos], axis)
    return turned.reshape(x.shape).astype(x.dtype)


def rope_2d(
    x: Array,
    rows: Array,
    columns: Array,
    *,
    base: float = 10_000.0,
    pairs: Literal["halves", "interleaved"] = "halves",
) -> Array:
    """Rotary positions of an image: the first half of H turns by rows, the other by columns.

    Args:
        x: (B, T, N, H) floating, 4 divides H.
        rows, columns: (T,) or (B, T), of each patch.
        base, pairs: as for `rope`, within each half.

    Source: axial RoPE, Heo et al. 2024, arXiv 2403.13298, section 3.2.
    """
    if x.shape[3] % 4:
        raise ValueError(f"rope_2d needs a size H that 4 divides; got {x.shape[3]}.")
    halves = zip(jnp.split(x, 2, axis=3), (rows, columns))
    return jnp.concatenate(
        [rope(half, places, base=base, pairs=pairs) for half, places in halves], axis=3
    )
