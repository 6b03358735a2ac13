import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax.models import vit
from qkv_jax.models.image_classification import PixelChanges
from qkv_jax.ops import patterns
from qkv_jax.training import MeshConfig
from tests.models.images import build, logits, loss_sums, make_batch
from tests.tasks.steps import step_losses

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
    augmentation=PixelChanges(flip=False, shift=0),
    flip_average=False,
)
SHEET = dataclasses.replace(
    TINY, height=5, width=6, layers=1, sheet=2, cell=8, attention=("rows",)
)
BATCH = make_batch(TINY, 6)


RNG = jax.random.key(1)


@pytest.fixture(scope="module")
def tiny():
    return logits(vit, TINY, BATCH)


def test_rows_that_fill_up_a_batch_change_nothing(tiny):
    batch = BATCH | {"weight": np.float32([1, 1, 1, 1, 0, 0])}
    other = batch | {"image": np.roll(BATCH["image"], 3, axis=2)}
    other["image"][:4] = BATCH["image"][:4]
    found = logits(vit, TINY, batch)
    np.testing.assert_allclose(found[:4], tiny[:4], atol=1e-5)
    np.testing.assert_array_equal(found, logits(vit, TINY, other))


def test_sums_are_what_the_predictions_say(tiny):
    weight = np.array([1, 0, 1, 1, 0, 1])
    sums = loss_sums(vit, TINY, BATCH | {"weight": np.float32(weight)})
    shares = np.asarray(tiny, np.float64)
    shares -= np.log(np.exp(shares).sum(1, keepdims=True))
    nll = -shares[np.arange(6), BATCH["label"]]
    smooth = 0.9 * nll - 0.1 * shares.mean(1)
    right = shares.argmax(1) == BATCH["label"]
    assert sums["tokens"] == 4 and sums["accuracy_sum"] == weight @ right
    assert sums["nll_sum"] == pytest.approx(weight @ nll, rel=1e-5)
    assert sums["loss_sum"] == pytest.approx(weight @ smooth, rel=1e-5)


def test_predictions_can_be_the_same_for_mirror_images(tiny):
    config = dataclasses.replace(TINY, flip_average=True)
    mirrored = BATCH | {"image": BATCH["image"][:, :, ::-1]}
    one, other = (logits(vit, config, batch) for batch in (BATCH, mirrored))
    np.testing.assert_allclose(one, other, atol=1e-5)
    assert abs(one - tiny).max() > 1e-3


@pytest.fixture(scope="module")
def plain():
    return loss_sums(vit, TINY, BATCH, rng=RNG)


@pytest.mark.parametrize(
    "change",
    (
        {"augmentation": PixelChanges(flip=True, shift=0)},
        {"augmentation": PixelChanges(flip=False, shift=3)},
        {"augmentation": PixelChanges(flip=False, shift=0, erase=4)},
        {"label_smoothing": 0.5},
        {"dropout": 0.5},
    ),
    ids=lambda change: " ".join(change),
)
def test_what_training_changes_can_be_set(change, plain):
    sums = loss_sums(vit, dataclasses.replace(TINY, **change), BATCH, rng=RNG)
    assert abs(sums["loss_sum"] - plain["loss_sum"]) > 1e-3


@pytest.mark.parametrize(
    "change",
    (
        {"stem": "convolution"},
        {"attention": ("local",), "radius": 0},
        {"attention": ("full", "columns")},
        {"heads": 4, "dtype": "bfloat16"},
    ),
    ids=lambda change: " ".join(change),
)
def test_every_choice_of_the_model_matters(change, tiny):
    found = logits(vit, dataclasses.replace(TINY, **change), BATCH)
    assert found.dtype == jnp.float32
    assert abs(found - tiny).max() > 1e-4


@pytest.mark.parametrize(
    "kind, mask",
    (
        ("local", patterns.local_2d(3, 5, 1)),
        ("rows", patterns.axial(3, 5, 1)),
        ("columns", patterns.axial(3, 5, 0)),
    ),
)
def test_a_layer_attends_as_its_pattern_says(kind, mask):
    block = build(vit, TINY).blocks[0]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 15, 8)), jnp.float32)
    found = jax.jit(lambda x: vit.attend(kind, (3, 5), 1, block, x, None))(x)
    expected = jax.jit(lambda x: block(x, mask=mask))(x)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_sheet_is_small_images_side_by_side():
    model = build(vit, SHEET)
    images = jnp.asarray(make_batch(SHEET, 8)["image"], jnp.float32) / 255
    sheet = model.sheets(images)
    assert sheet.shape == (2, 16, 16, 2)
    np.testing.assert_array_equal(sheet[1, 9:14, 1:7], images[6])
    np.testing.assert_array_equal(sheet[1, 1:6, 9:15], images[5])
    with pytest.raises(ValueError, match="multiple of 4 rows; got 7"):
        model(images[:7])


def test_each_image_of_a_sheet_is_classified_in_its_own_place():
    """Patches that see just themselves, wherever they stand: any order gives the same."""
    model = build(vit, dataclasses.replace(SHEET, attention=("local",), radius=0))
    for places in (model.rows, model.columns):
        places[...] = jnp.zeros_like(places[...])
    batch, order = make_batch(SHEET, 8), np.array([5, 2, 1, 0, 7, 6, 3, 4])
    predict = jax.jit(lambda batch: model.predict(batch)["logits"])
    mixed = {name: array[order] for name, array in batch.items()}
    np.testing.assert_allclose(predict(mixed), predict(batch)[order], atol=1e-5)


def test_a_mesh_learns_what_one_device_learns():
    config = dataclasses.replace(SHEET, augmentation=PixelChanges(), dropout=0.1)
    one, shared = (
        step_losses(config, make_batch(config, 16), mesh=mesh)
        for mesh in (MeshConfig(data=1), MeshConfig(data=2, fsdp=2, tensor=2))
    )
    np.testing.assert_allclose(one, shared, rtol=1e-4)
    assert one[-1] < one[0]


@pytest.mark.parametrize(
    "change, message",
    (
        ({"attention": ()}, "attention must name"),
        ({"stem": "convolution", "patch": 6}, "power of 2"),
        ({"cell": 10}, "cell must hold an image of 8 x 12; got 10"),
        ({"patch": 5}, "patch must divide"),
        ({"classes": 0}, "classes must be positive"),
        (
            {"attention": ("rows", "columns"), "scan_layers": True},
            "scan_layers needs attention of one pattern",
        ),
    ),
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        vit.Model(dataclasses.replace(TINY, **change), rngs=nnx.Rngs(0))
