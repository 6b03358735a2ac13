"""A run's metrics over its steps."""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, StrMethodFormatter

from qkv_jax.viz.figures import save, set_title

_TRAIN, _VALIDATION, _SECOND = "#4c78a8", "#e4572e", "#54a24b"


class _Curve(NamedTuple):
    """A key of the metrics; `best` is min or max where the legend names the best value."""

    key: str
    label: str
    colour: str
    best: Callable | None = None
    noisy: bool = True


class _Panel(NamedTuple):
    title: str
    unit: str
    curves: tuple[_Curve, ...]
    scale: str = "linear"


def _pair(title: str, unit: str, key: str, best: Callable) -> _Panel:
    """Training and validation of one quantity."""
    train = _Curve(f"train/{key}", "training", _TRAIN)
    validation = _Curve(f"validation/{key}", "validation", _VALIDATION, best)
    return _Panel(title, unit, (train, validation))


_QUALITY = (
    _Curve("validation/bleu", "BLEU", _VALIDATION, max),
    _Curve("validation/chrf", "chrF", _SECOND, max),
)
_RATE = _Curve("train/learning_rate", "", _TRAIN, noisy=False)
_SPEED = _Curve("train/tokens_per_second", "", _TRAIN)
_NORM = _Curve("train/grad_norm", "", _TRAIN)

_PANELS = (
    _pair("Loss", "mean over the training units", "loss", min),
    _pair("Negative log-likelihood", "nats per target token", "nll", min),
    _pair("Token accuracy", "share of target tokens", "correct", max),
    _pair("Accuracy", "share of examples", "accuracy", max),
    _Panel("Translation quality", "validation score (0 to 100)", _QUALITY),
    _Panel("Learning rate", "learning rate", (_RATE,)),
    _Panel("Throughput", "units per second", (_SPEED,)),
    _Panel("Gradient norm", "norm before clipping", (_NORM,), "log"),
)

# Short spellings of the groups of keys.
_GROUPS = {"": "train", "valid": "validation"}
_EVALUATION = ("valid", "validation")


def plot_curves(
    metrics: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
    path: str | os.PathLike[str],
    *,
    title: str | None = None,
) -> Figure:
    """Draws a run's metrics over its steps, one panel a quantity, and saves the picture.

    Panels without data are left out; keys that no panel knows, and values that are not finite,
    are passed over. Of several values of one step the last counts. Long noisy curves are drawn
    faintly under their running mean.

    Args:
        metrics: metrics.jsonl, or its rows: `step` and any of loss, nll (nats per target token),
            correct, accuracy, learning_rate, tokens_per_second, grad_norm, each bare or with
            `train/` before it; of evaluations loss, nll, correct, bleu, chrf and any other
            metric after `validation/` or `valid/`.
        path: picture to write; its suffix names the format (png, pdf, svg).
        title: stands above the panels.

    Returns:
        The figure, as saved.

    Raises:
        ValueError: a line is not JSON (a last one cut short is passed over), or there is nothing
            to draw.
        OSError: a file cannot be read or written.
    """
    if isinstance(metrics, str | os.PathLike):
        metrics = _read(Path(metrics))
    series = _series(metrics)
    panels = [p for p in _PANELS if any(curve.key in series for curve in p.curves)]
    panels += _other_panels(series)
    if not panels:
        keys = ", ".join(curve.key for panel in _PANELS for curve in panel.curves)
        raise ValueError(
            f"metrics must have rows with `step` and any of {keys}; got none."
        )
    columns = min(len(panels), 2 if len(panels) == 4 else 3)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.1 * rows + 0.3), layout="constrained")
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
    last = max(
        series[c.key][0][-1] for p in panels for c in p.curves if c.key in series
    )
    for place, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, place)
        for curve in panel.curves:
            if curve.key in series:
                _draw_curve(axes, curve, *series[curve.key])
        _dress(axes, panel, last)
    if title:
        set_title(figure, title)
    save(figure, path)
    return figure


def _other_panels(series: Mapping[str, Any]) -> list[_Panel]:
    """A panel for each metric of evaluations that no other panel has."""
    known = {curve.key for panel in _PANELS for curve in panel.curves}
    names = [key for key in series if key.startswith("validation/")]
    return [
        _Panel(key.removeprefix("validation/"), "", (_Curve(key, "", _VALIDATION),))
        for key in names
        if key not in known
    ]


def _read(path: Path) -> list[Mapping[str, Any]]:
    """Rows of a JSONL file; a killed run may have cut the last one short."""
    lines = path.read_text("utf-8", errors="replace").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(
                    f"{path}: line {number} is not JSON ({error}); remove the line."
                ) from error
    return rows


def _series(
    rows: Iterable[Mapping[str, Any]],
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Key with its full prefix -> steps, ascending, and finite values at them."""
    known = {curve.key for panel in _PANELS for curve in panel.curves}
    points: dict[str, dict[int, float]] = {}
    for row in rows:
        for name, value in row.items():
            group, _, key = name.rpartition("/")
            key = f"{_GROUPS.get(group, group)}/{key}"
            if (
                (key in known or group in _EVALUATION)
                and value is not None
                and math.isfinite(value)
                and "step" in row
            ):
                points.setdefault(key, {})[row["step"]] = value
    ordered = {key: sorted(values.items()) for key, values in points.items()}
    return {key: tuple(np.array(values, float).T) for key, values in ordered.items()}


def _draw_curve(
    axes: Axes, curve: _Curve, steps: np.ndarray, values: np.ndarray
) -> None:
    label, colour = curve.label, curve.colour
    if curve.best:
        best = curve.best(range(len(values)), key=values.__getitem__)
        label += f", best {values[best]:.4g} at step {steps[best]:,.0f}"
        axes.plot(steps[best], values[best], "o", color=colour, markersize=6)
    window = len(values) // 50 * 2 + 1
    if curve.noisy and window >= 5:
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
        padded = np.pad(values, window // 2, mode="edge")
        values = np.convolve(padded, np.full(window, 1 / window), mode="valid")
    marker = "o" if len(steps) == 1 or (curve.best and len(steps) <= 30) else None
    axes.plot(
        steps, values, color=colour, label=label or None, marker=marker, markersize=3
    )


def _dress(axes: Axes, panel: _Panel, last_step: float) -> None:
    axes.set_title(panel.title, fontsize=11)
    axes.set_xlabel("step")
    axes.set_ylabel(panel.unit)
    axes.set_xlim(0, 1.02 * max(last_step, 1))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_yscale(panel.scale)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    if panel.scale == "log":
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
        axes.yaxis.set_minor_formatter(StrMethodFormatter("{x:,g}"))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8, frameon=False)


def plot_rates(
    rates: np.ndarray,
    losses: np.ndarray,
    smoothed: np.ndarray,
    path: str | os.PathLike[str],
    *,
    marks: Mapping[str, float],
    title: str | None = None,
) -> Figure:
    """Draws losses over the learning rates that they were reached with, and saves the picture.

    Args:
        rates, losses, smoothed: (n,) each.
        path: picture to write.
        marks: rates to point out, by what they are.
        title: stands above the curve.

    Returns:
        The figure, as saved.

    Raises:
        OSError: the file cannot be written.
    """
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(rates, losses, color=_TRAIN, linewidth=0.8, alpha=0.3)
    axes.plot(rates, smoothed, color=_TRAIN, label="smoothed")
    styles = ((_VALIDATION, "--"), (_SECOND, ":"), ("#888888", "-."))
    for (label, rate), (colour, style) in zip(marks.items(), styles):
        shown = f"{label}: {rate:.1e}"
        axes.axvline(rate, color=colour, linestyle=style, label=shown)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss of a batch")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    if title:
        set_title(figure, title)
    save(figure, path)
    return figure
