import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax.layers import DecoderBlock, EncoderBlock, make_norm
from qkv_jax.ops import Ancestry, KVCache, masks

D = 8
X = jax.random.normal(jax.random.key(0), (2, 4, D))
MEMORY = jax.random.normal(jax.random.key(1), (2, 5, D))
RATES = {
    "attention": {"attention": 0.5},
    "feed_forward": {"feed_forward": 0.5},
    "residual": {"residual": 0.5},
}


def block(kind, *, place="post", attention=0.0, feed_forward=0.0, residual=0.0):
    return kind(
        D,
        attention={"heads": 2, "dropout_rate": attention},
        feed_forward={"d_ff": 16, "dropout_rate": feed_forward},
        residual={"place": place, "dropout_rate": residual, "dtype": jnp.float32},
        rngs=nnx.Rngs(0),
    )


def run(made, x=X, rng=None):
    if isinstance(made, EncoderBlock):
        return made(x, mask=None, rng=rng)
    lengths = masks.lengths(key=jnp.array([5, 2]))
    return made(x, MEMORY, mask=masks.causal(), memory_mask=lengths, rng=rng)


def normed(x, epsilon=1e-5):
    x = np.asarray(x, np.float64)
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(x.var(-1, keepdims=True) + epsilon)


def test_post_norm_normalises_the_sum():
    made = block(EncoderBlock, place="post")
    x = normed(X + made.attention(X)).astype(np.float32)
    np.testing.assert_allclose(run(made), normed(x + made.feed_forward(x)), atol=1e-5)


def test_pre_norm_normalises_the_branch_and_leaves_the_sum():
    made = block(EncoderBlock, place="pre")
    x = X + made.attention(normed(X).astype(np.float32))
    expected = x + made.feed_forward(normed(x).astype(np.float32))
    np.testing.assert_allclose(run(made), expected, atol=1e-5)


def test_the_decoder_looks_at_itself_then_at_the_memory():
    made = block(DecoderBlock)
    x = normed(X + made.attention(X, mask=masks.causal())).astype(np.float32)
    mask = masks.lengths(key=jnp.array([5, 2]))
    x = normed(x + made.cross(x, MEMORY, mask=mask)).astype(np.float32)
    np.testing.assert_allclose(run(made), normed(x + made.feed_forward(x)), atol=1e-5)


@pytest.mark.parametrize("kind", [EncoderBlock, DecoderBlock])
@pytest.mark.parametrize("place", RATES)
def test_every_dropout_changes_the_output_and_only_with_an_rng(kind, place):
    made, rng = block(kind, **RATES[place]), jax.random.key(0)
    plain = run(block(kind))
    np.testing.assert_array_equal(run(made), plain)
    dropped = run(made, rng=rng)
    assert not np.allclose(dropped, plain, atol=1e-2)
    np.testing.assert_array_equal(dropped, run(made, rng=rng))
    assert not np.allclose(dropped, run(made, rng=jax.random.key(1)), atol=1e-2)


@pytest.mark.parametrize("place", ["pre", "post"])
def test_decoder_steps_equal_the_whole_pass(place):
    made = block(DecoderBlock, place=place)
    cache, ancestry = KVCache.zeros(2, 4, 2, 4, jnp.float32), Ancestry.start(2, 1, 4)
    remembered = made.cross.remember(MEMORY)
    lengths = masks.lengths(key=jnp.array([5, 2]))
    outs = []
    for t in range(4):
        x = X[:, t : t + 1]
        out, cache = made.step(
            x, cache, remembered, ancestry=ancestry, memory_mask=lengths
        )
        ancestry = ancestry.advance()
        outs.append(out)
    np.testing.assert_allclose(jnp.concatenate(outs, axis=1), run(made), atol=1e-5)


def test_norms_have_float32_statistics_in_bfloat16():
    x = (X + 100).astype(jnp.bfloat16)
    norm = make_norm(D, "layer", 1e-5, jnp.bfloat16, nnx.Rngs(0))
    assert norm(x).dtype == jnp.bfloat16
    np.testing.assert_allclose(
        norm(x).astype(jnp.float32), normed(x.astype(jnp.float32)), atol=2e-2
    )
