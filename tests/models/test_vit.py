import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax.models import vit
from qkv_jax.models.image_classification import Augmentation
from qkv_jax.ops import patterns
from tests.models.images import make_batch, means, trained_on_a_mesh

TINY = vit.Config(
    height=8,
    width=12,
    channels=2,
    classes=3,
    patch=4,
    d_model=8,
    d_ff=12,
    heads=2,
    layers=2,
)
SHEET = dataclasses.replace(
    TINY, height=5, width=6, patch=4, sheet=2, cell=8, attention=("local", "rows")
)


def build(config, seed=0):
    model = vit.Model(config, rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(1)
    model.head.kernel[...] = jnp.asarray(rng.normal(size=model.head.kernel.shape))
    return model


def test_rows_that_fill_up_a_batch_change_nothing():
    model, batch = build(TINY), make_batch(TINY, 3)
    filled = {name: np.concatenate([x, x[:2]]) for name, x in batch.items()}
    filled["weight"][3:] = 0
    chex.assert_trees_all_close(
        model.loss(filled, rng=None)[1], model.loss(batch, rng=None)[1], rtol=1e-5
    )
    np.testing.assert_allclose(
        model.predict(filled)["logits"][:3], model.predict(batch)["logits"], atol=1e-5
    )


def test_sums_are_what_the_predictions_say():
    model, batch = build(TINY), make_batch(TINY, 7)
    logits = np.asarray(model.predict(batch)["logits"], np.float64)
    sums = means(model, batch)
    shares = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    nll = -shares[np.arange(7), batch["label"]].mean()
    assert sums["accuracy"] == pytest.approx((logits.argmax(1) == batch["label"]).mean())
    assert sums["nll"] == pytest.approx(nll, rel=1e-5)
    assert sums["loss"] == pytest.approx(0.9 * nll - 0.1 * shares.mean(), rel=1e-5)


def test_predictions_are_the_same_for_mirror_images():
    model, batch = build(TINY), make_batch(TINY, 3)
    mirrored = batch | {"image": batch["image"][:, :, ::-1]}
    found = model.predict(batch)["logits"]
    np.testing.assert_allclose(found, model.predict(mirrored)["logits"], atol=1e-5)
    config = dataclasses.replace(TINY, flip_average=False)
    assert abs(found - build(config).predict(batch)["logits"]).max() > 1e-3


PLAIN = dataclasses.replace(TINY, augmentation=Augmentation(flip=False, shift=0))


@pytest.mark.parametrize(
    "change",
    (
        {"augmentation": Augmentation(flip=True, shift=0)},
        {"augmentation": Augmentation(flip=False, shift=3)},
        {"augmentation": Augmentation(flip=False, shift=0, erase=4)},
        {"label_smoothing": 0.5},
        {"dropout": 0.5},
    ),
    ids=str,
)
def test_what_training_changes_can_be_set(change):
    batch, rng = make_batch(TINY, 6), jax.random.key(1)
    plain, changed = (
        build(config).loss(batch, rng=rng)[0]
        for config in (PLAIN, dataclasses.replace(PLAIN, **change))
    )
    assert abs(plain - changed) > 1e-3


@pytest.mark.parametrize(
    "change",
    (
        {"stem": "convolution"},
        {"attention": ("local",), "radius": 0},
        {"attention": ("rows",)},
        {"attention": ("full", "columns")},
        {"heads": 4},
        {"layers": 1},
        {"dtype": "bfloat16"},
    ),
    ids=str,
)
def test_every_choice_of_the_model_matters(change):
    batch = make_batch(TINY, 3)
    found = build(dataclasses.replace(TINY, **change)).predict(batch)["logits"]
    assert found.dtype == jnp.float32
    assert abs(found - build(TINY).predict(batch)["logits"]).max() > 1e-4


def test_columns_attend_as_the_axial_pattern_says():
    block = build(TINY).blocks[0]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 15, 8)), jnp.float32)
    found = vit.attend(block, "columns", x, (3, 5), 1, None)
    expected = block(x, mask=patterns.axial(3, 5, 0))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_sheet_is_small_images_side_by_side():
    model = build(SHEET)
    images = jnp.asarray(make_batch(SHEET, 8)["image"], jnp.float32) / 255
    sheet = model.sheets(images)
    assert sheet.shape == (2, 16, 16, 2)
    np.testing.assert_array_equal(sheet[1, 9:14, 1:7], images[6])
    np.testing.assert_array_equal(sheet[1, 1:6, 9:15], images[5])
    with pytest.raises(ValueError, match="multiple of 4 rows; got 7"):
        model(images[:7])


def test_each_image_of_a_sheet_is_classified_in_its_own_place():
    """Patches that see just themselves, wherever they stand: any order gives the same."""
    model = build(dataclasses.replace(SHEET, attention=("local",), radius=0))
    for places in (model.rows, model.columns):
        places[...] = jnp.zeros_like(places[...])
    batch, order = make_batch(SHEET, 8), np.array([5, 2, 1, 0, 7, 6, 3, 4])
    mixed = {name: array[order] for name, array in batch.items()}
    found, expected = (model.predict(x)["logits"] for x in (mixed, batch))
    np.testing.assert_allclose(found, expected[order], atol=1e-5)


def test_a_batch_is_learned_by_heart_and_a_mesh_learns_the_same():
    batch = make_batch(SHEET, 16)
    one, losses = trained_on_a_mesh(vit, SHEET, batch, devices=1, steps=3)
    shared, _ = trained_on_a_mesh(vit, SHEET, batch, devices=8, steps=3)
    chex.assert_trees_all_close(one, shared, atol=2e-4)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "change, message",
    (
        ({"attention": ()}, "attention must name"),
        ({"stem": "convolution", "patch": 6}, "power of 2"),
        ({"cell": 10}, "cell must hold an image of 8 x 12; got 10"),
        ({"patch": 5}, "patch must divide"),
        ({"classes": 0}, "classes must be positive"),
    ),
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        vit.Model(dataclasses.replace(TINY, **change), rngs=nnx.Rngs(0))
