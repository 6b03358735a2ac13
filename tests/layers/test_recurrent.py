"""The gated recurrent unit against flax's own, and what starts of sequences do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax.layers import ALIGNMENTS, GRU, RecurrentAttention
from qkv_jax.ops import masks

B, T, C, H = 2, 5, 3, 4


@pytest.fixture(scope="module")
def gru():
    layer = GRU(C, H, rngs=nnx.Rngs(0))
    layer.bias[...] = jax.random.normal(jax.random.key(1), (3, H))
    layer.state_bias[...] = jax.random.normal(jax.random.key(2), (1, H))
    return layer


def test_a_step_is_that_of_flax(gru):
    cell = nnx.GRUCell(C, H, rngs=nnx.Rngs(0))
    cell.dense_i.kernel[...] = gru.kernel[...].reshape(C, 3 * H)
    cell.dense_i.bias[...] = gru.bias[...].reshape(-1)
    cell.dense_h.kernel[...] = gru.recurrent[...].reshape(H, 3 * H)
    # flax has no bias on the state's part of its candidate but in newer versions: leave it out.
    state, x = jnp.ones((B, H)) / 3, jax.random.normal(jax.random.key(3), (B, C))
    gru_without = nnx.clone(gru)
    gru_without.state_bias[...] = jnp.zeros((1, H))
    expected, _ = cell(state, x)
    np.testing.assert_allclose(
        gru_without.step(state, gru_without.inputs(x)), expected, atol=1e-6
    )


def test_a_row_of_two_sequences_gives_what_a_row_for_each_gives(gru):
    x = jax.random.normal(jax.random.key(4), (1, T, C))
    initial = jax.random.normal(jax.random.key(5), (1, T, H))
    starts = jnp.array([[True, False, True, False, False]])
    one = starts[:, :2]
    both = gru(x, starts, initial)
    np.testing.assert_allclose(
        both[:, :2], gru(x[:, :2], one, initial[:, :2]), atol=1e-6
    )
    rest = gru(x[:, 2:], starts[:, 2:], initial[:, 2:])
    np.testing.assert_allclose(both[:, 2:], rest, atol=1e-6)


def test_reversed_it_is_the_same_on_the_turned_row(gru):
    x = jax.random.normal(jax.random.key(6), (B, T, C))
    starts = jnp.arange(T)[None] == jnp.zeros((B, 1), int)
    zero = jnp.zeros((B, 1, H))
    turned = gru(x[:, ::-1], starts[:, ::-1], zero, reverse=True)
    np.testing.assert_allclose(turned[:, ::-1], gru(x, starts, zero), atol=1e-6)


@pytest.mark.parametrize("kind", ALIGNMENTS)
def test_weights_are_distributions_over_real_keys_that_average_the_values(kind):
    look = RecurrentAttention(H, kind=kind, half_width=2, rngs=nnx.Rngs(0))
    query = jax.random.normal(jax.random.key(7), (B, T, H))
    memory = jax.random.normal(jax.random.key(8), (B, 6, H))
    lengths = jnp.array([6, 3])
    mask, keys = masks.lengths(key=lengths), look.remember(memory)
    weights = look.weights(query, keys, mask, lengths)
    assert weights.shape == (B, 1, T, 6)
    assert not weights[1, :, :, 3:].any()
    if kind != "local":  # Whose Gaussian makes them sum to less.
        np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-5)
    found = look(query, keys, memory, mask, lengths)
    np.testing.assert_allclose(
        found, jnp.einsum("BNTS,BSD->BTD", weights, memory), atol=1e-5
    )
