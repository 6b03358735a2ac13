"""Average precision by hand, and detectors trained on one device and on eight."""

import numpy as np
import pytest
from flax import nnx

from qkv_jax.data.boxed_images import BoxedImages
from qkv_jax.data.splits import take_rows
from qkv_jax.models import set_prediction, single_stage
from qkv_jax.tasks.config import fill_sizes, new_model
from qkv_jax.tasks.detection import DetectionScore, average_precisions
from qkv_jax.training import MeshConfig
from tests.tasks import detection_toy
from tests.tasks.steps import step_losses
from tests.test_experiments import ROOT, load


def found(*boxes):
    """Predictions on one picture: (x0, y0, x1, y1, score, class) each."""
    table = np.asarray(boxes, np.float32).reshape(1, -1, 6)
    kinds = table[..., 5].astype(np.int32)
    return {"boxes": table[..., :4], "scores": table[..., 4], "classes": kinds}


def truth(*boxes):
    """The same without scores."""
    table = np.asarray(boxes, np.float32).reshape(1, -1, 5)
    return {"boxes": table[..., :4], "classes": table[..., 4].astype(np.int32)}


ONE, TWO, FAR = [0, 0, 10, 10], [20, 0, 30, 10], [50, 50, 60, 60]


def test_average_precision_at_50_is_that_by_hand():
    """Right, wrong, right, of two: precision 1 up to a recall of 1/2, and then 2/3."""
    outputs = found([*ONE, 0.9, 0], [*FAR, 0.8, 0], [*TWO, 0.7, 0])
    table = average_precisions(outputs, truth([*ONE, 0], [*TWO, 0]), 2)
    assert table[0, 0] == pytest.approx((51 * 1 + 50 * 2 / 3) / 101)
    assert np.isnan(table[:, 1]).all()


def test_a_looser_box_is_right_up_to_its_overlap():
    """An overlap of 0.72 is enough at 0.50, 0.55, 0.60, 0.65 and 0.70."""
    table = average_precisions(found([0, 0, 10, 7.2, 0.9, 0]), truth([*ONE, 0]), 1)
    np.testing.assert_array_equal(table[:, 0], [1] * 5 + [0] * 5)


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        (found([*ONE, 0.9, 0], [*ONE, 0.8, 0]), 1.0),  # a double after all is found
        (found([*ONE, 0.9, 1]), 0.0),  # of another class
        (found([*ONE, 0.0, 0]), 0.0),  # a score of 0 is no box
        (found([*FAR, 0.9, 0], [*ONE, 0.8, 0]), 0.5),
    ],
)
def test_what_counts_as_found(outputs, expected):
    table = average_precisions(outputs, truth([*ONE, 0]), 1)
    assert table[0, 0] == pytest.approx(expected)


def test_scores_are_named_after_classes_and_drawn(tmp_path):
    outputs, arrays = found([*ONE, 0.9, 0]), truth([*ONE, 0], [*TWO, 1])
    arrays["image"] = np.zeros((1, 64, 64, 3), np.uint8)
    scores = DetectionScore()(outputs, arrays, ("bright", "dark", "absent"))
    assert scores["ap50_bright"] == 1 and scores["ap50_dark"] == 0
    assert scores["ap50"] == scores["map"] == scores["ap75"] == 0.5
    DetectionScore().draw(outputs, arrays, ("bright", "dark"), tmp_path)
    assert (tmp_path / "detections.png").stat().st_size > 1000


@pytest.mark.parametrize("kind", [single_stage, set_prediction])
def test_updates_are_alike_on_one_device_and_on_eight(kind):
    """With all augmentation, which is drawn alike however the rows lie."""
    arrays = detection_toy.scenes(8)
    losses = [
        step_losses(detection_toy.tiny(kind), arrays, mesh=mesh)
        for mesh in (MeshConfig(data=1), MeshConfig(data=2, fsdp=2, tensor=2))
    ]
    np.testing.assert_allclose(*losses, rtol=2e-4)


@pytest.mark.parametrize("name", ["single_stage", "set_prediction"])
def test_an_experiment_starts_from_a_file(name, tmp_path):
    """Its shapes alone: what it learns is in its README."""
    config = load(ROOT / "experiments" / "detection" / f"{name}.py").CONFIG
    path = detection_toy.write(tmp_path / "cells.npz")
    splits = BoxedImages(path=path).load()
    model = fill_sizes(config.model, splits.sizes)
    batch = take_rows(splits.train, np.arange(2))
    made = nnx.eval_shape(lambda: new_model(model, seed=0))
    total, sums = nnx.eval_shape(lambda m: m.loss(batch, rng=None), made)
    assert total.shape == sums["tokens"].shape == ()
    outputs = nnx.eval_shape(lambda m: m.predict(batch), made)
    assert outputs["boxes"].shape == (*outputs["scores"].shape, 4)
