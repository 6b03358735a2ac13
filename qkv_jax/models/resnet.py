"""A residual network with attention: to channels, to places, and between all places.

He et al. 2016 (arXiv 1512.03385) with squeeze-excitation (Hu et al. 2018, arXiv 1709.01507) or CBAM
(Woo et al. 2018, arXiv 1807.06521) in its blocks, and self-attention over the last map
(Srinivas et al. 2021, arXiv 2101.11605). Differences: group norm (Wu and He 2018, arXiv 1803.08494),
so that an image's result never depends on its batch; a stem of small patches in place of strides.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from qkv_jax.layers import EncoderBlock, Linear
from qkv_jax.models.image_classification import (
    PixelChanges,
    check_sizes,
    class_logits,
    class_loss,
)
from qkv_jax.ops import dropout, split_rng
from qkv_jax.ops.pixels import patches

Array = jax.Array


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes and choices of the model.

    Attributes:
        height, width, channels, classes: of the images; 0: the data's.
        patch: pixels a side of the squares that are the stem's input channels; 1: single pixels.
        widths: channels of each stage; each stage after the first halves height and width.
        blocks: residual blocks of each stage.
        attention: within each block, of what its convolutions give: "squeeze" weighs channels,
            "cbam" channels, then places; "none".
        reduction: how many times fewer units than channels weigh the channels.
        self_attention: Transformer blocks over all places of the last map.
        heads: N of self-attention.
        groups: of group norm; divides the widths.
        dropout: before the classes, and on self-attention's sublayers.
        augmentation, label_smoothing, flip_average: see `image_classification.Settings`.
        dtype: of the computation; parameters are float32 always.
    """

    height: int = 0
    width: int = 0
    channels: int = 0
    classes: int = 0
    patch: int = 2
    widths: tuple[int, ...] = (48, 96)
    blocks: tuple[int, ...] = (2, 2)
    attention: Literal["squeeze", "cbam", "none"] = "squeeze"
    reduction: int = 8
    self_attention: int = 1
    heads: int = 4
    groups: int = 8
    dropout: float = 0.0
    augmentation: PixelChanges = field(default_factory=PixelChanges)
    label_smoothing: float = 0.1
    flip_average: bool = True
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self):
        if len(self.widths) != len(self.blocks) or not self.widths:
            raise ValueError(
                "widths and blocks must name the same stages, at least one; got "
                f"{self.widths} and {self.blocks}."
            )
        for width in self.widths:
            if width % self.groups:
                raise ValueError(
                    f"groups must divide the widths {self.widths}; got {self.groups}."
                )


class Model(nnx.Module):
    """Images (B, height, width, C) in [0, 1] -> logits (B, classes)."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        """Draws float32 parameters from the stream "params" of rngs."""
        check_sizes(
            height=config.height,
            width=config.width,
            channels=config.channels,
            classes=config.classes,
        )
        self.config = config
        first, last = config.widths[0], config.widths[-1]
        self.stem = _convolution(
            config, config.channels * config.patch**2, first, (None, "embed"), rngs
        )
        self.stages: nnx.List[nnx.List[Block]] = nnx.List()
        width = first
        for stage, (out, count) in enumerate(zip(config.widths, config.blocks)):
            stride = 1 if stage == 0 else 2
            blocks: nnx.List[Block] = nnx.List()
            for i in range(count):
                blocks.append(
                    Block(config, width, out, stride if i == 0 else 1, rngs=rngs)
                )
                width = out
            self.stages.append(blocks)
        dtype = jnp.dtype(config.dtype)
        table = nnx.initializers.normal(0.02)(rngs.params(), (_places(config), last))
        self.positions = (
            nnx.Param(table, axes=(None, "embed")) if config.self_attention else None
        )
        self.encoder = nnx.List(
            EncoderBlock(
                last,
                attention={"heads": config.heads, "dtype": dtype},
                feed_forward={"d_ff": 2 * last, "activation": "gelu_tanh"}
                | {"dtype": dtype},
                residual={"place": "pre", "dropout_rate": config.dropout}
                | {"dtype": dtype},
                rngs=rngs,
            )
            for _ in range(config.self_attention)
        )
        self.norm = _norm(config, last, rngs)
        self.head = nnx.Linear(
            last,
            config.classes,
            kernel_init=nnx.initializers.zeros,
            kernel_metadata={"axes": ("embed", "vocab")},
            bias_metadata={"axes": ("vocab",)},
            rngs=rngs,
        )

    def __call__(self, images: Array, *, rng: Array | None = None) -> Array:
        """Logits of images; rng draws the dropout, None: none."""
        rngs = split_rng(rng, len(self.encoder) + 1)
        x = self.stem(patches(images * 2 - 1, self.config.patch))
        for stage in self.stages:
            for block in stage:
                x = block(x)
        B, _, _, D = x.shape
        if self.positions is not None:
            shape = x.shape
            x = x.reshape(B, -1, D) + self.positions[...][None]
            for encoder, block_rng in zip(self.encoder, rngs[1:]):
                x = encoder(x, mask=None, rng=block_rng)
            x = x.reshape(shape)
        x = jax.nn.relu(self.norm(x)).mean(axis=(1, 2))
        return self.head(dropout(x, self.config.dropout, rngs[0]))

    def loss(
        self, batch: dict[str, Array], *, rng: Array | None
    ) -> tuple[Array, dict[str, Array]]:
        """See `image_classification.class_loss`."""
        return class_loss(self, batch, rng=rng)

    def predict(self, batch: dict[str, Array]) -> dict[str, Array]:
        """See `image_classification.class_logits`."""
        return class_logits(self, batch)


class Block(nnx.Module):
    """x + attention(convolutions(x)), each convolution after a norm and a relu.

    Source: He et al. 2016, arXiv 1603.05027, figure 4 (e); the shortcut of a block that halves the
    map is a mean, as in He et al. 2018, arXiv 1812.01187, ResNet-D.
    """

    def __init__(
        self, config: Config, width: int, out: int, stride: int, *, rngs: nnx.Rngs
    ):
        """From `width` channels to `out`; a stride of 2 halves height and width."""
        self.stride = stride
        self.norms = nnx.List(
            _norm(config, channels, rngs) for channels in (width, out)
        )
        self.up = _convolution(
            config, width, out, ("embed", "ff"), rngs, strides=stride
        )
        self.down = _convolution(config, out, out, ("ff", "embed"), rngs)
        self.shortcut = (
            None
            if width == out
            else _convolution(config, width, out, (None, "embed"), rngs, size=1)
        )
        self.channels = (
            None
            if config.attention == "none"
            else ChannelAttention(config, out, rngs=rngs)
        )
        self.places = (
            PlaceAttention(config, rngs=rngs) if config.attention == "cbam" else None
        )

    def __call__(self, x: Array) -> Array:
        """(B, height, width, C) -> the same, or half of it, with `out` channels."""
        y = self.up(jax.nn.relu(self.norms[0](x)))
        y = self.down(jax.nn.relu(self.norms[1](y)))
        y = y if self.channels is None else self.channels(y)
        y = y if self.places is None else self.places(y)
        if self.stride > 1:
            size = (self.stride, self.stride)
            x = nnx.avg_pool(x, size, size, "SAME", count_include_pad=False)
        return y + (x if self.shortcut is None else self.shortcut(x))


class ChannelAttention(nnx.Module):
    """Weighs each channel by what all channels hold on average, and in CBAM at most, too."""

    def __init__(self, config: Config, width: int, *, rngs: nnx.Rngs):
        """Builds the two maps, which both kinds of summary go through."""
        hidden = max(1, width // config.reduction)
        self.squeeze, self.excite = (
            Linear(
                inputs,
                outputs,
                dtype=jnp.dtype(config.dtype),
                kernel_metadata={"axes": axes},
                bias_metadata={"axes": axes[1:]},
                rngs=rngs,
            )
            for inputs, outputs, axes in (
                (width, hidden, ("embed", None)),
                (hidden, width, (None, "embed")),
            )
        )
        self.largest = config.attention == "cbam"

    def __call__(self, x: Array) -> Array:
        """(B, height, width, C) -> the same."""
        summaries = [x.mean(axis=(1, 2))]
        if self.largest:
            summaries.append(x.max(axis=(1, 2)))
        weights = sum(self.excite(jax.nn.relu(self.squeeze(s))) for s in summaries)
        return x * jax.nn.sigmoid(weights)[:, None, None]


class PlaceAttention(nnx.Module):
    """Weighs each place by the mean and the largest of its channels, and its surroundings'."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        """Builds the 7 x 7 convolution."""
        self.convolution = _convolution(config, 2, 1, (None, None), rngs, size=7)

    def __call__(self, x: Array) -> Array:
        """(B, height, width, C) -> the same."""
        summary = jnp.stack([x.mean(axis=-1), x.max(axis=-1)], axis=-1)
        return x * jax.nn.sigmoid(self.convolution(summary))


def _convolution(
    config: Config,
    width: int,
    out: int,
    axes: tuple[str | None, str | None],
    rngs: nnx.Rngs,
    *,
    size: int = 3,
    strides: int = 1,
) -> nnx.Conv:
    return nnx.Conv(
        width,
        out,
        (size, size),
        strides=strides,
        use_bias=False,
        dtype=jnp.dtype(config.dtype),
        kernel_init=nnx.initializers.he_normal(),
        kernel_metadata={"axes": (None, None, *axes)},
        rngs=rngs,
    )


def _norm(config: Config, width: int, rngs: nnx.Rngs) -> Any:
    return nnx.GroupNorm(
        width,
        num_groups=config.groups,
        dtype=jnp.dtype(config.dtype),
        scale_metadata={"axes": (None,)},
        bias_metadata={"axes": (None,)},
        rngs=rngs,
    )


def _places(config: Config) -> int:
    """Places of the last map."""
    sides = []
    for side in (config.height, config.width):
        side //= config.patch
        for _ in config.widths[1:]:
            side = -(-side // 2)
        sides.append(side)
    return sides[0] * sides[1]
