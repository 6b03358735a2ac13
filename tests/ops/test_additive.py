"""Bahdanau's and Luong's attention, against loops in float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax.ops import masks
from qkv_jax.ops.additive import (
    additive_attention,
    additive_weights,
    local_attention,
    luong_concat,
    luong_dot,
    luong_general,
    monotonic_centres,
    predictive_centres,
)
from tests.ops.cases import ints
from tests.ops.test_attention import normal
from tests.ops.test_blockwise import arrays_of

B, T, S, N, C, D, H, E = 2, 5, 7, 2, 3, 4, 5, 3
QUERY, KEY, VALUE = (
    normal(B, T, N, C),
    normal(B, S, N, D, seed=1),
    normal(B, S, N, E, seed=2),
)
CENTRES = np.array([[0.0, 1.2, 3.5, 6.0, 9.0], [2.2, 2.0, 1.0, 0.4, 5.6]], np.float32)
MASKS = {
    "plain": (lambda: None, lambda b, q, k: True),
    "causal": (lambda: masks.causal(-1), lambda b, q, k: k <= q - 1),
    "padded": (lambda: masks.lengths(key=ints(6, 0)), lambda b, q, k: k < (6, 0)[b]),
}


def near(b, q, k):
    return abs(k - CENTRES[b, q]) <= 2


# The op, its further arrays, the score of a pair, and what multiplies its weight.
FAMILIES = {
    "additive": (
        lambda q, k, v, w, **o: additive_attention(q, k[..., :C], v, w, **o),
        [normal(N, C, seed=3)],
        lambda q, k, h, w: w[h] @ np.tanh(q + k[:C]),
    ),
    "dot": (
        lambda q, k, v, **o: luong_dot(q, k[..., :C], v, **o),
        [],
        lambda q, k, h: q @ k[:C],
    ),
    "general": (
        luong_general,
        [normal(N, C, D, seed=3)],
        lambda q, k, h, w: q @ w[h] @ k,
    ),
    "concat": (
        luong_concat,
        [normal(N, C + D, H, seed=3), normal(N, H, seed=4)],
        lambda q, k, h, w, v: v[h] @ np.tanh(np.concatenate([q, k]) @ w[h]),
    ),
    "local": (
        lambda q, k, v, c, **o: local_attention(q, k[..., :C], v, c, half_width=2, **o),
        [CENTRES],
        lambda q, k, h, c: q @ k[:C],
    ),
}
families = pytest.mark.parametrize("family", FAMILIES)


def oracle(family, rule, query, key, value, *more):
    (B, T, N, _), S = query.shape, key.shape[1]
    out = np.zeros((B, T, N, E))
    for b, q, h in np.ndindex(B, T, N):
        local = family == "local"
        keys = [k for k in range(S) if rule(b, q, k) and (not local or near(b, q, k))]
        if keys:
            score = FAMILIES[family][2]
            logits = [score(query[b, q, h], key[b, k, h], h, *more) for k in keys]
            weights = np.exp(logits - np.max(logits))
            weights /= weights.sum()
            if local:
                away = np.array(keys) - more[0][b, q]
                weights *= np.exp(-(away**2) / (2 * (2 / 2) ** 2))
            out[b, q, h] = weights @ value[b, keys, h]
    return out


@families
@pytest.mark.parametrize("mask", MASKS)
def test_values_equal_the_oracle(family, mask):
    run, more, _ = FAMILIES[family]
    make, rule = MASKS[mask]
    arrays = QUERY, KEY, VALUE, *more
    wide = [x.astype(np.float64) for x in arrays]
    wanted = oracle(family, rule, *wide)
    compiled = jax.jit(lambda *x: run(*x, mask=make()))
    np.testing.assert_allclose(compiled(*arrays), wanted, atol=1e-5)
    with jax.enable_x64(True):
        got = np.asarray(compiled(*wide))
    np.testing.assert_allclose(got, wanted, atol=1e-12)


@families
def test_gradients_equal_finite_differences(family):
    run, more, _ = FAMILIES[family]
    make, rule = MASKS["causal"]
    wide = [x.astype(np.float64) for x in (QUERY, KEY, VALUE, *more)]
    factor = normal(B, T, N, E, seed=9).astype(np.float64)
    with jax.enable_x64(True):
        slope = jax.grad(
            lambda *x: jnp.sum(factor * run(*x, mask=make())), range(len(wide))
        )
        slopes = jax.jit(slope)(*wide)
        slopes = [np.asarray(x) for x in slopes]
    for i, slope in enumerate(slopes):
        way = normal(*slope.shape, seed=20 + i).astype(np.float64)
        up, down = (
            np.sum(
                factor
                * oracle(
                    family,
                    rule,
                    *(x + e * way if j == i else x for j, x in enumerate(wide)),
                )
            )
            for e in (1e-6, -1e-6)
        )
        np.testing.assert_allclose(np.sum(slope * way), (up - down) / 2e-6, rtol=1e-6)


@families
def test_what_is_masked_may_be_nan(family):
    run, more, _ = FAMILIES[family]
    key, value = KEY.copy(), VALUE.copy()
    key[:, 6], value[:, 6] = np.nan, np.inf
    run_all = jax.jit(
        jax.value_and_grad(
            lambda *arrays: jnp.sum(run(*arrays, mask=masks.prefix(6))),
            range(3 + len(more)),
        )
    )
    clean = run_all(QUERY, KEY, VALUE, *more)
    found = run_all(QUERY, key, value, *more)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), found, clean)


@families
def test_a_nan_reaches_just_the_rows_that_may_see_it(family):
    run, more, _ = FAMILIES[family]
    key = KEY.copy()
    key[:, 2, :, 0] = np.nan
    out = jax.jit(lambda *x: run(*x, mask=masks.causal()))(QUERY, key, VALUE, *more)
    for b, q in np.ndindex(B, T):
        sees = q >= 2 and (family != "local" or near(b, q, 2))
        assert np.isnan(out[b, q]).all() == sees and np.isnan(out[b, q]).any() == sees


@pytest.mark.parametrize("T, S", [(37, 3), (1, 1), (3, 0), (0, 3)])
def test_additive_of_any_length_with_grouped_heads_equals_the_oracle(T, S):
    query, weight = normal(1, T, 2, C), normal(2, C, seed=3)
    key, value = normal(1, S, 1, C, seed=1), normal(1, S, 1, E, seed=2)
    all_heads = (np.repeat(x, 2, axis=2) for x in (key, value))
    wanted = oracle("additive", lambda b, q, k: True, query, *all_heads, weight)
    got = jax.jit(additive_attention)(query, key, value, weight)
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_weights_are_those_that_values_are_averaged_with():
    weight, mask = normal(N, C, seed=3), masks.causal(-1)
    weights = additive_weights(QUERY, KEY[..., :C], weight, mask=mask)
    out = additive_attention(QUERY, KEY[..., :C], VALUE, weight, mask=mask)
    averaged = np.einsum("BNTS,BSNE->BTNE", weights, VALUE)
    np.testing.assert_allclose(averaged, out, atol=1e-5)
    wanted = np.broadcast_to(np.arange(T) > 0, (B, N, T))
    np.testing.assert_allclose(weights.sum(-1), wanted, atol=1e-5)


def test_without_the_gaussian_local_weights_are_a_plain_softmax():
    query, key = np.zeros((1, 4, 1, 1), np.float32), np.zeros((1, 4, 1, 1), np.float32)
    value = np.array([1, 2, 4, 9], np.float32).reshape(1, 4, 1, 1)
    centres = monotonic_centres(1, 4)
    out = local_attention(query, key, value, centres, half_width=1, gaussian=False)
    np.testing.assert_allclose(out[0, :, 0, 0], [1.5, 7 / 3, 5, 6.5], rtol=1e-6)


@families
def test_vmap_equals_a_loop_and_bfloat16_stays(family):
    run, more, _ = FAMILIES[family]
    run, queries = jax.jit(run), np.stack([QUERY, -QUERY])
    got = jax.jit(jax.vmap(lambda x: run(x, KEY, VALUE, *more)))(queries)
    half = run(*(jnp.asarray(x, jnp.bfloat16) for x in (QUERY, KEY, VALUE)), *more)
    wanted = run(QUERY, KEY, VALUE, *more)
    np.testing.assert_allclose(got[0], wanted, atol=1e-5)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), wanted, atol=0.1)


def test_centres_are_those_of_the_paper():
    np.testing.assert_array_equal(monotonic_centres(2, 3), [[0, 1, 2]] * 2)
    query, matrix, weight = normal(2, 3, 4), normal(4, 5, seed=1), normal(5, seed=2)
    wanted = 1 / (1 + np.exp(-np.tanh(query @ matrix) @ weight))
    got = predictive_centres(query, matrix, weight, ints(9, 4))
    np.testing.assert_allclose(got, wanted * [[9], [4]], rtol=1e-5)
    half = (jnp.asarray(x, jnp.bfloat16) for x in (query, matrix, weight))
    assert predictive_centres(*half, ints(9, 4)).dtype == jnp.float32


def test_long_queries_are_scored_in_blocks():
    def loss(query, key, value, weight):
        return jnp.sum(additive_attention(query, key, value, weight))

    shapes = (1, 256, 1, 64), (1, 256, 1, 64), (1, 256, 1, 8), (1, 64)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2, 3)))(*shapes)
    assert max(np.prod(s) for s in arrays_of(jaxpr.jaxpr)) < 256 * 256 * 64 / 4


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"weight must be \(N, H\) = \(2, 3\)"):
        additive_attention(QUERY, KEY[..., :C], VALUE, np.ones(3))
    with pytest.raises(ValueError, match=r"matrix must be \(N, C, H\) = \(2, 3, 4\)"):
        luong_general(QUERY, KEY, VALUE, np.ones((3, 4)))
    with pytest.raises(
        ValueError, match=r"matrix must be \(N, C \+ D, H\) = \(2, 7, 5"
    ):
        luong_concat(QUERY, KEY, VALUE, np.ones((2, 6, 5)), np.ones((2, 5)))
    with pytest.raises(ValueError, match="half_width must be at least 1; got 0"):
        local_attention(QUERY, KEY[..., :C], VALUE, CENTRES, half_width=0)
    with pytest.raises(ValueError, match=r"centres must be \(B, T\) = \(2, 5\); got"):
        local_attention(QUERY, KEY[..., :C], VALUE, CENTRES[0], half_width=2)
    with pytest.raises(ValueError, match=r"query must be \(batch, length, heads, size"):
        luong_general(QUERY[0], KEY, VALUE, np.ones((2, 3, 4)))
    with pytest.raises(ValueError, match="key must have query's 2 heads"):
        luong_concat(QUERY, KEY[:, :, :1], VALUE, np.ones((2, 7, 5)), np.ones((2, 5)))
