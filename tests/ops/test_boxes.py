"""Boxes: areas and overlaps by hand, and which of duplicates stay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax.ops import boxes

UNIT = [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("other", "iou", "generalised"),
    [
        (UNIT, 1.0, 1.0),
        ([0.5, 0.0, 1.5, 1.0], 1 / 3, 1 / 3),  # their hull is their union
        ([2.0, 0.0, 3.0, 1.0], 0.0, -1 / 3),  # a hull of 3, of which 1 is empty
        ([1.0, 1.0, 2.0, 2.0], 0.0, -0.5),  # they touch at a corner
        ([0.25, 0.25, 0.75, 0.75], 0.25, 0.25),
        ([0.5, 0.5, 0.5, 0.5], 0.0, 0.0),  # without area
    ],
)
def test_overlaps_are_those_by_hand(other, iou, generalised):
    one, other = jnp.asarray(UNIT), jnp.asarray(other)
    assert boxes.iou(one, other) == pytest.approx(iou, abs=1e-6)
    assert boxes.generalised_iou(other, one) == pytest.approx(generalised, abs=1e-6)


def test_boxes_apart_still_pull_each_other():
    far = jnp.asarray([5.0, 0.0, 6.0, 1.0])
    slope = jax.grad(lambda box: boxes.generalised_iou(box, far))(jnp.asarray(UNIT))
    assert slope[2] > 0 and np.isfinite(slope).all()
    assert not jax.grad(lambda box: boxes.iou(box, far))(jnp.asarray(UNIT)).any()


def test_centres_and_corners_are_inverse():
    corners = jnp.asarray([[2.0, 3.0, 6.0, 13.0]])
    centres = boxes.to_centres(corners)
    np.testing.assert_array_equal(centres, [[4.0, 8.0, 4.0, 10.0]])
    np.testing.assert_array_equal(boxes.from_centres(centres), corners)


def test_a_box_is_cut_to_the_picture():
    cut = boxes.clip(jnp.asarray([-1.0, 2.0, 9.0, 9.0]), height=4, width=7)
    np.testing.assert_array_equal(cut, [0.0, 2.0, 7.0, 4.0])
    assert boxes.area(jnp.asarray([3.0, 0.0, 1.0, 5.0])) == 0.0


def test_duplicates_of_a_class_are_ruled_out_by_what_stays():
    found = jnp.asarray(
        [
            [0.0, 0.0, 10.0, 10.0],
            [0.0, 0.0, 10.0, 8.0],  # IoU 0.8 with the first: out
            [
                0.0,
                0.0,
                10.0,
                6.0,
            ],  # 0.75 with the second alone, which is out; 0.6 with the first
            [0.0, 0.0, 10.0, 10.0],  # another class
            [20.0, 0.0, 30.0, 10.0],
        ]
    )
    classes = jnp.asarray([0, 0, 0, 1, 0])
    kept = boxes.suppress(found, classes, threshold=0.7)
    assert kept.tolist() == [True, False, True, True, True]
