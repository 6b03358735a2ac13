"""Positions: those of packed rows, and the sinusoids of Vaswani et al. 2017."""

import jax
import jax.numpy as jnp

Array = jax.Array


def sinusoids(
    positions: Array, width: int, *, max_wavelength: float = 10_000.0
) -> Array:
    """Sinusoidal encodings of integer or real positions.

    Args:
        positions: any shape.
        width: D, even.
        max_wavelength: the longest period is this times 2 pi positions.

    Returns:
        positions.shape + (D,), float32: the first D/2 components are sines, the others cosines,
        of wavelengths in a geometric series from 2 pi.

    Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.5. Difference: sines and cosines
    stand in two halves and not interleaved, as in tensor2tensor and Marian.
    """
    if width < 2 or width % 2:
        raise ValueError(f"width must be even and at least 2; got {width}.")
    steps = jnp.arange(width // 2, dtype=jnp.float32) / (width // 2)
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
