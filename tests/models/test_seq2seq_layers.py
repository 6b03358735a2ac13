"""Layers that are computed again in the backward pass, or as one loop, compute the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax.layers import run_blocks
from qkv_jax.models.seq2seq import Config, Model
from qkv_jax.ops import split_rng
from qkv_jax.training import MeshConfig, make_mesh, place_batch, place_state
from qkv_jax.translation.models import init_params
from qkv_jax.translation.run import make_loss

CONFIG = Config(
    vocabulary=11,
    d_model=8,
    d_ff=12,
    heads=2,
    encoder_layers=3,
    decoder_layers=2,
    norm="pre",
    dropout=0.0,
    positions="relative",
)
WAYS = {
    "scan": {"scan_layers": True},
    "dots": {"remat": "dots"},
    "everything": {"remat": "everything"},
    "scan, everything": {"scan_layers": True, "remat": "everything"},
}
TOKENS = np.random.default_rng(0).integers(3, 11, (2, 4, 5)).astype(np.int32)
BATCH = dict(zip(("source", "target"), TOKENS))


def gradient(config, rng=None):
    """A jitted (parameters, batch) -> loss and gradients."""
    loss = make_loss(config, 0.1)
    return jax.jit(jax.value_and_grad(lambda p, batch: loss(p, batch, rng)[0]))


@pytest.fixture(scope="module")
def expected():
    return gradient(CONFIG)(init_params(CONFIG, seed=0), BATCH)


def alike(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4),
        found,
        expected,
    )


@pytest.mark.parametrize("way", WAYS)
def test_loss_and_gradients_are_the_same(way, expected):
    config = dataclasses.replace(CONFIG, **WAYS[way])
    alike(gradient(config)(init_params(config, seed=0), BATCH), expected)


def test_a_loop_over_shards_computes_the_same(expected):
    config = dataclasses.replace(CONFIG, **WAYS["scan, everything"])
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    params = place_state(init_params(config, seed=0), mesh)
    with jax.set_mesh(mesh):
        alike(gradient(config)(params, place_batch(BATCH, mesh)), expected)


def traced(**changes):
    config = dataclasses.replace(CONFIG, **changes)
    params = init_params(config, seed=0)
    return gradient(config).trace(params, BATCH).jaxpr


def lines(**changes):
    return str(traced(**changes)).count("\n")


def test_a_loops_program_does_not_grow_with_the_layers():
    few, many = ({"encoder_layers": n, "decoder_layers": n} for n in (2, 6))
    looped = lines(**many, scan_layers=True) - lines(**few, scan_layers=True)
    # What grows is that weights are stacked, and their gradients taken apart.
    assert looped < 0.35 * (lines(**many) - lines(**few))


def test_what_is_computed_again_is_what_was_asked_for():
    texts = {
        remat: str(traced(remat=remat)) for remat in ("none", "dots", "everything")
    }
    products = {name: text.count("dot_general") for name, text in texts.items()}
    assert "checkpoint" not in texts["none"]
    assert products["none"] < products["dots"] < products["everything"]


@pytest.mark.parametrize("way", ["scan", "dots"])
def test_dropout_is_drawn_for_each_layer_as_without(way):
    rng = jax.random.key(1, impl="threefry2x32")
    losses = []
    for changes in ({}, WAYS[way]):
        config = dataclasses.replace(CONFIG, dropout=0.5, **changes)
        loss = jax.jit(make_loss(config, 0.1))
        losses.append(float(loss(init_params(config, seed=0), BATCH, rng)[0]))
    dry = make_loss(CONFIG, 0.1)(init_params(CONFIG, seed=0), BATCH, None)[0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert abs(losses[0] - float(dry)) > 1e-2


def test_attention_is_recorded_in_any_way():
    plain, looped = (
        Model(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0))
        for changes in ({}, WAYS["scan, everything"])
    )
    names = ["encoder.2.attention", "decoder.1.cross"]
    alike(looped.attention(*TOKENS, names), plain.attention(*TOKENS, names))


def test_blocks_that_differ_are_no_loop():
    blocks = [nnx.Linear(3, 3, use_bias=bias, rngs=nnx.Rngs(0)) for bias in (1, 0)]
    with pytest.raises(ValueError, match="the 2 differ in more than the values"):
        run_blocks(blocks, jnp.ones(3), [None] * 2, lambda b, x, r: b(x), scan=True)


def test_each_block_has_its_own_random_numbers():
    blocks = [nnx.Linear(2, 2, rngs=nnx.Rngs(i)) for i in range(3)]
    rngs = split_rng(jax.random.key(0), 3)

    def call(block, x, rng):
        return block(x) + jax.random.normal(rng, x.shape)

    looped, plain = (
        run_blocks(blocks, jnp.ones((1, 2)), rngs, call, scan=scan)
        for scan in (True, False)
    )
    np.testing.assert_allclose(looped, plain, rtol=1e-5)
