"""Random changes of pictures, with their boxes: drawn and done where the pictures are."""

import dataclasses

import jax
import jax.numpy as jnp

from qkv_jax.ops.axes import pin
from qkv_jax.ops.boxes import area, clip

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How much pictures are changed; each is changed anew every time.

    Attributes:
        flip: which of the axes "x" and "y" are mirrored, for half of the pictures each.
        scale: the least and the largest factor of the size; for height and width alike.
        stretch: the largest factor between height and width, from 1.
        shift: the largest shift, as a share of the picture's sides.
        brightness: the largest change, of pixels in [0, 1].
        contrast: pictures' contrasts are multiplied by 1 - contrast to 1 + contrast.
        colour: each colour is multiplied by 1 - colour to 1 + colour.
        visible: the share of a box's area within the picture below which it is dropped.
    """

    flip: str = "x"
    scale: tuple[float, float] = (0.8, 1.25)
    stretch: float = 1.1
    shift: float = 0.15
    brightness: float = 0.1
    contrast: float = 0.2
    colour: float = 0.1
    visible: float = 0.3

    def __post_init__(self):
        if set(self.flip) - {"x", "y"}:
            raise ValueError(f"flip must be of 'x' and 'y'; got {self.flip!r}.")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale must be (least, largest) > 0; got {self.scale}.")
        if self.stretch < 1:
            raise ValueError(f"stretch must be at least 1; got {self.stretch}.")


def augment(
    images: Array, config: Augmentation, rng: Array, *, boxes: Array | None = None
) -> tuple[Array, Array | None]:
    """Mirrored, scaled, shifted and recoloured pictures, and their boxes in the same places.

    Args:
        images: (B, H, W, C) in [0, 1]. What comes in from outside has the picture's mean colour.
        config: see Augmentation.
        rng: a `jax.random` key.
        boxes: (B, M, 4) of x0, y0, x1, y1 in pixels, or None.

    Returns:
        Pictures of the same shape, float32; and boxes cut to the picture, with all four numbers 0
        where too little of them is left.
    """
    B, H, W, C = images.shape
    # Alike on every device, however the rows lie: the generator's own shares would differ.
    draws = pin(jax.random.uniform(rng, (B, 8 + C), minval=-1.0, maxval=1.0))
    size = jnp.asarray([H, W], jnp.float32)[None]
    low, high = jnp.log(config.scale[0]), jnp.log(config.scale[1])
    scale = jnp.exp(low + (high - low) * (draws[:, :1] + 1) / 2)
    stretch = jnp.exp(draws[:, 1:2] * jnp.log(config.stretch) / 2)
    scale = jnp.concatenate([scale * stretch, scale / stretch], axis=1)
    # The centre of the picture moves by the shift alone.
    shift = size * ((1 - scale) / 2 + config.shift * draws[:, 2:4])
    mirror = jnp.stack(
        [(draws[:, 4 + i] > 0) & (axis in config.flip) for i, axis in enumerate("yx")],
        axis=1,
    )
    images = _move(images, scale, shift, mirror)
    images = _recolour(images, config, draws[:, 6:])
    if boxes is None:
        return images, None
    return images, _move_boxes(boxes, scale, shift, mirror, (H, W), config.visible)


def _move(images: Array, scale: Array, shift: Array, mirror: Array) -> Array:
    mean = images.mean(axis=(1, 2), keepdims=True)
    moved = jax.vmap(
        lambda image, factor, by: jax.image.scale_and_translate(
            image, image.shape, (0, 1), factor, by, "linear", antialias=False
        )
    )(images - mean, scale, shift)
    for axis in (1, 2):
        flipped = mirror[:, axis - 1, None, None, None]
        moved = jnp.where(flipped, jnp.flip(moved, axis), moved)
    return moved + mean


def _recolour(images: Array, config: Augmentation, draws: Array) -> Array:
    def draw(amount: float, columns: slice) -> Array:
        return amount * draws[:, None, None, columns]

    mean = images.mean(axis=(1, 2, 3), keepdims=True)
    images = (images - mean) * (1 + draw(config.contrast, slice(0, 1))) + mean
    images = images + draw(config.brightness, slice(1, 2))
    return images * (1 + draw(config.colour, slice(2, None)))


def _move_boxes(
    boxes: Array,
    scale: Array,
    shift: Array,
    mirror: Array,
    size: tuple[int, int],
    visible: float,
) -> Array:
    def of_boxes(pair: Array) -> Array:  # (B, 2) of y, x -> (B, 1, 4) of x, y, x, y
        return jnp.tile(pair[:, None, ::-1], (1, 1, 2))

    H, W = size
    moved = boxes * of_boxes(scale) + of_boxes(shift)
    ends = jnp.asarray([W, H, W, H], boxes.dtype)[None, None]
    # The far side becomes the near one.
    flipped = ends - moved[..., jnp.asarray([2, 3, 0, 1])]
    moved = jnp.where(of_boxes(mirror), flipped, moved)
    cut = clip(moved, H, W)
    kept = area(cut) > visible * area(moved)
    return jnp.where(kept[..., None], cut, 0.0)
