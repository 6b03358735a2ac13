import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax.layers.linear import PRODUCT, Linear, LinearGeneral
from tests.jaxprs import equations

LAYERS = {
    "linear": (lambda **o: Linear(6, 4, **o), (2, 3, 6), "btc,cf->btf"),
    "to heads": (lambda **o: LinearGeneral(6, (2, 4), **o), (2, 3, 6), "btd,dnh->btnh"),
    "from heads": (
        lambda **o: LinearGeneral((2, 4), 6, axis=(-2, -1), **o),
        (2, 3, 2, 4),
        "btnh,nhd->btd",
    ),
}
HALVES = ("bfloat16", "float16")


def made(kind, dtype):
    make, shape, rule = LAYERS[kind]
    layer = make(dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    layer.bias[...] = jax.random.normal(jax.random.key(1), layer.bias.shape)
    return layer, jax.random.normal(jax.random.key(2), shape), rule


def slopes(layer, x, w):
    """Of the sum of w times what the layer makes, with respect to layer and input."""
    graph, params = nnx.split(layer)

    def loss(params, x):
        return (w * nnx.merge(graph, params)(x).astype(jnp.float32)).sum()

    return jax.grad(loss, argnums=(0, 1))(params, x)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", LAYERS)
def test_16_bits_are_multiplied_and_float32_is_summed(kind, dtype):
    layer, x, rule = made(kind, dtype)
    y = layer(x)
    w = jax.random.normal(jax.random.key(3), y.shape)

    def rounded(a):
        return np.asarray(a).astype(dtype).astype(np.float64)

    inputs, output = rule.split("->")
    left, right = inputs.split(",")
    kernel, bias = rounded(layer.kernel[...]), np.asarray(layer.bias[...], np.float64)
    wanted = np.einsum(rule, rounded(x), kernel) + bias
    np.testing.assert_array_equal(y, wanted.astype(np.float32).astype(dtype))
    found, found_x = slopes(layer, x, w)
    wanted = np.einsum(f"{left},{output}->{right}", rounded(x), rounded(w))
    assert found["kernel"].dtype == jnp.float32
    np.testing.assert_allclose(found["kernel"][...], wanted, rtol=1e-5, atol=1e-6)
    wanted = np.einsum(f"{output},{right}->{left}", rounded(w), kernel)
    np.testing.assert_allclose(
        found_x, wanted, rtol=2 * jnp.finfo(dtype).eps, atol=1e-6
    )


@pytest.mark.parametrize("kind", LAYERS)
def test_float32_is_what_flax_makes(kind):
    layer, x, _ = made(kind, "float32")
    w = jax.random.normal(jax.random.key(3), layer(x).shape)
    plain = nnx.clone(layer)
    plain.dot_general = jax.lax.dot_general
    np.testing.assert_array_equal(layer(x), plain(x))
    for ours, other in zip(
        jax.tree.leaves(slopes(layer, x, w)), jax.tree.leaves(slopes(plain, x, w))
    ):
        np.testing.assert_array_equal(ours, other)


@pytest.mark.parametrize("dtype", HALVES)
def test_no_slope_is_a_product_of_float32(dtype):
    layer, x, _ = made("linear", dtype)
    program = jax.make_jaxpr(functools.partial(slopes, layer))(x, jnp.ones((2, 3, 4)))
    products = [
        e for e in equations(program.jaxpr) if e.primitive.name == "dot_general"
    ]
    assert len(products) == 3
    for product in products:
        assert {str(v.aval.dtype) for v in product.invars} == {dtype}
        assert {str(v.aval.dtype) for v in product.outvars} == {"float32"}


def test_what_is_kept_for_the_backward_pass_has_16_bits():
    layer, x, _ = made("linear", "bfloat16")
    program = jax.make_jaxpr(layer)(x)
    named = [e for e in equations(program.jaxpr) if e.primitive.name == "name"]
    assert [e.params["name"] for e in named] == [PRODUCT]
    assert [str(e.outvars[0].aval.dtype) for e in named] == ["bfloat16"]
