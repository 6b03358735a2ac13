import math

import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax.ops import segment_positions, sinusoids


def test_sinusoids_equal_the_formula_one_number_at_a_time():
    encoded = np.asarray(sinusoids(jnp.arange(7), 6, max_wavelength=100.0))
    for position in range(7):
        for i in range(3):
            angle = position / 100.0 ** (i / 3)
            assert encoded[position, i] == pytest.approx(math.sin(angle), abs=1e-5)
            assert encoded[position, 3 + i] == pytest.approx(math.cos(angle), abs=1e-5)


def test_sinusoids_add_an_axis_to_any_shape():
    one = sinusoids(jnp.int32(5), 8)
    assert one.shape == (8,) and one.dtype == jnp.float32
    many = sinusoids(jnp.full((2, 3), 5), 8)
    np.testing.assert_array_equal(many, np.broadcast_to(one, (2, 3, 8)))


def test_nearby_positions_differ_and_a_shift_is_a_rotation():
    encoded = np.asarray(sinusoids(jnp.arange(200), 16))
    products = encoded @ encoded.T  # depends on the distance alone
    np.testing.assert_allclose(products[3, 10], products[103, 110], atol=1e-3)
    assert np.all(np.argmax(products, axis=1) == np.arange(200))


@pytest.mark.parametrize("width", [0, 1, 7, -2])
def test_an_odd_width_is_an_error(width):
    with pytest.raises(ValueError, match=f"width must be even .* got {width}"):
        sinusoids(jnp.arange(3), width)


def test_positions_start_again_with_each_segment():
    segments = jnp.array([[1, 1, 1, 2, 2, 0, 0], [1, 2, 3, 3, 3, 3, 4]])
    positions = segment_positions(segments)
    assert positions.tolist() == [[0, 1, 2, 0, 1, 0, 1], [0, 0, 0, 1, 2, 3, 0]]
    assert positions.dtype == jnp.int32
