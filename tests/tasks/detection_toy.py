"""Pictures of bright and dark squares, and detectors small enough for tests."""

from pathlib import Path

import numpy as np

from qkv_jax.models import set_prediction
from qkv_jax.models.pyramid import PyramidConfig
from qkv_jax.ops.images import Augmentation

NAMES = ("bright", "dark")
HEIGHT, WIDTH = 24, 40


def scenes(count: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """A bright square and a dark one each, and room for a third box."""
    rng = np.random.default_rng(seed)
    arrays = {
        "image": np.full((count, HEIGHT, WIDTH, 3), 128, np.uint8),
        "boxes": np.zeros((count, 3, 4), np.float32),
        "classes": np.full((count, 3), -1, np.int32),
    }
    for row in range(count):
        for kind, left in enumerate((0, WIDTH // 2)):
            side = rng.integers(8, 13)
            x = left + rng.integers(0, WIDTH // 2 - side)
            y = rng.integers(0, HEIGHT - side)
            arrays["image"][row, y : y + side, x : x + side] = 255 * (1 - kind)
            arrays["boxes"][row, kind] = [x, y, x + side, y + side]
            arrays["classes"][row, kind] = kind
    return arrays


def tiny(kind, *, classes: int = 2):
    """A small Config of a detector's module."""
    more = {"queries": 5, "layers": 2, "heads": 2, "d_ff": 16}
    return kind.Config(
        classes=classes,
        pyramid=PyramidConfig(
            widths=(8, 8),
            blocks=(0, 1),
            groups=4,
            d_model=16,
            heads=2,
            layers=1,
            d_ff=16,
        ),
        augmentation=Augmentation(flip="x"),
        detections=6,
        **(more if kind is set_prediction else {}),
    )


def write(path: Path, *, train: int = 8, valid: int = 2, test: int = 3) -> Path:
    """A file as `BoxedImages` reads it."""
    arrays = scenes(train + valid + test, seed=1)
    rows = arrays["classes"] >= 0
    boxes = [arrays["boxes"][rows], arrays["classes"][rows][:, None]]
    np.savez(
        path,
        images=arrays["image"],
        boxes_xyxy_cls=np.concatenate(boxes, axis=1).astype(np.float32),
        box_offsets=np.append(0, np.cumsum(rows.sum(axis=1))),
        split=np.repeat([0, 1, 2], [train, valid, test]).astype(np.int8),
        class_names=np.asarray(NAMES),
    )
    return path
