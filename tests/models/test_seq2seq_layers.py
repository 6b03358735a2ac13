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
from qkv_jax.translation.loss import make_loss
from qkv_jax.translation.models import init_params
from tests.jaxprs import equations

CONFIG = Config(
    vocabulary=11,
    d_model=8,
    d_ff=12,
    heads=2,
    encoder_layers=2,
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


def count(*names, gradient=False, **changes):
    """Equations of the loss, or of its gradient; of these names, where any are given."""
    config = dataclasses.replace(CONFIG, **changes)
    params = jax.eval_shape(lambda: init_params(config, seed=0))
    loss = make_loss(config, 0.1)

    def of(params, batch):
        return loss(params, batch, None)[0]

    traced = jax.make_jaxpr(jax.grad(of) if gradient else of)(params, BATCH)
    found = [equation.primitive.name for equation in equations(traced.jaxpr)]
    return sum(name in names for name in found) if names else len(found)


def test_a_loops_program_does_not_grow_with_the_layers():
    few, many = ({"encoder_layers": n, "decoder_layers": n} for n in (1, 3))
    looped = count(**many, scan_layers=True) - count(**few, scan_layers=True)
    # What grows is that weights are stacked.
    assert looped < 0.3 * (count(**many) - count(**few))


def test_what_is_computed_again_is_what_was_asked_for():
    again = ("checkpoint", "remat", "remat2")
    assert not count(*again, gradient=True)
    none, dots, everything = (
        count("dot_general", gradient=True, remat=remat)
        for remat in ("none", "dots", "everything")
    )
    assert none < dots < everything


def test_attention_is_recorded_in_any_way():
    plain, looped = (
        Model(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0))
        for changes in ({}, WAYS["scan, everything"])
    )
    names = ["encoder.1.attention", "decoder.1.cross"]
    alike(looped.attention(*TOKENS, names), plain.attention(*TOKENS, names))


def test_blocks_that_differ_are_no_loop():
    blocks = [nnx.Linear(3, 3, use_bias=bias, rngs=nnx.Rngs(0)) for bias in (1, 0)]
    with pytest.raises(ValueError, match="the 2 differ in more than the values"):
        run_blocks(blocks, jnp.ones(3), [None] * 2, lambda b, x, r: b(x), scan=True)


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_each_block_has_the_random_numbers_that_it_has_alone(remat):
    blocks = [nnx.Linear(2, 2, rngs=nnx.Rngs(i)) for i in range(3)]
    rngs = split_rng(jax.random.key(0), 3)

    def call(block, x, rng):
        return block(x) + jax.random.normal(rng, x.shape)

    expected = jnp.ones((1, 2))
    for block, rng in zip(blocks, rngs):
        expected = call(block, expected, rng)
    for scan in (True, False):
        options = {"scan": scan, "remat": remat}
        found = run_blocks(blocks, jnp.ones((1, 2)), rngs, call, **options)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
