import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qkv_jax.layers import AddPositions, Embedding
from qkv_jax.ops import sinusoids

TOKENS = jnp.array([[3, 1, 4], [1, 5, 9]])
POSITIONS = jnp.arange(3)[None]


def layer(vocabulary=10, **options):
    return Embedding(vocabulary, 8, rngs=nnx.Rngs(0), **options)


def start(x, places=POSITIONS, *, rng=None, **options):
    return AddPositions(8, rngs=nnx.Rngs(0), **options)(x, places, rng=rng)


def test_a_token_is_its_row_times_the_root_of_d_plus_its_position():
    made = layer()
    rows = np.asarray(made.table[...])[TOKENS] * np.sqrt(8)
    expected = rows + sinusoids(POSITIONS, 8)
    np.testing.assert_allclose(start(made(TOKENS)), expected, atol=1e-6)


def test_scaled_tokens_start_with_unit_variance():
    scaled = np.asarray(start(layer(5000)(jnp.arange(5000)[None]), jnp.zeros((1, 1))))
    np.testing.assert_allclose(scaled.std(axis=1), 1.0, atol=0.05)


def test_logits_are_products_with_the_same_table():
    made, x = layer(), jax.random.normal(jax.random.key(1), (2, 3, 8))
    expected = np.asarray(x) @ np.asarray(made.table[...]).T
    np.testing.assert_allclose(made.logits(x), expected, atol=1e-5)
    made.table[...] = made.table[...] * 2
    np.testing.assert_allclose(made.logits(x), 2 * expected, atol=1e-5)


def test_dropout_falls_on_the_sum_and_needs_an_rng():
    x, rng = layer()(TOKENS), jax.random.key(0)
    plain = np.asarray(start(x))
    np.testing.assert_array_equal(start(x, dropout_rate=0.5), plain)
    dropped = np.asarray(start(x, dropout_rate=0.5, rng=rng))
    kept = dropped != 0
    assert 0.2 < kept.mean() < 0.8
    np.testing.assert_allclose(dropped[kept], 2 * plain[kept], rtol=1e-6)


def test_outputs_have_the_dtype_and_the_table_is_float32():
    made = layer(dtype=jnp.bfloat16)
    x = start(made(TOKENS), dtype=jnp.bfloat16)
    assert x.dtype == made.logits(x).dtype == jnp.bfloat16
    assert made.table.dtype == jnp.float32


def test_a_vector_that_is_zero_has_no_gradient_from_either_use():
    made = layer(zero=3)
    graph, params = nnx.split(made)

    def loss(params):
        embed = nnx.merge(graph, params)
        return (embed.logits(embed(TOKENS)) ** 2).sum() + embed(TOKENS).sum()

    slopes = jax.grad(loss)(params)["table"][...]
    assert not np.asarray(made.table[...])[3].any()
    assert not np.asarray(slopes)[3].any() and np.asarray(slopes)[4].any()


def test_learned_positions_start_at_their_offset_and_are_normalised():
    made = AddPositions(
        8, positions="learned", offset=2, longest=3, norm="layer", rngs=nnx.Rngs(0)
    )
    x = layer()(TOKENS)
    total = np.asarray(x) + np.asarray(made.table[...])[None, 2:]
    expected = (total - total.mean(-1, keepdims=True)) / total.std(-1, keepdims=True)
    np.testing.assert_allclose(made(x, POSITIONS), expected, atol=1e-4)


def test_inclusive_sinusoids_end_at_the_longest_wavelength():
    x = jnp.zeros((1, 3, 8))
    found = np.asarray(start(x, positions="sinusoid_inclusive", offset=2))
    rates = 10_000.0 ** (-np.arange(4) / 3)
    angles = (2 + np.arange(3))[:, None] * rates
    expected = np.concatenate([np.sin(angles), np.cos(angles)], -1)[None]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_array_equal(start(x, positions="relative"), x)
