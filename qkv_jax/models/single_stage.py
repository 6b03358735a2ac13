"""A single-stage detector without anchors: a heat map of centres, and a box at each cell.

The head is CenterNet's (Zhou et al. 2019, arXiv 1904.07850) with boxes as distances to the four
sides (FCOS: Tian et al. 2019, arXiv 1904.01355), trained in a region about each centre as in
TTFNet (Liu et al. 2020, arXiv 1909.00700); the neck attends over the whole picture.
"""

import functools
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from flax import nnx

from qkv_jax.models.detection import Batch, normalise, rows_sum, scene
from qkv_jax.models.pyramid import Conv, Pyramid, PyramidConfig, group_norm
from qkv_jax.ops import boxes as box_ops
from qkv_jax.ops.images import Augmentation

Array = jax.Array


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes, losses and how boxes are chosen.

    Attributes:
        classes: V; 0: taken from the data.
        pyramid: the net and its neck.
        augmentation: of training pictures; None: none.
        spread: standard deviations of a target's bump, as a share of its box's sides.
        box_weight: of the loss of boxes.
        detections: Q, boxes a picture.
        threshold: the IoU from which a box repeats a better one of its class.
    """

    classes: int = 0
    pyramid: PyramidConfig = field(default_factory=PyramidConfig)
    augmentation: Augmentation | None = field(
        default_factory=functools.partial(Augmentation, flip="xy")
    )
    spread: float = 0.1
    box_weight: float = 2.0
    detections: int = 60
    threshold: float = 0.6

    def __post_init__(self):
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must be in (0, 1]; got {self.threshold}.")
        if self.spread <= 0:
            raise ValueError(f"spread must be positive; got {self.spread}.")


class Model(nnx.Module):
    """Pictures (B, H, W, 3) -> a logit for each class and a box for each cell."""

    unit = "boxes"

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        if config.classes < 1:
            raise ValueError(f"classes must be positive; got {config.classes}.")
        D, groups = config.pyramid.d_model, config.pyramid.groups
        self.config = config
        self.pyramid = Pyramid(config.pyramid, rngs=rngs)
        self.hidden = Conv(D, D, rngs=rngs)
        self.norm = group_norm(D, groups, rngs)
        # Nearly no cell is a centre: all start at a probability of 0.02.
        self.heat = Conv(D, config.classes, size=1, bias=-4.0, rngs=rngs)
        self.sides = Conv(D, 4, size=1, bias=1.0, rngs=rngs)

    def __call__(
        self, pixels: Array, *, rng: Array | None = None
    ) -> tuple[Array, Array]:
        """pixels (B, H, W, 3) about 0 -> logits (B, h, w, V), boxes (B, h, w, 4) in pixels."""
        x = self.pyramid(pixels, rng=rng)
        x = jax.nn.silu(self.norm(self.hidden(x)))
        heat = self.heat(x).astype(jnp.float32)
        away = jax.nn.softplus(self.sides(x).astype(jnp.float32)) * self.pyramid.stride
        x, y = self._centres(heat.shape[1:3])
        centre = jnp.stack([x, y, x, y], axis=-1)[None]
        sign = jnp.asarray([-1.0, -1.0, 1.0, 1.0]).reshape(1, 1, 1, 4)
        return heat, centre + sign * away

    def loss(self, batch: Batch, *, rng: Array | None) -> tuple[Array, dict]:
        """Heat-map and box losses, summed over boxes; see `tokens`: the number of boxes."""
        rngs = (None, None) if rng is None else jax.random.split(rng)
        given, weight = scene(batch, self.config.augmentation, rngs[0]), batch["weight"]
        heat, found = self(given.pixels, rng=rngs[1])
        bumps = self._bumps(given.boxes, heat.shape[1:3]) * given.real[..., None, None]
        onehot = jax.nn.one_hot(given.classes, heat.shape[-1])
        target = (bumps[..., None] * onehot[:, :, None, None]).max(axis=1)
        # Of the boxes about a cell, the one whose bump is highest there is learnt.
        owner, region = bumps.argmax(axis=1), bumps.max(axis=1)
        wanted = jnp.take_along_axis(
            given.boxes, owner.reshape(owner.shape[0], -1, 1), axis=1
        ).reshape(found.shape)
        region = jnp.where(region > 0.3, region, 0.0)
        # Each box has the weight 1, however many cells are about it.
        mass = jnp.sum(bumps * (bumps > 0.3), axis=(2, 3))
        mass = jnp.take_along_axis(mass, owner.reshape(owner.shape[0], -1), axis=1)
        region = region / jnp.maximum(mass.reshape(region.shape), 1e-6)
        boxes = 1 - box_ops.generalised_iou(found, wanted)
        heat_sum = rows_sum(penalty_reduced_focal(heat, target), weight)
        boxes_sum = rows_sum(boxes * region, weight)
        sums = {
            "loss_sum": heat_sum + self.config.box_weight * boxes_sum,
            "heat_sum": heat_sum,
            "giou_sum": boxes_sum,
            "tokens": rows_sum(given.real.astype(jnp.float32), weight),
        }
        return sums["loss_sum"], sums

    def predict(self, batch: Batch) -> dict[str, Array]:
        """The best Q boxes of each picture: cells above their neighbours, without duplicates."""
        heat, boxes = self(normalise(batch["image"]))
        B, H, W, V = heat.shape
        near = jax.lax.reduce_window(
            heat, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 1, 1, 1), "SAME"
        )
        peaks = jnp.where(heat == near, jax.nn.sigmoid(heat), 0.0)
        scores, at = jax.lax.top_k(
            peaks.reshape(B, -1), min(self.config.detections, H * W * V)
        )
        classes, cells = at % V, at // V
        boxes = jnp.take_along_axis(boxes.reshape(B, -1, 4), cells[..., None], axis=1)
        boxes = box_ops.clip(boxes, *batch["image"].shape[1:3])
        kept = jax.vmap(
            lambda b, c: box_ops.suppress(b, c, threshold=self.config.threshold)
        )(boxes, classes)
        scores = jnp.where(kept, scores, 0.0)
        order = jnp.argsort(-scores, axis=1)
        return {
            "boxes": jnp.take_along_axis(boxes, order[..., None], axis=1),
            "scores": jnp.take_along_axis(scores, order, axis=1),
            "classes": jnp.take_along_axis(classes, order, axis=1),
        }

    def _centres(self, shape: tuple[int, ...]) -> tuple[Array, Array]:
        """x and y (h, w) of the middles of cells, in pixels."""
        y, x = jnp.meshgrid(*(jnp.arange(n) + 0.5 for n in shape), indexing="ij")
        return x * self.pyramid.stride, y * self.pyramid.stride

    def _bumps(self, boxes: Array, shape: tuple[int, ...]) -> Array:
        """Boxes (B, M, 4) -> Gaussians (B, M, h, w) about their centres, 1 at the centre's cell."""
        stride = self.pyramid.stride
        x, y, width, height = jnp.split(box_ops.to_centres(boxes), 4, axis=-1)

        def along(middle: Array, side: Array, cells: int) -> Array:
            cell = jnp.clip(jnp.floor(middle / stride), 0, cells - 1)
            spread = jnp.maximum(self.config.spread * side / stride, 0.4)
            away = jnp.arange(cells, dtype=jnp.float32)[None, None] - cell
            return jnp.exp(-(away**2) / (2 * spread**2))

        H, W = shape
        return along(y, height, H)[..., None] * along(x, width, W)[:, :, None]


def penalty_reduced_focal(logits: Array, targets: Array) -> Array:
    """The focal loss of a heat map, whose bumps' slopes count little as negatives: as logits.

    Args:
        logits: floating.
        targets: of the same shape; 1 is a positive, all less a negative.

    Source: Law and Deng 2018, arXiv 1808.01244, eq. 1, with alpha 2 and beta 4.
    """
    probability = jax.nn.sigmoid(logits)
    positive = (1 - probability) ** 2 * jax.nn.softplus(-logits)
    negative = (1 - targets) ** 4 * probability**2 * jax.nn.softplus(logits)
    return jnp.where(targets >= 1.0, positive, negative)
