"""COCO's average precision of detected boxes, and pictures of them.

pycocotools counts where it is installed (`pip install 'qkv-jax[detection]'`); elsewhere the same
sums are made here. Both give the same numbers: tests/peers/test_detection.py.
"""

import contextlib
import dataclasses
import importlib.util
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

Arrays = Mapping[str, np.ndarray]

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
_COLOURS = ("#2ca02c", "#1f4fff", "#e41a1c", "#ff7f0e", "#9467bd", "#17becf")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectionScore:
    """Mean average precision over classes and IoU thresholds 0.50 to 0.95, and at 0.50.

    Attributes:
        pictures: that `draw` makes.
        least_score: of the boxes that `draw` shows.
    """

    pictures: int = 6
    least_score: float = 0.3

    def __call__(
        self, outputs: Arrays, arrays: Arrays, names: Sequence[str]
    ) -> dict[str, float]:
        """Scores in [0, 1]: "map", "ap50", "ap75", and "ap50_<class>".

        Args:
            outputs: boxes (B, Q, 4), scores (B, Q), classes (B, Q); a score of 0 is no box.
            arrays: boxes (B, M, 4), classes (B, M) with -1 where there is none.
            names: of the classes; those without a box in `arrays` do not count.
        """
        installed = importlib.util.find_spec("pycocotools") is not None
        count = _by_pycocotools if installed else average_precisions
        table = count(outputs, arrays, len(names))
        at_50 = {f"ap50_{name}": table[0, k] for k, name in enumerate(names)}
        scores = {
            "map": np.nanmean(table),
            "ap50": np.nanmean(table[0]),
            "ap75": np.nanmean(table[5]),
        } | at_50
        return {name: float(value) for name, value in scores.items()}

    def draw(
        self, outputs: Arrays, arrays: Arrays, names: Sequence[str], directory: Path
    ) -> None:
        """Writes detections.png: boxes found, with the annotated ones dashed."""
        count = min(self.pictures, len(arrays["image"]))
        columns = min(3, count)
        rows = -(-count // columns)
        H, W = arrays["image"].shape[1:3]
        figure = Figure(figsize=(4 * columns, 4 * rows * H / W + 0.4))
        for at in range(count):
            axes = figure.add_subplot(rows, columns, at + 1)
            axes.imshow(arrays["image"][at])
            axes.set_axis_off()
            for box in arrays["boxes"][at][arrays["classes"][at] >= 0]:
                axes.add_patch(_rectangle(box, color="white", linestyle=":"))
            shown = outputs["scores"][at] >= self.least_score
            for box, kind in zip(
                outputs["boxes"][at][shown], outputs["classes"][at][shown]
            ):
                colour = _COLOURS[int(kind) % len(_COLOURS)]
                axes.add_patch(_rectangle(box, color=colour))
        marks = [
            Rectangle((0, 0), 1, 1, fill=False, color=_COLOURS[k % len(_COLOURS)])
            for k in range(len(names))
        ]
        figure.legend(marks, names, ncols=len(names), loc="lower center", frameon=False)
        figure.tight_layout(rect=(0, 0.4 / figure.get_figheight(), 1, 1))
        figure.savefig(Path(directory) / "detections.png", dpi=100)


def average_precisions(outputs: Arrays, arrays: Arrays, classes: int) -> np.ndarray:
    """COCO's average precisions, (10, classes) for the IoU thresholds; NaN where there is no box.

    At each threshold a picture's boxes, the most certain first, each take the free annotated box
    that they overlap most; precision, made monotone, is averaged over 101 levels of recall.

    Args:
        outputs, arrays: see DetectionScore.
        classes: their number.

    Source: Lin et al. 2014, arXiv 1405.0312, and pycocotools' COCOeval, for all areas and up to
    100 boxes of a class a picture.
    """
    table = np.full((len(THRESHOLDS), classes), np.nan)
    for kind in range(classes):
        scores: list[np.ndarray] = []
        hits: list[np.ndarray] = []
        total = 0
        for row in range(len(arrays["boxes"])):
            truth = arrays["boxes"][row][arrays["classes"][row] == kind]
            of_kind = (outputs["classes"][row] == kind) & (outputs["scores"][row] > 0)
            order = np.argsort(-outputs["scores"][row][of_kind], kind="stable")[:100]
            found = outputs["boxes"][row][of_kind][order]
            scores.append(outputs["scores"][row][of_kind][order])
            hits.append(_hits(_iou(found, truth)))
            total += len(truth)
        if total:
            order = np.argsort(-np.concatenate(scores), kind="stable")
            right = np.concatenate(hits, axis=1)[:, order]
            table[:, kind] = [_area_under(row, total) for row in right]
    return table


def _hits(overlaps: np.ndarray) -> np.ndarray:
    """IoU (found, annotated) -> whether each of found is right, (10, found)."""
    right = np.zeros((len(THRESHOLDS), len(overlaps)), bool)
    for at, threshold in enumerate(THRESHOLDS):
        free = np.ones(overlaps.shape[1], bool)
        for box, row in enumerate(overlaps):
            allowed = np.where(free, row, -1.0)
            if allowed.size and allowed.max() >= threshold:
                right[at, box] = True
                free[allowed.argmax()] = False
    return right


def _area_under(right: np.ndarray, total: int) -> float:
    made = np.cumsum(right)
    precision = made / np.arange(1, len(right) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    level = np.searchsorted(made / total, RECALLS, side="left")
    return float(np.append(precision, 0.0)[level].mean())


def _iou(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    one, other = found[:, None].astype(float), truth[None].astype(float)
    sides = np.minimum(one[..., 2:], other[..., 2:])
    sides = sides - np.maximum(one[..., :2], other[..., :2])
    shared = np.prod(np.maximum(sides, 0.0), axis=-1)
    areas = [np.prod(x[..., 2:] - x[..., :2], axis=-1) for x in (one, other)]
    union = areas[0] + areas[1] - shared
    return shared / np.where(union > 0, union, 1.0)


def _by_pycocotools(outputs: Arrays, arrays: Arrays, classes: int) -> np.ndarray:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def entry(row: int, box: np.ndarray, kind: int) -> dict:
        x, y, right, low = map(float, box)
        return {
            "image_id": row + 1,
            "category_id": int(kind) + 1,
            "bbox": [x, y, right - x, low - y],
            "area": (right - x) * (low - y),
            "iscrowd": 0,
        }

    truths: list[dict] = []
    found: list[dict] = []
    for row in range(len(arrays["boxes"])):
        for box, kind in zip(arrays["boxes"][row], arrays["classes"][row]):
            if kind >= 0:
                truths.append(entry(row, box, kind) | {"id": len(truths) + 1})
        for box, kind, score in zip(
            outputs["boxes"][row], outputs["classes"][row], outputs["scores"][row]
        ):
            if score > 0:
                found.append(entry(row, box, kind) | {"score": float(score)})
    if not found:
        return average_precisions(outputs, arrays, classes)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "info": {},
            "images": [{"id": row + 1} for row in range(len(arrays["boxes"]))],
            "categories": [{"id": kind + 1} for kind in range(classes)],
            "annotations": truths,
        }
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    # (thresholds, recalls, classes, areas, detections): all areas, the largest number.
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    return np.where((precision < 0).all(axis=1), np.nan, precision.mean(axis=1))


def _rectangle(box: np.ndarray, **style) -> Rectangle:
    x, y, right, low = map(float, box)
    return Rectangle((x, y), right - x, low - y, fill=False, linewidth=1.3, **style)
