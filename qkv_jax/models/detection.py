"""What detectors share: pictures and boxes as they come from the reader, and one way to answer.

Batches: image (B, H, W, 3) uint8, boxes (B, M, 4) float32 of x0, y0, x1, y1 in pixels, classes
(B, M) int32 with -1 where there is no box, and weight (B,).
Predictions: boxes (B, Q, 4), scores (B, Q) float32 and classes (B, Q) int32, best first.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qkv_jax.ops.images import Augmentation, augment

Array = jax.Array
Batch = dict[str, Array]


class Scene(NamedTuple):
    """What a detector is shown, and what it should find.

    Attributes:
        pixels: (B, H, W, 3) float32, about 0.
        boxes: (B, M, 4).
        classes: (B, M) int32; 0 where there is no box.
        real: (B, M) bool.
    """

    pixels: Array
    boxes: Array
    classes: Array
    real: Array


def scene(batch: Batch, augmentation: Augmentation | None, rng: Array | None) -> Scene:
    """The pictures and boxes of a batch, changed at random where there is an rng."""
    image, boxes = normalise(batch["image"]), batch["boxes"]
    if rng is not None and augmentation is not None:
        changed, moved = augment(image / 4 + 0.5, augmentation, rng, boxes=boxes)
        assert moved is not None
        image, boxes = (changed - 0.5) * 4, moved
    real = (batch["classes"] >= 0) & (boxes[..., 2] > boxes[..., 0])
    return Scene(image, boxes, jnp.maximum(batch["classes"], 0), real)


def normalise(image: Array) -> Array:
    """Bytes -> float32 about 0, in [-2, 2]."""
    return image.astype(jnp.float32) * (4 / 255) - 2


def sigmoid_focal(
    logits: Array, targets: Array, *, alpha: float = 0.25, gamma: float = 2.0
) -> Array:
    """Cross-entropy of each class by itself, that of what is easy made small: as logits.

    Args:
        logits: floating.
        targets: of the same shape, in [0, 1].
        alpha: the weight of positives; that of negatives is 1 - alpha.
        gamma: how fast the weight falls as a prediction gets right.

    Source: Lin et al. 2017, arXiv 1708.02002, eq. 5; with soft targets, Li et al. 2020,
    arXiv 2006.04388, eq. 5.
    """
    entropy = jax.nn.softplus(logits) - targets * logits
    wrong = jnp.abs(targets - jax.nn.sigmoid(logits)) ** gamma
    weight = alpha * targets + (1 - alpha) * (1 - targets)
    return weight * wrong * entropy


def rows_sum(values: Array, weight: Array) -> Array:
    """Values (B, ...) summed, each row times its weight (B,): ()."""
    return jnp.sum(values.reshape(values.shape[0], -1).sum(axis=1) * weight)
