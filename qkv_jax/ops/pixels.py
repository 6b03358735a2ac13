"""Images pixel by pixel: their patches, and random changes that need no interpolation.

For small images, which `images.augment` would blur. Images are (B, height, width, C), floating. Each
image of a batch is changed by a draw of its own.
"""

import jax
import jax.numpy as jnp

Array = jax.Array


def patches(images: Array, size: int) -> Array:
    """Cuts images (B, height, width, C) into squares: (B, rows, columns, size * size * C).

    Raises:
        ValueError: size does not divide height and width.

    Source: Dosovitskiy et al. 2021, arXiv 2010.11929, section 3.1.
    """
    B, height, width, C = images.shape
    if height % size or width % size:
        raise ValueError(
            f"patches of {size} must divide height and width; got {height} x {width}."
        )
    x = images.reshape(B, height // size, size, width // size, size, C)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(
        B, height // size, width // size, size * size * C
    )


def random_flip(images: Array, rng: Array) -> Array:
    """Swaps left and right in half of the images."""
    turned = jax.random.bernoulli(rng, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(turned, images[:, :, ::-1], images)


def random_shift(images: Array, limit: int, rng: Array) -> Array:
    """Moves each image by up to `limit` pixels, down or up and left or right; zeros move in."""
    B, height, width, C = images.shape
    edge = (limit, limit)
    wide = jnp.pad(images, ((0, 0), edge, edge, (0, 0)))
    start = jax.random.randint(rng, (B, 2), 0, 2 * limit + 1)

    def cut(image: Array, at: Array) -> Array:
        return jax.lax.dynamic_slice(image, (at[0], at[1], 0), (height, width, C))

    return jax.vmap(cut)(wide, start)


def random_erase(images: Array, size: int, rng: Array) -> Array:
    """Zeroes a square of `size` pixels a side around any pixel; it may stand over the edge.

    Source: cutout, DeVries and Taylor 2017, arXiv 1708.04552, section 3.2.
    """
    B, height, width, _ = images.shape
    start = jax.random.randint(
        rng, (2, B, 1, 1, 1), 0, jnp.array([height, width]).reshape(2, 1, 1, 1, 1)
    )
    row, column = start - size // 2
    rows = jnp.arange(height).reshape(1, height, 1, 1)
    columns = jnp.arange(width).reshape(1, 1, width, 1)
    inside = (rows >= row) & (rows < row + size)
    inside = inside & (columns >= column) & (columns < column + size)
    return jnp.where(inside, 0.0, images)
