"""One number of every head of every layer, at a glance."""

import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from qkv_jax.viz.figures import by_kind, save, set_title

_CELL = (0.82, 0.52)  # inches
_MOST_BESIDE = 16  # heads of all panels together; more stand below each other.


def plot_heads(
    values: Mapping[str, Sequence[float]],
    path: str | os.PathLike[str],
    *,
    label: str,
    notes: Mapping[str, Sequence[str]] | None = None,
    title: str | None = None,
) -> Figure:
    """Draws a number of each head as a cell, with layers down, in a panel for each kind of layer.

    Args:
        values: of each layer by name, such as "encoder.0.attention": N numbers, all at least 0.
        path: picture to write; its suffix names the format (png, pdf, svg).
        label: what the numbers are, with their unit.
        notes: of each layer, N short texts to stand under the numbers, such as roles; those cells
            get a frame.
        title: stands above the panels.

    Returns:
        The figure, as saved.

    Raises:
        ValueError: there is no layer.
        OSError: the file cannot be written.
    """
    kinds = by_kind(values)
    if not kinds:
        raise ValueError("values must hold at least one layer; got none.")
    heads = [max(len(values[name]) for name in names) for names in kinds.values()]
    layers = [len(names) for names in kinds.values()]
    across, down = _CELL
    beside = sum(heads) <= _MOST_BESIDE
    shape = (1, len(kinds)) if beside else (len(kinds), 1)
    width = sum(heads) if beside else max(heads)
    height = max(layers) if beside else sum(layers)
    gaps = len(kinds)
    figure = Figure(
        figsize=(
            across * width + 1.2 * (gaps if beside else 1) + 1.2,
            max(down * height + 0.9 * (1 if beside else gaps) + 0.5, 2.8),
        ),
        layout="constrained",
    )
    ratios = {"width_ratios": heads} if beside else {"height_ratios": layers}
    panels = figure.subplots(*shape, squeeze=False, gridspec_kw=ratios).ravel()
    most = max(max(numbers) for numbers in values.values()) or 1.0
    for axes, (kind, names) in zip(panels, kinds.items()):
        grid = np.full((len(names), max(len(values[name]) for name in names)), np.nan)
        for row, name in enumerate(names):
            grid[row, : len(values[name])] = values[name]
        image = axes.imshow(grid, cmap="viridis", vmin=0, vmax=most, aspect="auto")
        axes.set_title(kind, fontsize=10)
        axes.set_xticks(range(grid.shape[1]), range(1, grid.shape[1] + 1))
        axes.set_xlabel("head")
        axes.set_yticks(range(len(names)), [x.rpartition(".")[0] for x in names])
        axes.tick_params(labelsize=8, length=0)
        axes.spines[:].set_visible(False)
        for row, name in enumerate(names):
            for head, value in enumerate(values[name]):
                note = notes[name][head] if notes else ""
                axes.text(
                    head,
                    row,
                    f"{value:.2f}" + (f"\n{note}" if note else ""),
                    ha="center",
                    va="center",
                    fontsize=7.5,
                    color="white" if value < 0.6 * most else "black",
                )
                if note:
                    place = (head - 0.47, row - 0.46)
                    axes.add_patch(
                        Rectangle(place, 0.94, 0.92, fill=False, ec="#e4572e", lw=1.6)
                    )
    figure.colorbar(image, ax=panels, label=label, aspect=25)
    if title:
        set_title(figure, title)
    save(figure, path)
    return figure
