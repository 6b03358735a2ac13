"""Linear attention and FAVOR+, against double loops in float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax.ops import dot_product_attention, linear
from qkv_jax.ops.linear import (
    LinearState,
    causal_linear_attention,
    elu_plus_one,
    favor_features,
    favor_projection,
    linear_attention,
    linear_attention_step,
    performer_attention,
)
from tests.ops.test_attention import normal, qkv
from tests.ops.test_blockwise import arrays_of

PRESENT = np.array([[1, 1, 0, 1, 1, 0, 1], [0] * 7], bool)
PROJECTION = normal(5, 3, seed=4)


def put(array, at, new):
    """A copy: jax may still be reading an array that was given to it."""
    at = at if isinstance(at, tuple) else (at,)
    array = array.copy()
    array[:, *at] = new
    return array


def elu(query, key):
    q, k = (np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))) for x in (query, key))
    return q @ k


def favor(query, key):
    """Choromanski et al. 2021, eq. 7, for softmax attention with scale H ** -0.5."""
    q, k = query / 3**0.25, key / 3**0.25
    return sum(
        np.exp(w @ q - q @ q / 2) * np.exp(w @ k - k @ k / 2) for w in PROJECTION
    )


def oracle(query, key, value, sees, kernel=elu):
    """Double loops; sees: (b, t, s) -> bool."""
    B, T, N, _ = query.shape
    S, K, E = value.shape[1:]
    out = np.zeros((B, T, N, E))
    for b, t, h in np.ndindex(B, T, N):
        kv = h * K // N
        at = [s for s in range(S) if sees(b, t, s)]
        weights = np.array([kernel(query[b, t, h], key[b, s, kv]) for s in at])
        if at:
            out[b, t, h] = weights @ value[b, at, kv] / weights.sum()
    return out


def performer(query, key, value, **options):
    return performer_attention(query, key, value, PROJECTION, **options)


def causal_performer(query, key, value, **options):
    return performer(query, key, value, causal=True, **options)


def anyone(b, t, s):
    return True


def earlier(b, t, s):
    return s <= t


def present(b, t, s):
    return PRESENT[b, s]


def both(b, t, s):
    return s <= t and PRESENT[b, s]


# The op, its key_mask, T, who sees whom, and the kernel.
FORMS = {
    "all": (linear_attention, None, 5, anyone, elu),
    "padded": (linear_attention, PRESENT, 5, present, elu),
    "causal": (causal_linear_attention, None, 7, earlier, elu),
    "causal, padded": (causal_linear_attention, PRESENT, 7, both, elu),
    "performer": (performer, None, 5, anyone, favor),
    "performer, padded": (performer, PRESENT, 5, present, favor),
    "performer, causal, padded": (causal_performer, PRESENT, 7, both, favor),
}
forms = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(autouse=True)
def chunks_of_three(monkeypatch):
    monkeypatch.setattr(linear, "CHUNK", 3)


@forms
def test_values_equal_the_oracle(form):
    run, mask, T, sees, kernel = FORMS[form]
    arrays = qkv(T=T, S=7)
    wide = [x.astype(np.float64) for x in arrays]
    wanted = oracle(*wide, sees, kernel)
    compiled = jax.jit(lambda *x: run(*x, key_mask=mask))
    np.testing.assert_allclose(compiled(*arrays), wanted, atol=1e-5)
    with jax.enable_x64(True):
        got = np.asarray(compiled(*wide))
    np.testing.assert_allclose(got, wanted, atol=1e-12)


@forms
def test_gradients_equal_finite_differences(form):
    run, mask, T, sees, kernel = FORMS[form]
    wide = [x.astype(np.float64) for x in qkv(T=T, S=7)]
    factor = normal(2, T, 4, 3, seed=9).astype(np.float64)
    with jax.enable_x64(True):
        slope = jax.grad(lambda *x: jnp.sum(factor * run(*x, key_mask=mask)), range(3))
        slopes = jax.jit(slope)(*wide)
        slopes = [np.asarray(x) for x in slopes]
    for i, slope in enumerate(slopes):
        way = normal(*slope.shape, seed=20 + i).astype(np.float64)
        up, down = (
            np.sum(
                factor
                * oracle(
                    *(x + e * way if j == i else x for j, x in enumerate(wide)),
                    sees,
                    kernel,
                )
            )
            for e in (1e-6, -1e-6)
        )
        np.testing.assert_allclose(np.sum(slope * way), (up - down) / 2e-6, rtol=1e-6)


@forms
def test_a_key_that_is_not_there_may_be_nan(form):
    run, _, T, *_ = FORMS[form]
    query, key, value = qkv(T=T, S=7)
    there = np.arange(7)[None].repeat(2, 0) != 2
    run_all = jax.jit(
        jax.value_and_grad(lambda *x: jnp.sum(run(*x, key_mask=there)), range(3))
    )
    clean = run_all(query, key, value)
    found = run_all(query, put(key, 2, np.nan), put(value, 2, np.inf))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), found, clean)


@pytest.mark.parametrize("run", [causal_linear_attention, causal_performer])
@pytest.mark.parametrize("which", [1, 2])
def test_a_nan_to_come_does_not_reach_the_past(run, which):
    arrays = list(qkv(T=7, S=7))
    run_all = jax.jit(
        jax.value_and_grad(
            lambda *x: (jnp.sum((out := run(*x))[:, :4]), out), range(3), has_aux=True
        )
    )
    (_, out), clean = run_all(*arrays)
    arrays[which] = put(arrays[which], (4, 0, 0), np.nan)
    (_, poisoned), found = run_all(*arrays)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), found, clean)
    heads = np.arange(4) < 2  # of key head 0
    bad = (np.arange(7) >= 4)[:, None] & heads
    np.testing.assert_array_equal(np.isnan(poisoned).all(-1), [bad, bad])
    np.testing.assert_allclose(poisoned[:, ~bad], out[:, ~bad], atol=1e-5)


def test_steps_equal_the_causal_form_without_a_second_trace():
    arrays = qkv(T=7, S=7)
    arrays[1][1, 5, 0, 0] = np.nan
    state = LinearState.zeros(2, 2, 3, 3)
    step = jax.jit(linear_attention_step)
    outs = []
    for t in range(7):
        out, state = step(*(x[:, t : t + 1] for x in arrays), state)
        outs.append(out)
    wanted = causal_linear_attention(*arrays)
    np.testing.assert_allclose(np.concatenate(outs, 1), wanted, atol=1e-5)
    assert step._cache_size() == 1


@pytest.mark.parametrize("T, S", [(1, 1), (2, 0), (0, 2), (0, 0)])
def test_the_shortest_sequences_have_outputs(T, S):
    arrays = qkv(T=T, S=S)
    runs = [linear_attention, performer]
    runs += [causal_linear_attention, causal_performer] if T == S else []
    wanted = np.repeat(arrays[2], 2, axis=2) if T and S else np.zeros((2, T, 4, 3))
    for run in runs:
        np.testing.assert_allclose(jax.jit(run)(*arrays), wanted, atol=1e-6)


def test_vmap_equals_a_loop_and_bfloat16_stays():
    query, key, value = qkv(T=7, S=7)
    wanted = causal_linear_attention(query, key, value)
    got = jax.vmap(lambda x: causal_linear_attention(x, key, value))(query[None])
    np.testing.assert_allclose(got[0], wanted, atol=1e-5)
    half = (jnp.asarray(x, jnp.bfloat16) for x in (query, key, value))
    half = causal_linear_attention(*half)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), wanted, atol=0.05)


def test_small_features_keep_their_digits_and_gradients():
    # elu(x) + 1 as it stands is 0 in float32 for these, and 1 / total ** 2 is inf.
    np.testing.assert_allclose(elu_plus_one(jnp.float32(-30.0)), np.exp(-30.0), 1e-5)
    assert jax.grad(elu_plus_one)(0.0) == 1.0
    query, key, value = qkv()
    query, key = query - 36, key - 36
    wide = [x.astype(np.float64) for x in (query, key, value)]
    out, pull = jax.vjp(jax.jit(linear_attention), query, key, value)
    np.testing.assert_allclose(out, oracle(*wide, anyone), atol=1e-4)
    slopes = pull(jnp.ones_like(out))
    assert all(np.isfinite(x).all() and np.abs(x).max() > 0.1 for x in slopes)


def causal_of_many_features(query, key, value):
    def features(x):
        return elu_plus_one(jnp.tile(x, 10))

    return causal_linear_attention(query, key, value, feature_map=features)


@pytest.mark.parametrize(
    "run", [causal_linear_attention, causal_performer, causal_of_many_features]
)
def test_memory_of_the_causal_form_is_linear_in_length(monkeypatch, run):
    monkeypatch.setattr(linear, "CHUNK", 64)
    shape = jax.ShapeDtypeStruct((1, 4096, 1, 3), jnp.float32)
    wide = jax.ShapeDtypeStruct((1, 4096, 1, 16), jnp.float32)
    jaxpr = jax.make_jaxpr(
        jax.value_and_grad(lambda *x: run(*x).sum(), argnums=(0, 1, 2))
    )(shape, shape, wide)
    assert max(np.prod(s) for s in arrays_of(jaxpr.jaxpr)) <= 4096 * 16


def test_favor_features_are_those_of_the_paper():
    x, projection = normal(2, 5, 3), normal(8, 3, seed=1)
    wanted = np.exp(x @ projection.T - (x**2).sum(-1, keepdims=True) / 2 - 0.5)
    got = favor_features(x, projection, shift=jnp.float32(0.5))
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    rows = jax.jit(favor_projection, static_argnums=(1, 2))(jax.random.key(0), 10, 4)
    assert rows.shape == (10, 4)
    gram = np.asarray(rows[4:8] @ rows[4:8].T)
    np.testing.assert_allclose(gram - np.diag(np.diag(gram)), 0.0, atol=1e-5)


def test_performer_nears_softmax_attention_as_features_grow():
    arrays = [x / 2 for x in qkv(T=6, S=9, H=8)]  # large ones have heavy tails
    exact = dot_product_attention(*arrays)
    draw = jax.jit(jax.vmap(favor_projection, (0, None, None)), static_argnums=(1, 2))
    rows = draw(jax.random.split(jax.random.key(0), 8), 2048, 8)
    run = jax.jit(jax.vmap(lambda rows: performer_attention(*arrays, rows)))
    few, many = (
        np.abs(run(rows[:, :features]) - exact[None]).mean() for features in (64, 2048)
    )
    assert many < few / 4 and many < 0.02


def test_a_key_that_is_not_there_does_not_set_the_performers_scale():
    query, value = normal(1, 5, 1, 3), normal(1, 7, 1, 3, seed=2)
    key = np.full((1, 7, 1, 3), 20.0, np.float32)  # exponents near -300
    key[:, 6] = 0.0
    out = performer(query, key, value, key_mask=np.arange(7)[None] < 6)
    wanted = np.broadcast_to(value[:, :6].mean(1, keepdims=True), out.shape)
    np.testing.assert_allclose(out, wanted, atol=1e-5)


def test_the_future_does_not_change_the_performers_past():
    query, key, value = qkv(T=7, S=7)
    run = jax.jit(causal_performer)
    out = run(query, key, value)
    key, value = put(key, slice(5, 7), 3 * key[:, 5:]), put(value, slice(5, 7), 9.0)
    np.testing.assert_allclose(run(query, key, value)[:, :5], out[:, :5], atol=1e-5)


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
    with pytest.raises(ValueError, match=r"key_mask must be \(B, S\) = \(2, 7\); got"):
        performer(query, key, value, key_mask=np.ones((2, 5), bool))
    with pytest.raises(TypeError, match="key_mask must be bool"):
        linear_attention(query, key, value, key_mask=np.ones((2, 7)))
    with pytest.raises(TypeError, match="key must be floating, of query's dtype"):
        performer(query.astype(np.float16), key, value)
    with pytest.raises(ValueError, match="query and key must be of length 1; got"):
        linear_attention_step(query, key, value, LinearState.zeros(2, 2, 3, 3))
