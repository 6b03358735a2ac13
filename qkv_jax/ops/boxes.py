"""Boxes (x0, y0, x1, y1) with x0 <= x1 and y0 <= y1: areas, overlaps, and what is kept of duplicates."""

import jax
import jax.numpy as jnp

Array = jax.Array


def area(boxes: Array) -> Array:
    """Boxes (..., 4) -> (...); what is turned inside out has the area 0."""
    sides = jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0.0)
    return sides[..., 0] * sides[..., 1]


def iou(one: Array, other: Array) -> Array:
    """Intersection over union of boxes (..., 4) that broadcast together: (...), in [0, 1].

    All pairs of (A, 4) and (B, 4): `iou(one[:, None], other[None])`. Two boxes without area: 0.
    """
    return _overlap(one, other)[0]


def generalised_iou(one: Array, other: Array) -> Array:
    """IoU less the share of the smallest box around both that neither covers: (...), in [-1, 1].

    Unlike `iou`, it has a slope where boxes do not meet.

    Args:
        one, other: (..., 4), broadcast together.

    Source: Rezatofighi et al. 2019, arXiv 1902.09630, algorithm 1.
    """
    value, union = _overlap(one, other)
    low = jnp.minimum(one[..., :2], other[..., :2])
    high = jnp.maximum(one[..., 2:], other[..., 2:])
    around = area(jnp.concatenate([low, high], axis=-1))
    return value - (around - union) / jnp.maximum(around, 1e-9)


def from_centres(boxes: Array) -> Array:
    """(..., 4) of (centre x, centre y, width, height) -> (x0, y0, x1, y1)."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return jnp.concatenate([centre - half, centre + half], axis=-1)


def to_centres(boxes: Array) -> Array:
    """(..., 4) of (x0, y0, x1, y1) -> (centre x, centre y, width, height)."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return jnp.concatenate([(low + high) / 2, high - low], axis=-1)


def clip(boxes: Array, height: int, width: int) -> Array:
    """What of boxes (..., 4) lies in a picture of this size."""
    limits = jnp.asarray([width, height, width, height], boxes.dtype)
    return jnp.clip(boxes, 0.0, limits.reshape((1,) * (boxes.ndim - 1) + (4,)))


def suppress(boxes: Array, classes: Array, *, threshold: float) -> Array:
    """Which boxes are kept where each rules out all later ones of its class that overlap it.

    Args:
        boxes: (Q, 4), the most certain first.
        classes: (Q,) int.
        threshold: of the IoU from which a box is a duplicate.

    Returns:
        (Q,) bool. A box that was ruled out rules out none. Cost: O(Q ** 2), Q steps in a row.
    """
    order = jnp.arange(boxes.shape[0])
    same = classes[:, None] == classes[None]
    doubles = iou(boxes[:, None], boxes[None]) > threshold
    beats = doubles & same & (order[:, None] < order[None])

    def visit(at: Array, kept: Array) -> Array:
        return kept & ~(beats[at] & kept[at])

    return jax.lax.fori_loop(0, order.size, visit, jnp.ones(order.shape, bool))


def _overlap(one: Array, other: Array) -> tuple[Array, Array]:
    """IoU and union."""
    low = jnp.maximum(one[..., :2], other[..., :2])
    high = jnp.minimum(one[..., 2:], other[..., 2:])
    shared = area(jnp.concatenate([low, high], axis=-1))
    union = area(one) + area(other) - shared
    return shared / jnp.maximum(union, 1e-9), union
