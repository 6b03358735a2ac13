"""Pictures that are changed at random, and boxes that go along."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax.ops import images as image_ops
from qkv_jax.ops.images import Augmentation

augment = jax.jit(image_ops.augment, static_argnums=1)
STILL = Augmentation(
    flip="", scale=(1, 1), stretch=1, shift=0, brightness=0, contrast=0, colour=0
)
BOX = [12.0, 9.0, 30.0, 21.0]


def scene(count=32):
    images = np.zeros((count, 33, 47, 3), np.float32)
    images[:, 9:21, 12:30] = 1.0
    boxes = jnp.tile(jnp.asarray([[BOX, [0.0, 0.0, 0.0, 0.0]]]), (count, 1, 1))
    return jnp.asarray(images), boxes


def test_nothing_changes_where_nothing_is_asked_for():
    images, boxes = scene(3)
    same, kept = augment(images, STILL, jax.random.key(0), boxes=boxes)
    np.testing.assert_allclose(same, images, atol=1e-5)
    np.testing.assert_allclose(kept, boxes, atol=1e-4)


def test_boxes_stay_around_what_they_were_around():
    images, boxes = scene()
    moving = Augmentation(flip="xy", brightness=0, contrast=0, colour=0, visible=0)
    changed, moved = augment(images, moving, jax.random.key(1), boxes=boxes)
    for picture, (box, empty) in zip(np.asarray(changed), np.asarray(moved)):
        there = picture.mean(-1) > 0.55
        rows, columns = np.flatnonzero(there.any(1)), np.flatnonzero(there.any(0))
        edges = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        np.testing.assert_allclose(box, edges, atol=1.2)
        assert not empty.any()
    assert len(np.unique(np.asarray(moved)[:, 0, 0])) == len(moved)


def test_a_box_of_which_little_is_left_is_dropped():
    images, _ = scene(1)
    shifted = Augmentation(flip="", scale=(3.0, 3.0), shift=0.0, visible=0.5)
    boxes = jnp.asarray([[BOX, [0.0, 0.0, 16.0, 12.0]]])
    _, moved = augment(images, shifted, jax.random.key(0), boxes=boxes)
    assert moved[0, 0].any() and not moved[0, 1].any()


@pytest.mark.parametrize("name", ["brightness", "contrast", "colour"])
def test_each_change_of_colours_is_one(name):
    images, draws = scene(2)[0], jnp.full((2, 5), 0.5)
    config = Augmentation(**{**vars(STILL), name: 0.3})
    changed = image_ops._recolour(images, config, draws)
    assert np.abs(changed - images).max() > 0.01
    same = image_ops._recolour(images, STILL, draws)
    np.testing.assert_allclose(same, images, atol=1e-6)


@pytest.mark.parametrize(
    "wrong", [{"flip": "z"}, {"scale": (2.0, 1.0)}, {"stretch": 0.5}]
)
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Augmentation(**wrong)
