import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax.models import resnet
from qkv_jax.models.image_classification import PixelChanges
from qkv_jax.training import MeshConfig
from tests.models.images import logits, loss_sums, make_batch
from tests.tasks.steps import step_losses

TINY = resnet.Config(
    height=10,
    width=6,
    channels=1,
    classes=3,
    widths=(4, 8),
    blocks=(1, 1),
    heads=2,
    groups=2,
    reduction=2,
    augmentation=PixelChanges(flip=False, shift=0),
    flip_average=False,
)
BATCH = make_batch(TINY, 6)


@pytest.fixture(scope="module")
def tiny():
    return logits(resnet, TINY, BATCH)


def test_rows_that_fill_up_a_batch_change_nothing(tiny):
    batch = BATCH | {"weight": np.float32([1, 1, 1, 1, 0, 0])}
    found = logits(resnet, TINY, batch)
    np.testing.assert_allclose(found[:4], tiny[:4], atol=1e-5)
    assert abs(found[4:] - tiny[4:]).max() > 1e-3


@pytest.mark.parametrize(
    "change",
    (
        {"attention": "cbam"},
        {"attention": "none"},
        {"self_attention": 0},
        {"patch": 1, "blocks": (1, 2)},
        {"groups": 4, "dtype": "bfloat16"},
    ),
    ids=lambda change: " ".join(change),
)
def test_every_choice_of_the_model_matters(change, tiny):
    found = logits(resnet, dataclasses.replace(TINY, **change), BATCH)
    assert found.shape == (6, 3) and found.dtype == jnp.float32
    assert abs(found - tiny).max() > 1e-4


def test_dropout_is_drawn_in_training():
    config = dataclasses.replace(TINY, dropout=0.5)
    one, other = (
        loss_sums(resnet, config, BATCH, rng=jax.random.key(seed)) for seed in (0, 1)
    )
    assert abs(one["loss_sum"] - other["loss_sum"]) > 1e-3


def test_channels_are_weighed_by_what_all_of_them_hold():
    layer = resnet.ChannelAttention(TINY, 4, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 4)).astype(np.float32)
    hidden = np.maximum(x.mean((1, 2)) @ np.asarray(layer.squeeze.kernel[...]), 0)
    weights = 1 / (1 + np.exp(-hidden @ np.asarray(layer.excite.kernel[...])))
    expected = x * weights[:, None, None]
    np.testing.assert_allclose(jax.jit(layer)(x), expected, rtol=1e-5)


def test_places_are_weighed_by_their_surroundings():
    layer = resnet.PlaceAttention(TINY, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 9, 9, 4)), jnp.float32)
    weigh = jax.jit(lambda x: layer(x)[0, 0, 0])
    near, far = (weigh(x.at[0, at, at].set(9.0)) for at in (3, 4))
    assert (far == weigh(x)).all() and (near != far).any()


def test_a_mesh_learns_what_one_device_learns():
    config = dataclasses.replace(
        TINY, blocks=(0, 1), attention="cbam", augmentation=PixelChanges(), dropout=0.1
    )
    one, shared = (
        step_losses(config, make_batch(config, 8), mesh=mesh)
        for mesh in (MeshConfig(data=1), MeshConfig(data=2, fsdp=2, tensor=2))
    )
    np.testing.assert_allclose(one, shared, rtol=1e-4)
    assert one[-1] < one[0]


@pytest.mark.parametrize(
    "change, message",
    (
        ({"widths": (4,)}, "must name the same stages"),
        ({"groups": 3}, "groups must divide the widths"),
        ({"channels": 0}, "channels must be positive"),
    ),
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        resnet.Model(dataclasses.replace(TINY, **change), rngs=nnx.Rngs(0))
