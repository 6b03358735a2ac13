import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax.ops import dropout
from qkv_jax.ops.dropout import keep
from qkv_jax.training import logical_sharding, make_mesh

RNG = jax.random.key(0)


def grid(rows, columns, start=(0, 0)):
    return np.ogrid[start[0] : start[0] + rows, start[1] : start[1] + columns]


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_survivors_are_scaled_and_their_share_is_right(rate):
    x = jnp.full((200, 300), 2.0)
    y = np.asarray(dropout(x, rate, RNG))
    survivors = y != 0
    np.testing.assert_allclose(y[survivors], 2 / (1 - rate), rtol=1e-6)
    error = np.sqrt(rate * (1 - rate) / y.size)
    assert abs(survivors.mean() - (1 - rate)) < 4 * error


def test_no_rng_or_rate_zero_is_the_identity():
    x = jnp.arange(6.0).reshape(2, 3)
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, RNG) is x


def test_pattern_depends_on_the_key_and_differs_between_axes():
    x = jnp.ones((32, 32))
    pattern = np.asarray(dropout(x, 0.5, RNG))
    np.testing.assert_array_equal(pattern, dropout(x, 0.5, RNG))
    other = np.asarray(dropout(x, 0.5, jax.random.key(1)))
    assert 0.4 < np.mean(pattern == other) < 0.6
    assert 0.4 < np.mean(pattern == pattern.T) < 0.6


def test_a_block_has_the_pattern_of_its_place_in_the_whole():
    whole = keep(RNG, 0.3, *grid(16, 24))
    block = keep(RNG, 0.3, *grid(4, 8, start=(5, 11)))
    np.testing.assert_array_equal(block, whole[5:9, 11:19])


@pytest.mark.parametrize("size", [2, 3, 8])
def test_counts_in_blocks_are_those_of_independent_draws(size):
    # Chi-square of the 2**size patterns of neighbours along each axis, at a fixed seed.
    kept = np.asarray(keep(RNG, 0.5, *grid(240, 240)))
    for pattern in (kept, kept.T):
        bits = pattern.reshape(-1, size)
        counts = np.bincount(bits @ (1 << np.arange(size)), minlength=2**size)
        mean = len(bits) / 2**size
        chi_square, freedom = np.sum((counts - mean) ** 2) / mean, 2**size - 1
        assert abs(chi_square - freedom) < 4 * np.sqrt(2 * freedom)


def test_rows_columns_and_keys_have_equal_shares():
    keys = jax.random.split(RNG, 64)
    kept = np.asarray(jax.vmap(lambda rng: keep(rng, 0.25, *grid(64, 64)))(keys))
    error = np.sqrt(0.25 * 0.75 / 64**2)
    for axes in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(kept.mean(axis=axes) - 0.75).max() < 4.5 * error


def test_dtype_is_kept_and_gradients_are_the_pattern():
    x = jnp.ones((8, 8), jnp.bfloat16)
    y, gradient = jax.value_and_grad(lambda x: dropout(x, 0.5, RNG).sum())(x)
    assert gradient.dtype == y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(gradient, dropout(x, 0.5, RNG))


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_sharded_pattern_equals_that_of_one_device(impl):
    rng, x = jax.random.key(0, impl=impl), np.ones((16, 8), np.float32)
    run = jax.jit(lambda x, rng: dropout(x, 0.5, rng))
    split = jax.device_put(x, logical_sharding(make_mesh(), "batch"))
    np.testing.assert_array_equal(run(split, rng), run(x, rng))


@pytest.mark.parametrize("rate", [1.0, -0.1, float("nan")])
def test_a_rate_outside_the_unit_interval_is_an_error(rate):
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\)"):
        dropout(jnp.ones(3), rate, RNG)
