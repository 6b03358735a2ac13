"""All heads of a model on one sentence, as a page to hover over."""

import base64
import html
import json
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qkv_jax.viz.figures import by_kind, printable

_LEVELS = (
    65535  # Weights are kept to 16 bits: 3 digits, in half the room of these as text.
)


class Heads(NamedTuple):
    """Attention of one layer.

    Attributes:
        weights: (N, T, S), of 0 to 1.
        asks: T tokens.
        seen: S tokens, which are looked at.
    """

    weights: np.ndarray
    asks: Sequence[str]
    seen: Sequence[str]


def write_page(
    layers: Mapping[str, Heads],
    path: str | os.PathLike[str],
    *,
    title: str,
) -> None:
    """Writes a page of HTML with every head of the layers, for any browser, on- or offline.

    A small picture stands for each head; choosing one by mouse or keys shows it in large, and
    choosing a token shows what it looks at, with the numbers. All is in the one file: it loads
    nothing. 6 layers of 8 heads on each side take 0.7 MB for 40 tokens.

    Args:
        layers: by name, such as "decoder.0.cross"; those of one kind have the same tokens.
        path: file to write.
        title: of the page; any text.

    Raises:
        ValueError: there is no layer, weights do not fit the tokens, or tokens differ within a
            kind.
        OSError: the file cannot be written.
    """
    if not layers:
        raise ValueError("layers must hold at least one; got none.")
    kinds = [_kind(name, names, layers) for name, names in by_kind(layers).items()]
    data = json.dumps({"title": printable(title), "kinds": kinds})
    # Nothing in a script element may look like its end, or like a comment.
    for mark in "<>&":
        data = data.replace(mark, f"\\u{ord(mark):04x}")
    template = resources.files("qkv_jax.viz").joinpath("page.html").read_text("utf-8")
    head, rest = template.split("{{title}}")
    middle, end = rest.split("{{data}}")
    page = head + html.escape(printable(title)) + middle + data + end
    Path(path).write_text(page, encoding="utf-8")


def _kind(
    kind: str, names: Sequence[str], layers: Mapping[str, Heads]
) -> dict[str, Any]:
    asks, seen = layers[names[0]].asks, layers[names[0]].seen
    content = []
    for name in names:
        layer = layers[name]
        weights = np.asarray(layer.weights, float)
        expected = (len(asks), len(seen))
        if weights.ndim != 3 or weights.shape[1:] != expected or not weights.size:
            raise ValueError(
                f"{name}: weights must be (N, T, S) with T = {len(asks)} and S = {len(seen)} "
                f"tokens, none of them 0; got shape {weights.shape}."
            )
        if [*layer.asks] != [*asks] or [*layer.seen] != [*seen]:
            raise ValueError(f"{name} has other tokens than {names[0]}.")
        levels = np.rint(weights.clip(0, 1) * _LEVELS).astype("<u2")
        packed = base64.b64encode(levels.tobytes()).decode("ascii")
        content.append({"name": name, "heads": len(weights), "weights": packed})
    return {
        "name": kind,
        "asks": [printable(token) for token in asks],
        "seen": [printable(token) for token in seen],
        "layers": content,
    }
