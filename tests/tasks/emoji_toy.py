"""Pictures of coloured corners with their names in two languages, and a model small enough for tests."""

import json
from pathlib import Path

import numpy as np

from qkv_jax.models import image_text
from qkv_jax.ops.images import Augmentation

COLOURS = {"red": "rot", "green": "grün", "blue": "blau", "white": "weiß"}
CORNERS = {"top left": "oben links", "bottom right": "unten rechts"}
PAINT = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255))


def write(directory: Path) -> Path:
    """Files as `CaptionedImages` reads them, of the styles "flat" and "round": 16 pictures."""
    rows, flat = [], np.zeros((16, 16, 16, 3), np.uint8)
    for at in range(16):
        colour, corner = at % 4, at // 4 % 2
        names = list(COLOURS.items())[colour], list(CORNERS.items())[corner]
        split = "test" if at >= 14 else "valid" if at >= 12 else "train"
        name_en, name_de = (f"{names[0][k]} {names[1][k]}" for k in range(2))
        rows.append({"split": split, "name_en": name_en, "name_de": name_de})
        place = slice(8 * corner, 8 * corner + 8)
        flat[at, place, place] = PAINT[colour]
    directory.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (directory / "emoji.jsonl").write_text(lines, encoding="utf-8")
    np.savez(directory / "flat_64.npz", images=flat)
    np.savez(directory / "round_64.npz", images=flat // 2 + 60)
    return directory


def tiny(**sizes: int) -> image_text.Config:
    return image_text.Config(
        **sizes,
        widths=(8, 8),
        blocks=(0, 0),
        d_model=16,
        heads=2,
        d_ff=16,
        image_layers=1,
        text_layers=1,
        caption_layers=1,
        width=8,
        augmentation=Augmentation(flip=""),
    )
