"""Vectors of subwords, in the plane in which they differ most."""

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qkv_jax.viz.figures import fonts, label, save, set_title

_COLOURS = ("#e4572e", "#4c78a8", "#777777", "#54a24b", "#b279a2")
_SIDE = 9.0  # inches of a panel
_ROOM = 1.5  # pixels around a name: what is saved is laid out anew, for its resolution.


class Points(NamedTuple):
    """Vectors to draw, those first whose names matter most.

    Attributes:
        vectors: (n, D).
        names: n strings.
        groups: n strings, such as the language of each.
    """

    vectors: np.ndarray
    names: Sequence[str]
    groups: Sequence[str]


def principal_components(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two coordinates in which vectors (n, D) vary most, (n, 2), and their shares of the variance.

    The sign of each is such that its longest loading is positive.
    """
    centred = np.asarray(vectors, float) - np.mean(vectors, axis=0)
    _, sizes, axes = np.linalg.svd(centred, full_matrices=False)
    axes = np.vstack([axes, np.zeros((2, axes.shape[1]))])[:2]
    longest = np.abs(axes).argmax(axis=1)[:, None]
    axes = axes * np.where(np.take_along_axis(axes, longest, 1) < 0, -1, 1)
    power = np.append(sizes**2, [0, 0])
    return centred @ axes.T, power[:2] / (power.sum() or 1.0)


def plot_embeddings(
    tables: Mapping[str, Points],
    path: str | os.PathLike[str],
    *,
    title: str | None = None,
) -> Figure:
    """Draws each table's vectors by their first two principal components, and saves the picture.

    A colour is a group. Names stand beside their points, the first first, where there is room.

    Args:
        tables: by what stands above each panel: one for each table, since the coordinates of two
            have nothing to do with each other.
        path: picture to write; its suffix names the format (png, pdf, svg).
        title: stands above the panels.

    Returns:
        The figure, as saved.

    Raises:
        ValueError: a table has fewer than 2 vectors, or not a name and a group for each.
        OSError: the file cannot be written.
    """
    figure = Figure(figsize=(_SIDE * len(tables), _SIDE * 0.85), layout="constrained")
    for place, (name, points) in enumerate(tables.items(), 1):
        sizes = {len(part) for part in points}
        if len(sizes) > 1 or min(sizes) < 2:
            raise ValueError(
                f"{name} must have at least 2 vectors, and as many names and groups; got "
                f"{[len(part) for part in points]}."
            )
        axes = figure.add_subplot(1, len(tables), place)
        axes.set_title(name, fontsize=11)
        _draw_points(axes, points)
    if title:
        set_title(figure, title)
    figure.draw_without_rendering()  # Settles the axes, in which names need room.
    for axes, points in zip(figure.axes, tables.values()):
        _draw_names(axes, points)
    save(figure, path)
    return figure


def _draw_points(axes: Axes, points: Points) -> None:
    places, shares = principal_components(points.vectors)
    kinds = sorted(set(points.groups), reverse=True)
    for number, kind in enumerate(kinds):
        own = [i for i, group in enumerate(points.groups) if group == kind]
        axes.plot(
            *places[own].T,
            ".",
            color=_COLOURS[number % len(_COLOURS)],
            label=f"{kind} ({len(own)})",
            markersize=5,
            zorder=number,
        )
    axes.set_xlabel(f"component 1: {shares[0]:.1%} of the variance")
    axes.set_ylabel(f"component 2: {shares[1]:.1%} of the variance")
    axes.legend(fontsize=9, loc="best", framealpha=0.7)
    axes.grid(alpha=0.2)
    axes.margins(0.06)


def _draw_names(axes: Axes, points: Points) -> None:
    """Names that overlap neither each other nor the frame."""
    places, _ = principal_components(points.vectors)
    kinds = sorted(set(points.groups), reverse=True)
    taken = np.zeros((0, 4))
    frame = axes.get_window_extent()
    legend = axes.get_legend()
    if legend is not None:
        taken = np.vstack([taken, legend.get_window_extent().extents])
    for place, name, group in zip(places, points.names, points.groups):
        text = axes.annotate(
            label(name),
            place,
            (3, 1),
            textcoords="offset points",
            fontsize=7,
            color=_COLOURS[kinds.index(group) % len(_COLOURS)],
            fontfamily=fonts(),
            parse_math=False,
        )
        x0, y0, x1, y1 = box = text.get_window_extent().padded(_ROOM).extents
        free = (
            (taken[:, 0] > x1)
            | (taken[:, 2] < x0)
            | (taken[:, 1] > y1)
            | (taken[:, 3] < y0)
        )
        inside = frame.x0 < x0 and x1 < frame.x1 and frame.y0 < y0 and y1 < frame.y1
        if free.all() and inside:
            taken = np.vstack([taken, box])
        else:
            text.remove()
