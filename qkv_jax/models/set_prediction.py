"""Detection as set prediction: each query answers for one object or none (DETR).

Carion et al. 2020, arXiv 2005.12872: learned queries, a bipartite matching, losses at each layer.
For small data the queries carry reference boxes that each layer refines (DAB-DETR: Liu et al.
2022, arXiv 2201.12329), and look about them first (SMCA: Gao et al. 2021, arXiv 2101.07448).
"""

import functools
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from qkv_jax.layers import FeedForward, MultiHeadAttention, make_norm
from qkv_jax.layers.transformer import Residual
from qkv_jax.models.detection import Batch, normalise, rows_sum, scene, sigmoid_focal
from qkv_jax.models.pyramid import Pyramid, PyramidConfig, grid_sinusoids
from qkv_jax.ops import boxes as box_ops
from qkv_jax.ops import scores, sinusoids, split_rng
from qkv_jax.ops.images import Augmentation

Array = jax.Array


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes, and the weights of the losses, which are those of the matching too.

    Attributes:
        classes: V; 0: taken from the data.
        pyramid: the net and its neck, whose D is the decoder's.
        augmentation: of training pictures; None: none.
        queries: Q, not less than the boxes of any picture.
        layers: L, of the decoder; each has a loss.
        heads: N.
        d_ff: F.
        dropout: of the decoder.
        class_weight, l1_weight, giou_weight: of the three losses.
        detections: boxes a picture.
    """

    classes: int = 0
    pyramid: PyramidConfig = field(default_factory=PyramidConfig)
    augmentation: Augmentation | None = field(
        default_factory=functools.partial(Augmentation, flip="xy")
    )
    queries: int = 60
    layers: int = 3
    heads: int = 4
    d_ff: int = 192
    dropout: float = 0.0
    class_weight: float = 2.0
    l1_weight: float = 5.0
    giou_weight: float = 2.0
    detections: int = 60

    def __post_init__(self):
        for name in ("queries", "layers", "detections"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}.")


class Found(NamedTuple):
    """What the queries answer.

    Attributes:
        logits: (B, Q, V) float32, each class by itself.
        boxes: (B, Q, 4) float32, centre x, centre y, width and height as shares of the picture.
    """

    logits: Array
    boxes: Array


class QueryBlock(nnx.Module):
    """Queries attend to each other, then to the picture about their boxes, then each by itself."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        D = config.pyramid.d_model

        def residual() -> Residual:
            return Residual(
                D,
                place="pre",
                dropout_rate=config.dropout,
                dtype=jnp.float32,
                rngs=rngs,
            )

        self.attention = MultiHeadAttention(D, config.heads, rngs=rngs)
        self.cross = MultiHeadAttention(D, config.heads, rngs=rngs)
        self.feed_forward = FeedForward(D, config.d_ff, activation="silu", rngs=rngs)
        self.after_attention, self.after_cross = residual(), residual()
        self.after_feed_forward = residual()
        # For each head where it looks in the box, and how far about it.
        self.gaze = nnx.LinearGeneral(
            D,
            (config.heads, 4),
            kernel_init=nnx.initializers.zeros,
            bias_init=_corners,
            kernel_metadata={"axes": ("embed", "heads", None)},
            bias_metadata={"axes": ("heads", None)},
            rngs=rngs,
        )

    def __call__(
        self,
        x: Array,
        places: Array,
        boxes: Array,
        memory: Array,
        cells: Array,
        *,
        rng: Array | None = None,
    ) -> Array:
        """One layer of the decoder.

        Args:
            x: (B, Q, D).
            places: (B, Q, D), encodings of the boxes.
            boxes: (B, Q, 4), see Found.
            memory: (B, S, D), the picture's cells.
            cells: (S, 2), their x and y as shares of the picture.
            rng: draws the dropout; None: none.
        """
        rngs = split_rng(rng, 3)
        x = self.after_attention(x, lambda y: self.attention(y + places), rng=rngs[0])
        near = scores.bias(self._near(x, boxes, cells))
        x = self.after_cross(
            x, lambda y: self.cross(y + places, memory, score=near), rng=rngs[1]
        )
        return self.after_feed_forward(x, self.feed_forward, rng=rngs[2])

    def _near(self, x: Array, boxes: Array, cells: Array) -> Array:
        """The logarithms of Gaussians about the queries' boxes, (B, N, Q, S)."""
        gaze = self.gaze(x).transpose(0, 2, 1, 3)  # (B, N, Q, 4)
        middle, side = boxes[:, None, :, :2], boxes[:, None, :, 2:]
        middle = middle + jnp.tanh(gaze[..., :2]) * side / 2
        spread = jnp.exp(jnp.clip(gaze[..., 2:], -2.0, 2.0)) * side / 2 + 0.02
        away = (cells[None, None, None] - middle[..., None, :]) / spread[..., None, :]
        return -0.5 * jnp.sum(away**2, axis=-1)


class Model(nnx.Module):
    """Pictures (B, H, W, 3) -> what Q queries found, after each of the decoder's layers."""

    unit = "boxes"

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        if config.classes < 1:
            raise ValueError(f"classes must be positive; got {config.classes}.")
        D = config.pyramid.d_model
        self.config = config
        self.pyramid = Pyramid(config.pyramid, rngs=rngs)
        normal = nnx.initializers.normal(stddev=1.0)
        table = normal(rngs.params(), (config.queries, D), jnp.float32)
        self.queries = nnx.Param(table, axes=(None, "embed"))
        self.anchors = nnx.Param(_grid(config.queries), axes=(None, None))
        self.place = FeedForward(2 * D, D, activation="silu", rngs=rngs)
        self.narrow = _linear(2 * D, D, rngs=rngs)
        self.layers = nnx.List(
            QueryBlock(config, rngs=rngs) for _ in range(config.layers)
        )
        self.norm = make_norm(D, "layer", 1e-5, jnp.float32, rngs)
        # Nearly no query has an object of a class: all start at a probability of 0.05.
        self.kind = _linear(D, config.classes, bias=-3.0, rngs=rngs)
        self.moves = nnx.List(_linear(D, 4, zero=True, rngs=rngs) for _ in self.layers)
        self.hidden = nnx.List(_linear(D, D, rngs=rngs) for _ in self.layers)

    def __call__(self, pixels: Array, *, rng: Array | None = None) -> list[Found]:
        """pixels (B, H, W, 3) about 0 -> a Found for each layer, the last the best."""
        rngs = split_rng(rng, 1 + len(self.layers))
        grid = self.pyramid(pixels, rng=rngs[0])
        B, h, w, D = grid.shape
        memory = (grid + grid_sinusoids(h, w, D)[None]).reshape(B, h * w, D)
        cells = _cells(h, w)
        Q = self.config.queries
        x = jnp.broadcast_to(self.queries[...][None], (B, Q, D))
        boxes = jnp.broadcast_to(jax.nn.sigmoid(self.anchors[...])[None], (B, Q, 4))
        found = []
        for block, hidden, move, block_rng in zip(
            self.layers, self.hidden, self.moves, rngs[1:]
        ):
            places = sinusoids(boxes * 64.0, D // 2).reshape(B, Q, 2 * D)
            places = self.narrow(self.place(places))
            x = block(x, places, boxes, memory, cells, rng=block_rng)
            states = self.norm(x)
            step = move(jax.nn.silu(hidden(states)))
            moved = jax.nn.sigmoid(_logit(boxes) + step)
            found.append(Found(self.kind(states), moved))
            # Each layer learns its own step alone.
            boxes = jax.lax.stop_gradient(moved)
        return found

    def loss(self, batch: Batch, *, rng: Array | None) -> tuple[Array, dict]:
        """Losses of the queries matched to boxes, over all layers; `tokens` is the number of boxes.

        Raises:
            ValueError: there may be more boxes than queries.
        """
        if batch["boxes"].shape[1] > self.config.queries:
            raise ValueError(
                f"queries must not be less than the data's {batch['boxes'].shape[1]} boxes a "
                f"picture; got {self.config.queries}."
            )
        rngs = (None, None) if rng is None else jax.random.split(rng)
        given, weight = scene(batch, self.config.augmentation, rngs[0]), batch["weight"]
        size = _sides(batch["image"])
        wanted = box_ops.to_centres(given.boxes) / size
        layers = [
            self._losses(found, wanted, given.classes, given.real, weight)
            for found in self(given.pixels, rng=rngs[1])
        ]
        last = layers[-1]
        sums = {
            "loss_sum": jnp.sum(jnp.stack([layer["loss_sum"] for layer in layers])),
            "class_sum": last["class_sum"],
            "l1_sum": last["l1_sum"],
            "giou_sum": last["giou_sum"],
            "tokens": rows_sum(given.real.astype(jnp.float32), weight),
        }
        return sums["loss_sum"], sums

    def predict(self, batch: Batch) -> dict[str, Array]:
        """The best boxes of each picture by the last layer; nothing needs to be suppressed."""
        found = self(normalise(batch["image"]))[-1]
        B, Q, V = found.logits.shape
        scores_, at = jax.lax.top_k(
            jax.nn.sigmoid(found.logits).reshape(B, -1),
            min(self.config.detections, Q * V),
        )
        boxes = box_ops.from_centres(found.boxes * _sides(batch["image"]))
        boxes = box_ops.clip(boxes, *batch["image"].shape[1:3])
        boxes = jnp.take_along_axis(boxes, (at // V)[..., None], axis=1)
        return {"boxes": boxes, "scores": scores_, "classes": at % V}

    def _losses(
        self, found: Found, wanted: Array, classes: Array, real: Array, weight: Array
    ) -> dict[str, Array]:
        config = self.config
        query = match(self._costs(found, wanted, classes), real)  # (B, M)
        onehot = jax.nn.one_hot(classes, found.logits.shape[-1]) * real[..., None]
        B = query.shape[0]
        target = jnp.zeros_like(found.logits).at[jnp.arange(B)[:, None], query]
        kinds = rows_sum(sigmoid_focal(found.logits, target.max(onehot)), weight)
        boxes = jnp.take_along_axis(found.boxes, query[..., None], axis=1)
        l1 = rows_sum(jnp.abs(boxes - wanted).sum(-1) * real, weight)
        overlap = box_ops.generalised_iou(
            box_ops.from_centres(boxes), box_ops.from_centres(wanted)
        )
        giou = rows_sum((1 - overlap) * real, weight)
        return {
            "loss_sum": config.class_weight * kinds
            + config.l1_weight * l1
            + config.giou_weight * giou,
            "class_sum": kinds,
            "l1_sum": l1,
            "giou_sum": giou,
        }

    def _costs(self, found: Found, wanted: Array, classes: Array) -> Array:
        """What each query would cost as the answer to each box, (B, Q, M)."""
        config = self.config
        gain = sigmoid_focal(found.logits, jnp.ones_like(found.logits))
        gain = gain - sigmoid_focal(found.logits, jnp.zeros_like(found.logits))
        kind = jnp.take_along_axis(gain, classes[:, None], axis=2)
        one, other = found.boxes[:, :, None], wanted[:, None]
        l1 = jnp.abs(one - other).sum(-1)
        overlap = box_ops.generalised_iou(
            box_ops.from_centres(one), box_ops.from_centres(other)
        )
        return (
            config.class_weight * kind
            + config.l1_weight * l1
            + config.giou_weight * (1 - overlap)
        )


def match(costs: Array, real: Array) -> Array:
    """The query of each box, so that no two have the same and the sum of costs is least.

    Args:
        costs: (B, Q, M), M <= Q.
        real: (B, M) bool; what is not real costs nothing and takes a query that is left.

    Returns:
        (B, M) int32; without a gradient.

    Source: Kuhn 1955, by `optax.assignment.hungarian_algorithm`.
    """
    costs = jnp.where(real[:, None], jax.lax.stop_gradient(costs), 0.0)
    # A run that has diverged would search for ever.
    costs = jnp.nan_to_num(costs, nan=1e6, posinf=1e6, neginf=-1e6)
    queries, boxes = jax.vmap(optax.assignment.hungarian_algorithm)(costs)
    B, _, M = costs.shape
    found = jnp.zeros((B, M), jnp.int32).at[jnp.arange(B)[:, None], boxes]
    return found.set(queries.astype(jnp.int32))


def _linear(
    wide: int, narrow: int, *, bias: float = 0.0, zero: bool = False, rngs: nnx.Rngs
) -> nnx.Linear:
    init = nnx.initializers.zeros if zero else nnx.initializers.xavier_uniform()
    return nnx.Linear(
        wide,
        narrow,
        kernel_init=init,
        bias_init=nnx.initializers.constant(bias),
        kernel_metadata={"axes": ("embed", None)},
        bias_metadata={"axes": (None,)},
        rngs=rngs,
    )


def _grid(queries: int) -> Array:
    """Boxes to start from, as logits: a fifth of the picture each, spread over it evenly."""
    # Points of the plastic number's sequence (Roberts 2018) lie far apart for any count.
    steps = jnp.arange(1, queries + 1, dtype=jnp.float32)[:, None]
    centres = (0.5 + steps * jnp.asarray([[0.7548777, 0.5698403]])) % 1.0
    return _logit(jnp.concatenate([centres, jnp.full((queries, 2), 0.2)], axis=1))


def _corners(rng: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
    """Heads start by looking at different sides of the box; flax gives the flat shape."""
    heads = jnp.arange(math.prod(shape) // 4)
    angles = 2 * jnp.pi * heads / heads.size
    looks = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1) * 0.5
    looks = jnp.concatenate([looks, jnp.zeros_like(looks)], axis=-1)
    return looks.reshape(shape).astype(dtype)


def _cells(height: int, width: int) -> Array:
    """x and y of the middles of cells as shares of the picture, (S, 2)."""
    y, x = jnp.meshgrid(
        (jnp.arange(height) + 0.5) / height,
        (jnp.arange(width) + 0.5) / width,
        indexing="ij",
    )
    return jnp.stack([x.reshape(-1), y.reshape(-1)], axis=-1)


def _sides(image: Array) -> Array:
    H, W = image.shape[1:3]
    return jnp.asarray([W, H, W, H], jnp.float32).reshape(1, 1, 4)


def _logit(share: Array) -> Array:
    share = jnp.clip(share, 1e-3, 1 - 1e-3)
    return jnp.log(share / (1 - share))
