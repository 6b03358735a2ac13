import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax.layers import MultiHeadAttention
from qkv_jax.ops import (
    Ancestry,
    KVCache,
    attention_weights,
    dot_product_attention,
    masks,
    scores,
)

D = 12


def layer(heads=4, **options):
    made = MultiHeadAttention(D, heads, rngs=nnx.Rngs(0), **options)
    for projection in (made.query, made.key, made.value, made.out):
        projection.bias[...] = jnp.full_like(projection.bias[...], 0.1)
    return made


def inputs(T=5, *, seed=0):
    return jax.random.normal(jax.random.key(seed), (2, T, D))


def by_hand(made, x, memory, **options):
    def project(to, x):
        return jnp.einsum("BTD,DNH->BTNH", x, to.kernel[...]) + to.bias[...][None, None]

    out = dot_product_attention(
        project(made.query, x),
        project(made.key, memory),
        project(made.value, memory),
        **options,
    )
    return jnp.einsum("BTNH,NHD->BTD", out, made.out.kernel[...]) + 0.1


@pytest.mark.parametrize("kv_heads", [None, 2, 1])
def test_it_is_four_projections_around_the_op(kv_heads):
    made, x, memory = layer(kv_heads=kv_heads), inputs(), inputs(7, seed=1)
    run, hand = nnx.jit(MultiHeadAttention.__call__), nnx.jit(by_hand)
    np.testing.assert_allclose(run(made, x), hand(made, x, x), atol=1e-5)
    options = {"mask": masks.causal(1), "score": scores.soft_cap(0.5)}
    cross = run(made, x, memory, **options)
    np.testing.assert_allclose(cross, hand(made, x, memory, **options), atol=1e-5)
    for change in ("mask", "score"):
        other = run(made, x, memory, **(options | {change: None}))
        assert not np.allclose(cross, other)


def test_grouped_heads_have_fewer_parameters():
    shapes = {n: layer(kv_heads=n).key.kernel.shape for n in (None, 2, 1)}
    assert shapes == {None: (D, 4, 3), 2: (D, 2, 3), 1: (D, 1, 3)}


@pytest.mark.parametrize("kv_heads", [None, 2])
def test_cached_steps_equal_the_causal_pass(kv_heads):
    made, x = layer(kv_heads=kv_heads), inputs()
    cache = KVCache.zeros(2, 5, kv_heads or 4, 3, jnp.float32)
    ancestry = Ancestry.start(2, 1, 5)
    outs = []
    for t in range(5):
        out, cache = made.step(x[:, t : t + 1], cache, ancestry)
        ancestry = ancestry.advance()
        outs.append(out)
    full = made(x, mask=masks.causal())
    np.testing.assert_allclose(jnp.concatenate(outs, axis=1), full, atol=1e-6)


def test_remembered_memory_gives_what_the_memory_gives():
    made, x, memory = layer(), inputs(), inputs(7, seed=1)
    remembered = made.remember(memory)
    attended = made.attend(x, remembered)
    np.testing.assert_allclose(attended, made(x, memory), atol=1e-6)


def test_weights_are_recorded_on_request_only():
    made, x, memory = layer(kv_heads=2), inputs(), inputs(7, seed=1)
    mask, score = masks.causal(1), scores.soft_cap(0.5)
    made(x, memory, mask=mask, score=score)
    assert not hasattr(made, "weights")
    made.record = True
    recorded_out = made(x, memory, mask=mask, score=score)
    expected = attention_weights(
        made.query(x), made.key(memory), mask=mask, score=score
    )
    np.testing.assert_array_equal(made.weights[...], expected)
    made.record = False
    np.testing.assert_array_equal(recorded_out, made(x, memory, mask=mask, score=score))


def test_the_default_path_computes_one_softmax():
    made, x = layer(), inputs()
    assert str(jax.make_jaxpr(lambda x: made(x))(x)).count(" exp ") == 1


def test_dropout_of_the_weights_needs_an_rng():
    made, x, rng = layer(dropout_rate=0.5), inputs(), jax.random.key(0)
    plain = layer()(x)
    np.testing.assert_array_equal(made(x), plain)
    assert not np.allclose(made(x, rng=rng), plain)
    np.testing.assert_array_equal(layer()(x, rng=rng), plain)


def test_computation_has_the_dtype_and_parameters_are_float32():
    made = layer(dtype=jnp.bfloat16)
    assert made(inputs()).dtype == jnp.bfloat16
    leaves = jax.tree.leaves(nnx.state(made, nnx.Param))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}


@pytest.mark.parametrize("heads, kv_heads", [(5, None), (4, 3)])
def test_heads_that_do_not_divide_are_an_error(heads, kv_heads):
    with pytest.raises(
        ValueError, match=f"heads must divide d_model.* heads = {heads}"
    ):
        layer(heads, kv_heads=kv_heads)
