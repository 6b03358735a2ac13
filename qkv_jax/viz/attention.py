"""What tokens look at: one layer of attention over a sentence."""

import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle

from qkv_jax.viz.figures import fonts, label, save, set_title

_HEAD_WIDTH = 1.1  # inches, at least


def plot_attention(
    weights: Any,
    source_tokens: Sequence[str],
    target_tokens: Sequence[str],
    path: str | os.PathLike[str],
    *,
    links: Iterable[tuple[int, int]] = (),
    title: str | None = None,
) -> Figure:
    """Draws attention of target tokens (down) to source tokens (across), and saves the picture.

    Of several heads, the mean stands above with the tokens, and each head below in small, in a
    colour scale of their own. Sizes follow the number of tokens; a token over 18 characters is
    cut. A script for which no font is installed shows as boxes.

    Args:
        weights: (N, T, S) or (T, S) array, at least 0; rows usually sum to 1.
        source_tokens: S strings.
        target_tokens: T strings.
        path: picture to write; its suffix names the format (png, pdf, svg).
        links: pairs (source, target) of places, from 0, to be framed.
        title: stands above the picture.

    Returns:
        The figure, as saved.

    Raises:
        ValueError: weights' shape does not fit the tokens, or has a 0.
        OSError: the file cannot be written.

    Source: Bahdanau et al. 2015, arXiv 1409.0473, fig. 3.
    """
    weights = np.asarray(weights, dtype=float)
    _check_weights(weights, len(target_tokens), len(source_tokens))
    weights = weights.reshape(-1, len(target_tokens), len(source_tokens))
    source = [label(token) for token in source_tokens]
    target = [label(token) for token in target_tokens]
    count = len(weights) if len(weights) > 1 else 0
    columns = min(count, 4) or 1
    rows = math.ceil(count / columns)

    cell = _cell_inches(len(target), len(source), columns if count else 0)
    # Room for the colour bars' labels.
    height = max(cell * len(target), 2.3 if count else 1.3)
    width = max(cell * len(source), 1.3)
    small = max(height / columns, 1.0)
    figure = Figure(
        figsize=(
            width + 0.09 * max(map(len, target)) + 1.8,
            height + 0.09 * max(map(len, source)) + 1.0 + rows * (small + 0.35),
        )
    )
    figure.set_layout_engine("constrained", w_pad=0.06, h_pad=0.06)
    grid = figure.add_gridspec(
        1 + rows, columns, height_ratios=[height] + rows * [small]
    )
    main = figure.add_subplot(grid[0, :])
    image = _draw_weights(main, weights.mean(axis=0), scale=weights.mean(axis=0).max())
    _draw_tokens(main, source, target, font_size=min(max(cell * 40, 6), 10))
    for column, row in links:
        place = (column - 0.5, row - 0.5)
        main.add_patch(Rectangle(place, 1, 1, fill=False, ec="#e4572e", lw=1.4))
    name = "attention weight" + (", mean of heads" if count else "")
    figure.colorbar(image, ax=main, label=name, aspect=25)
    if count:
        places = [grid[1 + i // columns, i % columns] for i in range(count)]
        _draw_heads(figure, places, weights)
    if title:
        set_title(figure, title)
    save(figure, path)
    return figure


def _check_weights(weights: np.ndarray, targets: int, sources: int) -> None:
    fits = weights.ndim in (2, 3) and weights.shape[-2:] == (targets, sources)
    if not fits or not weights.size:
        raise ValueError(
            f"weights must be (N, T, S) or (T, S) with T = {targets} target tokens and "
            f"S = {sources} source tokens, none of them 0; got shape {weights.shape}."
        )


def _cell_inches(targets: int, sources: int, columns: int) -> float:
    """Side of a token's cell: small for many tokens, wide enough for a row of heads."""
    cell = min(max(10 / max(targets, sources), 0.18), 0.42)
    return max(cell, min(columns * _HEAD_WIDTH / sources, 5 / targets))


def _draw_weights(axes: Axes, weights: np.ndarray, *, scale: float) -> AxesImage:
    image = axes.imshow(weights, cmap="Blues", vmin=0, vmax=scale or 1)
    image.set_interpolation("nearest")
    axes.set_aspect("auto")
    return image


def _draw_tokens(
    axes: Axes, source: Sequence[str], target: Sequence[str], *, font_size: float
) -> None:
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("source")
    axes.set_ylabel("target")
    axes.set_xticks(range(len(source)), source, rotation=90)
    axes.set_yticks(range(len(target)), target)
    for text in [*axes.get_xticklabels(), *axes.get_yticklabels()]:
        text.set(fontsize=font_size, fontfamily=fonts(), parse_math=False)
    axes.set_xticks(np.arange(0.5, len(source) - 1), minor=True)
    axes.set_yticks(np.arange(0.5, len(target) - 1), minor=True)
    axes.grid(which="minor", color="0.9", linewidth=0.5)
    axes.tick_params(which="major", length=2)
    axes.tick_params(which="minor", length=0)


def _draw_heads(figure: Figure, places: Sequence[Any], weights: np.ndarray) -> None:
    """One picture a head, without tokens, in a common colour scale."""
    panels = [figure.add_subplot(place) for place in places]
    for number, (axes, head) in enumerate(zip(panels, weights, strict=True), start=1):
        image = _draw_weights(axes, head, scale=weights.max())
        axes.set(xticks=[], yticks=[])
        axes.set_title(f"head {number}", fontsize=8)
    bar = figure.colorbar(image, ax=panels, aspect=25)
    bar.set_label("attention weight", fontsize=8)
    bar.ax.tick_params(labelsize=8)
