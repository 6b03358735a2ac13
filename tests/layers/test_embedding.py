import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qkv_jax.layers import Embedding
from qkv_jax.ops import sinusoids

TOKENS = jnp.array([[3, 1, 4], [1, 5, 9]])
POSITIONS = jnp.arange(3)[None]


def layer(vocabulary=10, **options):
    return Embedding(vocabulary, 8, rngs=nnx.Rngs(0), **options)


def test_a_token_is_its_row_times_the_root_of_d_plus_its_position():
    made = layer()
    rows = np.asarray(made.table[...])[TOKENS] * np.sqrt(8)
    expected = rows + sinusoids(POSITIONS, 8)
    np.testing.assert_allclose(made(TOKENS, POSITIONS), expected, atol=1e-6)


def test_scaled_tokens_start_with_unit_variance():
    scaled = np.asarray(layer(5000)(jnp.arange(5000)[None], jnp.zeros((1, 1))))
    np.testing.assert_allclose(scaled.std(axis=1), 1.0, atol=0.05)


def test_logits_are_products_with_the_same_table():
    made, x = layer(), jax.random.normal(jax.random.key(1), (2, 3, 8))
    expected = np.asarray(x) @ np.asarray(made.table[...]).T
    np.testing.assert_allclose(made.logits(x), expected, atol=1e-5)
    made.table[...] = made.table[...] * 2
    np.testing.assert_allclose(made.logits(x), 2 * expected, atol=1e-5)


def test_dropout_falls_on_the_sum_and_needs_an_rng():
    made, rng = layer(dropout_rate=0.5), jax.random.key(0)
    plain = np.asarray(layer()(TOKENS, POSITIONS))
    np.testing.assert_array_equal(made(TOKENS, POSITIONS), plain)
    dropped = np.asarray(made(TOKENS, POSITIONS, rng=rng))
    kept = dropped != 0
    assert 0.2 < kept.mean() < 0.8
    np.testing.assert_allclose(dropped[kept], 2 * plain[kept], rtol=1e-6)


def test_outputs_have_the_dtype_and_the_table_is_float32():
    made = layer(dtype=jnp.bfloat16)
    x = made(TOKENS, POSITIONS)
    assert x.dtype == made.logits(x).dtype == jnp.bfloat16
    assert made.table.dtype == jnp.float32
