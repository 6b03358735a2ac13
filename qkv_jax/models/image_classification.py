"""What classifiers of images share: from pixels in a batch to a loss, metrics and predictions."""

from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from qkv_jax.models.classification import class_sums
from qkv_jax.ops import pixels, split_rng

Array = jax.Array


@dataclass(frozen=True, kw_only=True)
class PixelChanges:
    """Random changes of the training images.

    Attributes:
        flip: whether left and right are swapped in half of them.
        shift: pixels that they move by at most, on each axis.
        erase: side of a square that is blanked out; 0: none.
    """

    flip: bool = True
    shift: int = 2
    erase: int = 0

    def __post_init__(self):
        if self.shift < 0 or self.erase < 0:
            raise ValueError(
                "shift and erase must not be negative; got "
                f"shift = {self.shift}, erase = {self.erase}."
            )

    def __call__(self, images: Array, rng: Array) -> Array:
        """Images (B, height, width, C), 0 where they are empty -> the same, changed."""
        flip, shift, erase = jax.random.split(rng, 3)
        if self.flip:
            images = pixels.random_flip(images, flip)
        if self.shift:
            images = pixels.random_shift(images, self.shift, shift)
        if self.erase:
            images = pixels.random_erase(images, self.erase, erase)
        return images


class Settings(Protocol):
    """What a classifier's Config has for the functions here.

    Attributes:
        augmentation: of the training images.
        label_smoothing: of the cross-entropy that is minimised, in [0, 1).
        flip_average: whether predictions are means over each image and its mirror image.
    """

    @property
    def augmentation(self) -> PixelChanges: ...
    @property
    def label_smoothing(self) -> float: ...
    @property
    def flip_average(self) -> bool: ...


class Classifier(Protocol):
    """A model: images (B, height, width, C) float32 -> logits (B, classes)."""

    config: Any

    def __call__(self, images: Array, *, rng: Array | None = None) -> Array: ...


def check_sizes(**sizes: int) -> None:
    """Raises ValueError for a size of a Config that is not positive."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be positive; got {size}.")


def class_loss(
    model: Classifier, batch: dict[str, Array], *, rng: Array | None
) -> tuple[Array, dict[str, Array]]:
    """Summed cross-entropy of a batch, and sums of what is measured beside it.

    Args:
        model: the classifier.
        batch: "image" (B, height, width, C) uint8, "label" (B,) int, "weight" (B,) float32, 0 for
            rows that do not count: they are handed to the model blank.
        rng: draws augmentation and dropout; None: neither.

    Returns:
        The loss, and {"loss_sum", "nll_sum", "accuracy_sum", "tokens"}, float32 sums over rows.
    """
    settings: Settings = model.config
    sums = class_sums(
        _logits(model, batch, rng),
        batch["label"],
        batch["weight"],
        smoothing=settings.label_smoothing,
    )
    return sums["loss_sum"], sums


def class_logits(model: Classifier, batch: dict[str, Array]) -> dict[str, Array]:
    """{"logits": (B, classes) float32} of a batch with "image" and "weight"."""
    return {"logits": _logits(model, batch, None)}


def _logits(model: Classifier, batch: dict[str, Array], rng: Array | None) -> Array:
    settings: Settings = model.config
    images = batch["image"].astype(jnp.float32) / 255.0
    images = images * batch["weight"].reshape(-1, 1, 1, 1)
    change, drop = split_rng(rng, 2)
    if change is not None:
        images = settings.augmentation(images, change)
    logits = model(images, rng=drop)
    if rng is None and settings.flip_average:
        logits = (logits + model(images[:, :, ::-1])) / 2
    return logits.astype(jnp.float32)
