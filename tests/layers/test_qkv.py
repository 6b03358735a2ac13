"""The textbook layer, against numpy by hand, and its docstring's example."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax.layers import QKVAttention, qkv
from qkv_jax.ops import masks


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_the_docstrings_example_holds():
    found = doctest.testmod(qkv)
    assert found.attempted > 5 and found.failed == 0


@pytest.mark.parametrize("mask", [None, masks.causal()], ids=["plain", "causal"])
def test_equals_the_textbook_in_numpy(mask):
    layer = QKVAttention(6, 3, 5, rngs=nnx.Rngs(0))
    query, key, value = (
        normal(2, 4, 6),
        normal(2, 7, 6, seed=1),
        normal(2, 7, 6, seed=2),
    )
    q, k, v = (
        x @ np.asarray(m.kernel[...])
        for x, m in ((query, layer.query), (key, layer.key), (value, layer.value))
    )
    scores = q @ k.swapaxes(1, 2) / np.sqrt(3)
    if mask is not None:
        scores = np.where(np.tri(4, 7, dtype=bool), scores, -np.inf)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    got = jax.jit(lambda *x: layer(*x, mask=mask))(query, key, value)
    assert got.shape == (2, 4, 5)
    np.testing.assert_allclose(got, weights @ v, atol=1e-5)


def test_keys_and_values_of_different_lengths_are_an_error_that_says_so():
    layer = QKVAttention(512, 64, 64, rngs=nnx.Rngs(0))
    query, key, value = (jnp.ones((1, n, 512)) for n in (10, 20, 30))
    with pytest.raises(ValueError, match="one length S.* got 20 keys .* and 30 values"):
        layer(query, key, value)


def test_every_parameter_gets_a_gradient_and_has_named_axes():
    layer = QKVAttention(6, 3, 5, rngs=nnx.Rngs(0))
    definition, params = nnx.split(layer)
    arrays = normal(2, 4, 6), normal(2, 7, 6, seed=1), normal(2, 7, 6, seed=2)

    def loss(params):
        return jnp.sum(jnp.sin(nnx.merge(definition, params)(*arrays)))

    slopes = jax.tree.leaves(jax.grad(loss)(params))
    assert len(slopes) == 3 and all(np.abs(x).max() > 1e-3 for x in slopes)
    for part in (layer.query, layer.key, layer.value):
        assert part.kernel.get_metadata()["axes"] == ("embed", "head_dim")
