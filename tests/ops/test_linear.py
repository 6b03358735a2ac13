"""Linear attention and FAVOR+, against double loops in float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax.ops import dot_product_attention, linear, masks
from qkv_jax.ops.linear import (
    LinearState,
    causal_linear_attention,
    favor_features,
    favor_projection,
    linear_attention,
    linear_attention_step,
    performer_attention,
)
from tests.ops.test_attention import normal, qkv
from tests.ops.test_blockwise import arrays_of

PRESENT = np.array([[1, 1, 0, 1, 1, 0, 1], [0] * 7], bool)


def elu(x):
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def oracle(query, key, value, sees):
    """Double loops; sees: (b, t, s) -> bool."""
    B, T, N, _ = query.shape
    S, K, E = value.shape[1:]
    out = np.zeros((B, T, N, E))
    for b, t, h in np.ndindex(B, T, N):
        kv = h * K // N
        at = [s for s in range(S) if sees(b, t, s)]
        weights = np.array([elu(query[b, t, h]) @ elu(key[b, s, kv]) for s in at])
        if at:
            out[b, t, h] = weights @ value[b, at, kv] / weights.sum()
    return out


FORMS = {
    "all": (linear_attention, None, 5, lambda b, t, s: True),
    "padded": (linear_attention, PRESENT, 5, lambda b, t, s: PRESENT[b, s]),
    "causal": (causal_linear_attention, None, 7, lambda b, t, s: s <= t),
    "causal, padded": (
        causal_linear_attention,
        PRESENT,
        7,
        lambda b, t, s: s <= t and PRESENT[b, s],
    ),
}
forms = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(autouse=True)
def chunks_of_three(monkeypatch):
    monkeypatch.setattr(linear, "CHUNK", 3)


@forms
def test_values_equal_the_oracle(form):
    run, present, T, sees = FORMS[form]
    arrays = qkv(T=T, S=7)
    wide = [x.astype(np.float64) for x in arrays]
    wanted = oracle(*wide, sees)
    got = jax.jit(lambda *x: run(*x, key_mask=present))(*arrays)
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    with jax.enable_x64(True):
        got = np.asarray(run(*map(jnp.asarray, wide), key_mask=present))
    np.testing.assert_allclose(got, wanted, atol=1e-12)


@forms
def test_gradients_equal_finite_differences(form):
    run, present, T, sees = FORMS[form]
    wide = [x.astype(np.float64) for x in qkv(T=T, S=7)]
    factor = normal(2, T, 4, 3, seed=9).astype(np.float64)
    with jax.enable_x64(True):
        slopes = jax.grad(
            lambda *x: jnp.sum(factor * run(*x, key_mask=present)), range(3)
        )(*map(jnp.asarray, wide))
        slopes = [np.asarray(x) for x in slopes]
    for i, slope in enumerate(slopes):
        way = normal(*slope.shape, seed=20 + i).astype(np.float64)
        up, down = (
            np.sum(
                factor
                * oracle(
                    *(x + e * way if j == i else x for j, x in enumerate(wide)), sees
                )
            )
            for e in (1e-6, -1e-6)
        )
        np.testing.assert_allclose(np.sum(slope * way), (up - down) / 2e-6, rtol=1e-6)


@forms
def test_a_key_that_is_not_there_may_be_nan(form):
    run, _, T, _ = FORMS[form]
    query, key, value = qkv(T=T, S=7)
    key[:, 2], value[:, 2] = np.nan, np.inf
    present = np.arange(7)[None].repeat(2, 0) != 2
    out, slopes = jax.value_and_grad(
        lambda *x: jnp.sum(run(*x, key_mask=present)), range(3)
    )(query, key, value)
    assert all(np.isfinite(x).all() for x in (out, *slopes))


def test_steps_equal_the_causal_form_without_a_second_trace():
    arrays = qkv(T=7, S=7)
    state = LinearState.zeros(2, 2, 3, 3)
    step = jax.jit(linear_attention_step)
    outs = []
    for t in range(7):
        out, state = step(*(x[:, t : t + 1] for x in arrays), state)
        outs.append(out)
    wanted = causal_linear_attention(*arrays)
    np.testing.assert_allclose(np.concatenate(outs, 1), wanted, atol=1e-5)
    assert step._cache_size() == 1


def test_memory_of_the_causal_form_is_linear_in_length(monkeypatch):
    monkeypatch.setattr(linear, "CHUNK", 64)
    shape = jax.ShapeDtypeStruct((1, 4096, 1, 16), jnp.float32)
    jaxpr = jax.make_jaxpr(
        jax.grad(lambda *x: causal_linear_attention(*x).sum(), argnums=(0, 1, 2))
    )(*3 * (shape,))
    assert max(np.prod(s) for s in arrays_of(jaxpr.jaxpr)) <= 4096 * 64


def test_favor_features_are_those_of_the_paper():
    x, projection = normal(2, 5, 3), normal(8, 3, seed=1)
    wanted = np.exp(x @ projection.T - (x**2).sum(-1, keepdims=True) / 2 - 0.5)
    got = favor_features(x, projection, shift=jnp.float32(0.5))
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    rows = favor_projection(jax.random.key(0), 10, 4)
    assert rows.shape == (10, 4)
    gram = np.asarray(rows[4:8] @ rows[4:8].T)
    np.testing.assert_allclose(gram - np.diag(np.diag(gram)), 0.0, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_performer_nears_softmax_attention_as_features_grow(causal, monkeypatch):
    monkeypatch.setattr(linear, "CHUNK", 64)
    arrays = [x / 2 for x in qkv(T=24, S=24, H=8)]  # large ones have heavy tails
    exact = dot_product_attention(*arrays, mask=masks.causal() if causal else None)
    errors = []
    for features in (64, 4096):
        drawn = [
            performer_attention(
                *arrays,
                favor_projection(jax.random.key(seed), features, 8),
                causal=causal,
            )
            for seed in range(3)
        ]
        errors.append(np.mean([np.abs(out - exact).mean() for out in drawn]))
    assert errors[1] < errors[0] / 4 and errors[1] < 0.02


def test_the_future_does_not_change_the_performers_past():
    query, key, value = qkv(T=8, S=8)
    rows = favor_projection(jax.random.key(0), 16, 3)
    out = performer_attention(query, key, value, rows, causal=True)
    key[:, 5:], value[:, 5:] = 3 * key[:, 5:], -value[:, 5:]
    other = performer_attention(query, key, value, rows, causal=True)
    np.testing.assert_allclose(out[:, :5], other[:, :5], atol=1e-5)


def test_bad_arguments_are_named():
    query, key, value = qkv()
    with pytest.raises(ValueError, match="one length in the causal form"):
        causal_linear_attention(query, key, value)
    with pytest.raises(ValueError, match=r"key_mask must be \(B, S\) = \(2, 7\); got"):
        linear_attention(query, key, value, key_mask=np.ones((2, 5), bool))
    with pytest.raises(
        ValueError, match=r"projection must be \(F, 3\); got .*\(8, 4\)"
    ):
        performer_attention(query, key, value, jnp.ones((8, 4)))
