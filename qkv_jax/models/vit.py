"""The Vision Transformer of Dosovitskiy et al. 2021 (arXiv 2010.11929), for small and for long images.

Differences: the classes read the mean of the last states and not a token of their own (Beyer et
al. 2022, arXiv 2205.01580); a patch's position is the sum of a learned vector for its row and one
for its column; attention may be local in two dimensions or axial.
"""

import functools
import itertools
from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from qkv_jax.layers import (
    EncoderBlock,
    Linear,
    Remat,
    check_remat,
    make_norm,
    run_blocks,
)
from qkv_jax.models.image_classification import (
    PixelChanges,
    check_sizes,
    class_logits,
    class_loss,
)
from qkv_jax.ops import dropout, patterns, pin_stream, split_rng
from qkv_jax.ops.pixels import patches

Array = jax.Array
Attention = Literal["full", "local", "rows", "columns"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes and choices of the model.

    Attributes:
        height, width, channels, classes: of the images; 0: the data's.
        sheet: cells a side of a large image that small ones are laid out on, each of which is
            classified: `sheet ** 2` rows of a batch, in order, are one such image. 1: each row is
            an image by itself.
        cell: pixels a side of a cell, in whose middle the image stands; 0: the image's own.
        patch: pixels a side of a patch.
        stem: what makes patches vectors: "linear" maps (as published), or "convolution": pairs of
            a 3 x 3 convolution and halving, as many as make the patch, a power of 2 (Xiao et al.
            2021, arXiv 2106.14881).
        d_model, d_ff, heads, layers: D, F, N, L.
        attention: who attends to whom, layer by layer, from the start again when all are used:
            "full"; "local": patches up to `radius` rows and columns away; "rows" and "columns":
            patches of the same row, or column.
        radius: of "local".
        dropout: on each sublayer's output, and on the first vectors.
        augmentation, label_smoothing, flip_average: see `image_classification.Settings`.
        dtype: of the computation; parameters are float32 always.
        remat, scan_layers: what training keeps of each layer for its backward pass, and whether the
            layers are one loop, see `run_blocks`; the loop's attention is of one pattern.
    """

    height: int = 0
    width: int = 0
    channels: int = 0
    classes: int = 0
    sheet: int = 1
    cell: int = 0
    patch: int = 4
    stem: Literal["linear", "convolution"] = "linear"
    d_model: int = 96
    d_ff: int = 192
    heads: int = 4
    layers: int = 6
    attention: tuple[Attention, ...] = ("full",)
    radius: int = 3
    dropout: float = 0.0
    augmentation: PixelChanges = field(default_factory=PixelChanges)
    label_smoothing: float = 0.1
    flip_average: bool = True
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    remat: Remat = "none"
    scan_layers: bool = False

    def __post_init__(self):
        if not self.attention:
            raise ValueError("attention must name at least one pattern; got ().")
        check_remat(self.remat)
        if self.scan_layers and len(set(self.attention)) > 1:
            raise ValueError(
                f"scan_layers needs attention of one pattern; got {self.attention}: leave "
                "scan_layers False."
            )
        if self.stem == "convolution" and self.patch & (self.patch - 1):
            raise ValueError(
                f"patch must be a power of 2 for the stem 'convolution'; got {self.patch}."
            )
        if self.cell and self.cell < max(self.height, self.width):
            raise ValueError(
                f"cell must hold an image of {self.height} x {self.width}; got {self.cell}."
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of one (large) image."""
        sides = (self.cell or self.height, self.cell or self.width)
        for side in sides:
            if side % self.patch:
                raise ValueError(
                    f"patch must divide the cell, or the image, of {sides[0]} x {sides[1]} "
                    f"pixels; got {self.patch}."
                )
        rows, columns = (self.sheet * side // self.patch for side in sides)
        return rows, columns


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
        D, dtype = config.d_model, jnp.dtype(config.dtype)
        self.stem = Stem(config, rngs=rngs)
        self.rows, self.columns = (
            nnx.Param(
                nnx.initializers.normal(0.02)(rngs.params(), (count, D), jnp.float32),
                axes=(None, "embed"),
            )
            for count in config.grid
        )
        residual = {"place": "pre", "dropout_rate": config.dropout, "dtype": dtype}
        self.blocks = nnx.List(
            EncoderBlock(
                D,
                attention={"heads": config.heads, "dtype": dtype},
                feed_forward={"d_ff": config.d_ff, "activation": "gelu_tanh"}
                | {"dtype": dtype},
                residual=residual,
                rngs=rngs,
            )
            for _ in range(config.layers)
        )
        self.norm = make_norm(D, "layer", 1e-5, dtype, rngs)
        self.head = nnx.Linear(
            D,
            config.classes,
            kernel_init=nnx.initializers.zeros,
            kernel_metadata={"axes": ("embed", "vocab")},
            bias_metadata={"axes": ("vocab",)},
            rngs=rngs,
        )

    def __call__(self, images: Array, *, rng: Array | None = None) -> Array:
        """Logits of images; rng draws the dropout, None: none.

        Raises:
            ValueError: the number of images does not fill whole sheets.
        """
        config = self.config
        rngs = split_rng(rng, config.layers + 1)
        x = self.stem(self.sheets(images * 2 - 1))
        B, rows, columns, D = x.shape
        x = x + self.rows[...][None, :, None] + self.columns[...][None, None]
        x = dropout(x.reshape(B, rows * columns, D), config.dropout, rngs[0])
        x = pin_stream(x)
        kinds = itertools.cycle(config.attention)
        layers = zip(kinds, self.blocks, rngs[1:])
        for kind, alike in itertools.groupby(layers, key=lambda layer: layer[0]):
            _, blocks, drawn = zip(*alike)
            x = run_blocks(
                blocks,
                x,
                drawn,
                functools.partial(attend, kind, (rows, columns), config.radius),
                remat=config.remat,
                scan=config.scan_layers,
            )
        return self.head(self.pooled(self.norm(x)))

    def sheets(self, images: Array) -> Array:
        """Small images (B, height, width, C) -> large ones, (B / sheet**2, ...); see Config."""
        side, (B, height, width, C) = self.config.sheet, images.shape
        if B % side**2:
            raise ValueError(
                f"sheets of {side} x {side} images need batches of a multiple of {side**2} rows; "
                f"got {B}."
            )
        cell = self.config.cell
        if cell:
            free = (cell - height, cell - width)
            edges = ((free[0] // 2, -(-free[0] // 2)), (free[1] // 2, -(-free[1] // 2)))
            images = jnp.pad(images, ((0, 0), *edges, (0, 0)), constant_values=-1.0)
            height = width = cell
        x = images.reshape(-1, side, side, height, width, C)
        return x.swapaxes(2, 3).reshape(-1, side * height, side * width, C)

    def pooled(self, x: Array) -> Array:
        """States (B, P, D) of large images -> their means over each small one, (rows, D)."""
        side, (rows, columns) = self.config.sheet, self.config.grid
        D = x.shape[-1]
        x = x.reshape(-1, side, rows // side, side, columns // side, D)
        return x.mean(axis=(2, 4)).reshape(-1, D)

    def loss(
        self, batch: dict[str, Array], *, rng: Array | None
    ) -> tuple[Array, dict[str, Array]]:
        """See `image_classification.class_loss`."""
        return class_loss(self, batch, rng=rng)

    def predict(self, batch: dict[str, Array]) -> dict[str, Array]:
        """See `image_classification.class_logits`."""
        return class_logits(self, batch)


class Stem(nnx.Module):
    """Images (B, height, width, C) -> vectors of their patches (B, rows, columns, D)."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        """Builds the maps, see Config.stem."""
        D, dtype = config.d_model, jnp.dtype(config.dtype)
        self.patch = config.patch
        self.convolutions: nnx.List[nnx.Conv] = nnx.List()
        width, size = config.channels, config.patch
        if config.stem == "convolution":
            while size > 1:
                size //= 2
                out = D // max(2, size)
                self.convolutions.append(
                    nnx.Conv(
                        width,
                        out,
                        (3, 3),
                        strides=2,
                        dtype=dtype,
                        kernel_metadata={"axes": (None, None, None, "embed")},
                        bias_metadata={"axes": ("embed",)},
                        rngs=rngs,
                    )
                )
                width = out
        self.out = Linear(
            width * size**2,
            D,
            dtype=dtype,
            kernel_metadata={"axes": (None, "embed")},
            bias_metadata={"axes": ("embed",)},
            rngs=rngs,
        )
        self.size = size

    def __call__(self, images: Array) -> Array:
        """See the class."""
        x = images
        for convolution in self.convolutions:
            x = jax.nn.relu(convolution(x))
        return self.out(patches(x, self.size))


def attend(
    kind: Attention,
    grid: tuple[int, int],
    radius: int,
    block: EncoderBlock,
    x: Array,
    rng: Array | None,
) -> Array:
    """One block on patches (B, rows * columns, D), row by row."""
    rows, columns = grid
    if kind == "full":
        return block(x, mask=None, rng=rng)
    if kind == "local":
        return block(x, mask=patterns.local_2d(rows, columns, radius), rng=rng)
    if kind == "rows":
        return block(x, mask=patterns.axial(rows, columns, 1), rng=rng)
    # Laid out column by column, what a patch attends to stands together, and whole blocks of
    # pairs are skipped; row by row, each block would hold some pair.
    B, _, D = x.shape
    x = x.reshape(B, rows, columns, D).swapaxes(1, 2).reshape(B, -1, D)
    x = block(x, mask=patterns.axial(columns, rows, 1), rng=rng)
    return x.reshape(B, columns, rows, D).swapaxes(1, 2).reshape(B, -1, D)
