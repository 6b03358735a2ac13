"""A small convolutional net whose coarsest map attends to itself, and hands what it saw to finer ones.

What detectors and image encoders share: `ConvNet` gives maps at strides 2, 4, 8 ...; `Pyramid` is
it with the attention neck on top.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from qkv_jax.layers import EncoderBlock
from qkv_jax.ops import pin, sinusoids, split_rng

Array = jax.Array


@dataclass(frozen=True, kw_only=True)
class PyramidConfig:
    """Sizes of the net and its neck.

    Attributes:
        widths: channels at strides 2, 4, 8 ...
        blocks: residual blocks of each.
        groups: of the normalisation, which divides each of the widths.
        d_model: D, of the neck and the map it gives.
        heads: N, of the neck.
        layers: of self-attention over the coarsest map.
        d_ff: F, of the neck.
        dropout: of the neck.
    """

    widths: tuple[int, ...] = (24, 64, 128)
    blocks: tuple[int, ...] = (0, 1, 2)
    groups: int = 8
    d_model: int = 96
    heads: int = 4
    layers: int = 2
    d_ff: int = 192
    dropout: float = 0.1

    def __post_init__(self):
        if len(self.widths) != len(self.blocks) or len(self.widths) < 2:
            raise ValueError(
                "widths and blocks must have a number for each stride, two at least; "
                f"got {self.widths} and {self.blocks}."
            )
        uneven = [width for width in self.widths if width % self.groups]
        if uneven:
            raise ValueError(
                f"groups must divide all widths; got {self.groups} and {uneven[0]}."
            )
        if self.d_model % self.heads or self.d_model % 4:
            raise ValueError(
                f"heads and 4 must divide d_model; got {self.heads} and {self.d_model}."
            )


class Conv(nnx.Conv):
    """A convolution (B, H, W, C) -> (B, ceil(H / stride), ceil(W / stride), D)."""

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        size: int = 3,
        stride: int = 1,
        bias: float = 0.0,
        rngs: nnx.Rngs,
    ):
        """size: of the window; bias: what it starts from."""
        super().__init__(
            channels,
            width,
            (size, size),
            strides=stride,
            kernel_init=nnx.initializers.he_normal(),
            bias_init=nnx.initializers.constant(bias),
            kernel_metadata={"axes": (None, None, None, "embed")},
            bias_metadata={"axes": ("embed",)},
            rngs=rngs,
        )


def group_norm(width: int, groups: int, rngs: nnx.Rngs) -> nnx.GroupNorm:
    """A norm of groups of channels over the whole map (Wu and He 2018, arXiv 1803.08494)."""
    return nnx.GroupNorm(
        width,
        num_groups=groups,
        scale_metadata={"axes": ("embed",)},
        bias_metadata={"axes": ("embed",)},
        rngs=rngs,
    )


class ResidualBlock(nnx.Module):
    """x + conv(act(norm(conv(act(norm(x)))))) (He et al. 2016, arXiv 1603.05027)."""

    def __init__(self, width: int, groups: int, *, rngs: nnx.Rngs):
        self.norms = nnx.List(group_norm(width, groups, rngs) for _ in range(2))
        self.convs = nnx.List(Conv(width, width, rngs=rngs) for _ in range(2))

    def __call__(self, x: Array) -> Array:
        y = x
        for norm, conv in zip(self.norms, self.convs):
            y = conv(jax.nn.silu(norm(y)))
        return x + y


class ConvNet(nnx.Module):
    """Pictures (B, H, W, 3) -> a map for each of the strides 2, 4, 8 ..., finest first."""

    def __init__(
        self,
        widths: tuple[int, ...],
        blocks: tuple[int, ...],
        *,
        groups: int,
        rngs: nnx.Rngs,
    ):
        """widths, blocks, groups: see PyramidConfig."""
        before = (3, *widths)
        self.down = nnx.List(
            Conv(channels, width, stride=2, rngs=rngs)
            for channels, width in zip(before, widths)
        )
        self.stages = nnx.List(
            nnx.List(ResidualBlock(width, groups, rngs=rngs) for _ in range(count))
            for width, count in zip(widths, blocks)
        )
        self.norms = nnx.List(group_norm(width, groups, rngs) for width in widths)

    def __call__(self, images: Array) -> list[Array]:
        """images: (B, H, W, 3) floating, about 0."""
        x, maps = pin(images, "batch"), []
        for down, stage, norm in zip(self.down, self.stages, self.norms):
            x = down(x)
            for block in stage:
                x = block(x)
            x = jax.nn.silu(norm(x))
            maps.append(x)
        return maps


class Pyramid(nnx.Module):
    """Pictures (B, H, W, 3) -> one map (B, ceil(H / s), ceil(W / s), D), s the last stride but one.

    The coarsest map's cells attend to each other, with sinusoids of their places added; the result
    is added to the next finer map.
    Source: the hybrid encoder of RT-DETR (Zhao et al. 2023, arXiv 2304.08069), with one fusion.
    """

    def __init__(self, config: PyramidConfig, *, rngs: nnx.Rngs):
        D = config.d_model
        self.net = ConvNet(
            config.widths, config.blocks, groups=config.groups, rngs=rngs
        )
        self.coarse = Conv(config.widths[-1], D, size=1, rngs=rngs)
        self.fine = Conv(config.widths[-2], D, size=1, rngs=rngs)
        self.layers = nnx.List(
            EncoderBlock(
                D,
                attention={"heads": config.heads},
                feed_forward={"d_ff": config.d_ff, "activation": "silu"},
                residual={
                    "place": "pre",
                    "dropout_rate": config.dropout,
                    "dtype": jnp.float32,
                },
                rngs=rngs,
            )
            for _ in range(config.layers)
        )
        self.fuse = Conv(D, D, rngs=rngs)
        self.stride = 2 ** (len(config.widths) - 1)

    def __call__(self, images: Array, *, rng: Array | None = None) -> Array:
        """images: (B, H, W, 3) floating, about 0; rng draws the dropout, None: none."""
        *_, fine, coarse = self.net(images)
        x = self.coarse(coarse)
        B, H, W, D = x.shape
        x = (x + grid_sinusoids(H, W, D)[None]).reshape(B, H * W, D)
        for layer, layer_rng in zip(self.layers, split_rng(rng, len(self.layers))):
            x = layer(x, mask=None, rng=layer_rng)
        x = jnp.repeat(jnp.repeat(x.reshape(B, H, W, D), 2, axis=1), 2, axis=2)
        x = x[:, : fine.shape[1], : fine.shape[2]] + self.fine(fine)
        return x + self.fuse(jax.nn.silu(x))


def grid_sinusoids(height: int, width: int, d_model: int) -> Array:
    """Encodings of the cells of a map, (H, W, D): half of D for its row, half for its column."""
    halves = (sinusoids(jnp.arange(n), d_model // 2) for n in (height, width))
    rows, columns = halves
    shape = (height, width, d_model // 2)
    return jnp.concatenate(
        [
            jnp.broadcast_to(rows[:, None], shape),
            jnp.broadcast_to(columns[None], shape),
        ],
        axis=-1,
    )
