import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax.ops import rope, rope_2d, segment_positions, sinusoids


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


def turned(x, positions, pairs):
    """Rotations as products of complex numbers, float64."""
    half = x.shape[-1] // 2
    one, two = (
        (x[..., :half], x[..., half:])
        if pairs == "halves"
        else (x[..., ::2], x[..., 1::2])
    )
    angles = positions[..., None, None] * 100.0 ** (-np.arange(half) / half)
    z = (one + 1j * two) * np.exp(1j * angles)
    if pairs == "halves":
        return np.concatenate([z.real, z.imag], -1)
    return np.stack([z.real, z.imag], -1).reshape(x.shape)


@pytest.mark.parametrize("pairs", ["halves", "interleaved"])
def test_rope_turns_pairs_by_their_angles(pairs):
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 6))
    for positions in (np.arange(5.0), np.array([[3.0, 1, 4, 1, 5], [0.5, 0, 9, 2, 7]])):
        wanted = turned(x, positions, pairs)
        with jax.enable_x64(True):
            got = rope(jnp.asarray(x), positions, base=100.0, pairs=pairs)
            back = rope(got, -positions, base=100.0, pairs=pairs)
            np.testing.assert_allclose(got, wanted, atol=1e-12)
            np.testing.assert_allclose(back, x, atol=1e-12)


def test_products_of_turned_vectors_depend_on_the_distance():
    query, key = np.random.default_rng(1).normal(size=(2, 1, 1, 1, 8))
    query, key = (jnp.asarray(x, jnp.float32) for x in (query, key))

    def product(q, k):
        return jnp.sum(rope(query, jnp.array([q])) * rope(key, jnp.array([k])))

    np.testing.assert_allclose(product(3, 10), product(100, 107), rtol=1e-3)
    assert abs(product(3, 10) - product(3, 11)) > 1e-3
    assert rope(query.astype(jnp.bfloat16), jnp.array([2])).dtype == jnp.bfloat16


def test_rope_of_images_turns_one_half_by_rows_and_one_by_columns():
    x = np.random.default_rng(2).normal(size=(1, 6, 2, 8)).astype(np.float32)
    rows, columns = np.repeat(np.arange(2), 3), np.tile(np.arange(3), 2)
    got = rope_2d(x, rows, columns)
    np.testing.assert_array_equal(got[..., :4], rope(x[..., :4], rows))
    np.testing.assert_array_equal(got[..., 4:], rope(x[..., 4:], columns))


def test_bad_arguments_of_rope_are_named():
    x = jnp.zeros((2, 5, 3, 6))
    with pytest.raises(ValueError, match="even size H; got 5"):
        rope(x[..., :5], jnp.arange(5))
    with pytest.raises(ValueError, match=r"\(T,\) = \(5,\) or .*; got \(4,\)"):
        rope(x, jnp.arange(4))
    with pytest.raises(ValueError, match="'halves' or 'interleaved'; got 'quarters'"):
        rope(x, jnp.arange(5), pairs="quarters")
    with pytest.raises(ValueError, match="that 4 divides; got 6"):
        rope_2d(x, jnp.arange(5), jnp.arange(5))
