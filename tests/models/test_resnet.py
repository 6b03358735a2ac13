import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax.models import resnet
from tests.models.images import make_batch, trained_on_a_mesh

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
)


def build(config):
    model = resnet.Model(config, rngs=nnx.Rngs(0))
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


@pytest.mark.parametrize(
    "change",
    (
        {"attention": "cbam"},
        {"attention": "none"},
        {"self_attention": 0},
        {"self_attention": 2},
        {"heads": 4},
        {"patch": 1},
        {"blocks": (1, 2)},
        {"widths": (8, 8)},
        {"reduction": 1},
        {"groups": 4},
        {"flip_average": False},
        {"dtype": "bfloat16"},
    ),
    ids=str,
)
def test_every_choice_of_the_model_matters(change):
    batch = make_batch(TINY, 3)
    found = build(dataclasses.replace(TINY, **change)).predict(batch)["logits"]
    assert found.shape == (3, 3) and found.dtype == jnp.float32
    assert abs(found - build(TINY).predict(batch)["logits"]).max() > 1e-4


def test_dropout_is_drawn_in_training():
    model = build(dataclasses.replace(TINY, dropout=0.5))
    images = jnp.ones((2, 10, 6, 1))
    one, other = (model(images, rng=jax.random.key(seed)) for seed in (0, 1))
    assert abs(one - other).max() > 1e-3
    np.testing.assert_array_equal(model(images), model(images))


def test_channels_are_weighed_by_what_all_of_them_hold():
    layer = resnet.ChannelAttention(TINY, 4, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5, 4)), jnp.float32)
    hidden = np.maximum(np.mean(x, (1, 2)) @ layer.squeeze.kernel[...], 0)
    weights = 1 / (1 + np.exp(-hidden @ np.asarray(layer.excite.kernel[...])))
    np.testing.assert_allclose(layer(x), x * weights[:, None, None], rtol=1e-5)


def test_places_are_weighed_by_their_surroundings():
    layer = resnet.PlaceAttention(TINY, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 9, 9, 4)), jnp.float32)
    near, far = (layer(x.at[0, at, at].set(9.0))[0, 0, 0] for at in (3, 4))
    assert (far == layer(x)[0, 0, 0]).all() and (near != far).any()


def test_a_mesh_learns_what_one_device_learns():
    config = dataclasses.replace(TINY, attention="cbam", dropout=0.1)
    batch = make_batch(config, 8)
    one, losses = trained_on_a_mesh(resnet, config, batch, devices=1, steps=3)
    shared, _ = trained_on_a_mesh(resnet, config, batch, devices=8, steps=3)
    chex.assert_trees_all_close(one, shared, atol=2e-4)
    assert losses[-1] < losses[0]


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
