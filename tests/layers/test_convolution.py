"""Windows and convolutions against numpy."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax.layers import Convolution, windows


def test_windows_of_equal_size_and_stride_stack_frames():
    x = jnp.arange(10.0).reshape(1, 5, 2)
    assert windows(x, 2, 2).tolist() == [[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 0]]]


@pytest.mark.parametrize(
    ("length", "size", "stride"), [(7, 3, 2), (6, 5, 3), (1, 3, 2)]
)
def test_a_product_with_windows_is_a_convolution(length, size, stride):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(1, length, 2)), rng.normal(size=(size, 2))
    got = windows(jnp.asarray(x), size, stride) @ jnp.asarray(kernel.reshape(-1, 1))
    padded = np.pad(x[0], ((size, size), (0, 0)))
    first = size - (size - stride) // 2
    wanted = [
        (padded[first + i * stride :][:size] * kernel).sum()
        for i in range(-(-length // stride))
    ]
    np.testing.assert_allclose(got[0, :, 0], wanted, rtol=1e-5)


def test_a_convolution_reaches_its_neighbours_and_no_padding():
    layer = Convolution(4, 3, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 4)), jnp.float32)
    valid = (jnp.arange(6) < 4)[None]
    base = layer(x, valid)
    moved = layer(x.at[0, 4:].set(9.0), valid)
    np.testing.assert_array_equal(base[0, :4], moved[0, :4])
    moved = layer(x.at[0, 1].set(9.0), valid)
    changed = jnp.abs(moved - base).max(-1)[0] > 1e-6
    assert changed.tolist()[:4] == [True, True, True, False]


def test_an_even_size_is_refused():
    with pytest.raises(ValueError, match="odd"):
        Convolution(4, 2, rngs=nnx.Rngs(0))
