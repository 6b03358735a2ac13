"""What pictures share: labels of any script, titles, and how they are saved."""

import os
import warnings
from collections.abc import Iterable

from matplotlib import font_manager
from matplotlib.figure import Figure

DPI = 150
LONGEST_LABEL = 18

# For scripts that matplotlib's own DejaVu Sans lacks; those installed are used.
FALLBACK_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans Devanagari",
    "Noto Sans Bengali",
    "Noto Sans Tamil",
    "Noto Sans Thai",
    "WenQuanYi Micro Hei",
    "Arial Unicode MS",
    "PingFang SC",
    "Microsoft YaHei",
)


def label(token: str) -> str:
    text = printable(token)
    return text if len(text) <= LONGEST_LABEL else text[: LONGEST_LABEL - 1] + "…"


def printable(text: str) -> str:
    """Control characters, new lines and lone surrogates spelled out."""
    spelled = (
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )
    return "".join(spelled)


def fonts() -> list[str]:
    installed = set(font_manager.get_font_names())
    return ["DejaVu Sans", *(font for font in FALLBACK_FONTS if font in installed)]


def set_title(figure: Figure, title: str) -> None:
    figure.suptitle(printable(title), fontfamily=fonts(), parse_math=False)


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    with warnings.catch_warnings():
        # A glyph that no font has is drawn as a box: no reason to stop or to warn.
        warnings.filterwarnings("ignore", r"(?s).*[Gg]lyph", UserWarning)
        figure.savefig(path, dpi=DPI)


def by_kind(layers: Iterable[str]) -> dict[str, list[str]]:
    """Names of attention layers, such as "decoder.1.cross", by what they are of."""
    found: dict[str, list[str]] = {}
    for layer in layers:
        cross = "cross-attention" if layer.endswith("cross") else None
        side = "encoder" if layer.startswith("encoder") else "decoder"
        found.setdefault(cross or f"{side} self-attention", []).append(layer)
    return found
