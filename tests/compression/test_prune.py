import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax.compression import Pruning, choose, importance, keep_layers, keep_units
from qkv_jax.compression.prune import prunable
from qkv_jax.layers import init_rngs
from qkv_jax.models import seq2seq

CONFIG = seq2seq.tiny(
    vocabulary=11,
    d_model=12,
    d_ff=10,
    heads=6,
    kv_heads=3,
    head_size=4,
    encoder_layers=2,
    decoder_layers=1,
    norm="pre",
)
BATCH = {
    "source": jnp.array([[5, 3, 7, 2], [9, 2, 0, 0]]),
    "target": jnp.array([[1, 4, 8], [1, 6, 2]]),
}
SPARE = "encoder.0"


def loss(model, batch):
    """The sum over rows of something of each row's own."""
    logits = model(batch["source"], batch["target"])
    return jnp.sum(jax.nn.logsumexp(logits, -1) * jnp.arange(3.0)[None])


@functools.cache
def halves():
    """A model whose first block writes nothing: no other part of it is used."""

    def make():
        model = seq2seq.Model(CONFIG, rngs=init_rngs(3))
        for name, layer in prunable(model).items():
            if name.startswith(SPARE):
                last = layer.out if name.endswith("attention") else layer.down
                last.kernel[...] = jnp.zeros_like(last.kernel[...])
        return model

    graph = nnx.split(nnx.eval_shape(make), nnx.Param)[0]
    return graph, jax.jit(lambda: nnx.state(make(), nnx.Param))()


@functools.cache
def scores():
    return importance(*halves(), [BATCH], loss)


@jax.jit
def total(params):
    return loss(nnx.merge(halves()[0], params), BATCH)


def test_importance_is_the_slope_of_a_gate():
    """The gate of a head scales its rows of the output projection."""
    graph, params = halves()

    @jax.jit
    def products(row):
        slopes = jax.grad(lambda p: loss(nnx.merge(graph, p), row))(params)
        kernel, slope = (
            tree["decoder"][0]["cross"]["out"]["kernel"][...]
            for tree in (params, slopes)
        )
        return jnp.abs((kernel * slope).sum((1, 2)).reshape(3, 2).sum(1))

    rows = [{name: x[i : i + 1] for name, x in BATCH.items()} for i in range(2)]
    wanted = products(rows[0]) + products(rows[1])
    found = scores()["decoder.0.cross"]
    np.testing.assert_allclose(found, wanted / 2, rtol=1e-3)


def test_units_that_write_nothing_have_no_importance():
    for name, x in scores().items():
        assert x.shape == ((10,) if name.endswith("feed_forward") else (3,))
        assert np.any(x > 0) == (not name.startswith(SPARE))


def test_importance_in_a_layer_has_norm_1_there():
    found = importance(*halves(), [BATCH], loss, norm_in_layer=True)
    for name, x in scores().items():
        norm = np.linalg.norm(x) or 1.0
        np.testing.assert_allclose(found[name], x / norm, rtol=1e-5)


def test_a_pruned_model_computes_as_one_whose_units_write_nothing():
    kept = {
        "encoder.1.attention": np.array([0, 2]),
        "decoder.0.attention": np.array([1]),
        "decoder.0.cross": np.array([0, 1]),
        "encoder.1.feed_forward": np.array([0, 4, 5, 9]),
    }
    masked, pruned = nnx.merge(*halves()), nnx.merge(*halves())
    for name, units in kept.items():
        layer = prunable(masked)[name]
        last = layer.down if name.endswith("feed_forward") else layer.out
        count = 10 if name.endswith("feed_forward") else 3
        stays = np.isin(np.arange(count), units)
        stays = np.repeat(stays, len(last.kernel[...]) // count)
        last.kernel[...] = last.kernel[...] * stays.reshape(
            -1, *[1] * (last.kernel.ndim - 1)
        )
    keep_units(pruned, kept)
    assert prunable(pruned)["encoder.1.attention"].query.kernel.shape == (12, 4, 4)
    assert prunable(pruned)["decoder.0.attention"].key.bias.shape == (1, 4)
    graph, params = nnx.split(pruned, nnx.Param)
    found = jax.jit(lambda p: loss(nnx.merge(graph, p), BATCH))(params)
    np.testing.assert_allclose(found, total(nnx.state(masked, nnx.Param)), rtol=1e-5)
    counts = (6, 4, 2, 4)
    config = dataclasses.replace(CONFIG, heads_by_layer=counts)
    like = nnx.eval_shape(lambda: seq2seq.Model(config, rngs=init_rngs(0)))
    shapes = nnx.state(like, nnx.Param)["encoder"][1]["attention"]
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(
        jnp.shape, params["encoder"][1]["attention"]
    )


def test_the_least_important_go_wherever_they_are():
    marks = {"a": np.array([0.1, 0.9, 0.2]), "b": np.array([0.8, 0.7, 0.6])}

    def kept(share, even):
        return {n: x.tolist() for n, x in choose(marks, share, even=even).items()}

    assert kept(1 / 3, False) == {"a": [1], "b": [0, 1, 2]}
    assert kept(0.5, False) == {"a": [1], "b": [0, 1]}
    assert kept(1 / 3, True) == {"a": [1, 2], "b": [0, 1]}
    assert kept(0.99, True) == {"a": [1], "b": [0]}
    with pytest.raises(ValueError, match="leaves 1 heads to 2 layers"):
        choose(marks, 0.8, even=False)


def test_the_layer_that_does_nothing_is_dropped():
    model, wanted = nnx.merge(*halves()), total(halves()[1])

    def distance(model, batch):
        return (loss(model, batch) - wanted) ** 2

    assert keep_layers(model, "encoder", 1, [BATCH], distance) == [1]
    assert len(model.encoder) == 1
    with pytest.raises(ValueError, match="decoder_layers must be in 1 .. 1"):
        keep_layers(model, "decoder", 2, [BATCH], loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing is removed"),
        ({"heads": 1.0}, "heads must be in"),
        ({"feed_forward": -0.1}, "feed_forward must be in"),
        ({"encoder_layers": 0}, "encoder_layers must be"),
        ({"encoder_layers": 1, "even_heads": True}, "give a share"),
        ({"feed_forward": 0.5, "norm_in_layer": True}, "give a share of heads"),
        (
            {"heads": 0.5, "even_heads": True, "norm_in_layer": True},
            "without even_heads",
        ),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Pruning(**options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads_by_layer": (2, 2)}, "each of the 4 attention layers; got 2"),
        ({"heads_by_layer": (2, 2, 3, 2)}, "multiples of 2"),
        ({"heads_by_layer": (2, 2, 2, 2), "head_size": None}, "needs head_size"),
        ({"heads_by_layer": (2, 2, 2, 2), "positions": "relative"}, "a column a head"),
    ],
)
def test_heads_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)
