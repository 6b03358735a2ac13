import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax.layers import FeedForward

X = jax.random.normal(jax.random.key(0), (2, 3, 4))


def layer(**options):
    made = FeedForward(4, 6, rngs=nnx.Rngs(0), **options)
    for linear in filter(None, (made.up, made.gate, made.down)):
        linear.bias[...] = jnp.full_like(linear.bias[...], 0.1)
    return made


def linear(of, x):
    return np.asarray(x) @ np.asarray(of.kernel[...]) + np.asarray(of.bias[...])


def phi(x):
    """The normal distribution function."""
    return (1 + np.vectorize(math.erf)(x / np.sqrt(2))) / 2


@pytest.mark.parametrize(
    "activation, wanted",
    [
        ("relu", lambda x: np.maximum(x, 0)),
        ("gelu", lambda x: x * phi(x)),
        ("gelu_tanh", jax.nn.gelu),
        ("silu", lambda x: x / (1 + np.exp(-x))),
    ],
)
def test_plain_is_activation_between_two_products(activation, wanted):
    made = layer(activation=activation)
    hidden = wanted(linear(made.up, X))
    np.testing.assert_allclose(made(X), linear(made.down, hidden), atol=1e-6)


def test_gated_multiplies_by_a_second_product():
    made = layer(activation="silu", gated=True)
    hidden = jax.nn.silu(linear(made.up, X)) * linear(made.gate, X)
    np.testing.assert_allclose(made(X), linear(made.down, hidden), atol=1e-6)


def test_dropout_falls_on_the_hidden_units_and_needs_an_rng():
    made, rng = layer(dropout_rate=0.5), jax.random.key(0)
    np.testing.assert_array_equal(made(X), layer()(X))
    assert not np.allclose(made(X, rng=rng), made(X))
    np.testing.assert_array_equal(layer()(X, rng=rng), layer()(X))


def test_an_unknown_activation_is_an_error_with_the_choices():
    with pytest.raises(ValueError, match="one of .'relu', .*'silu'.; got 'tanh'"):
        layer(activation="tanh")
