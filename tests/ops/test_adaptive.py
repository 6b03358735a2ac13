"""Adaptively sparse attention, against closed forms and bisection in float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from qkv_jax.ops import adaptive, masks, scores
from qkv_jax.ops.adaptive import entmax, entmax_attention, sparsemax
from tests.ops.test_attention import normal, qkv
from tests.ops.test_context_parallel import mesh_of


def by_bisection(logits, alpha):
    """alpha-entmax of one float64 vector; -inf has weight 0."""
    logits = np.asarray(logits, np.float64)
    if not np.any(np.isfinite(logits)):
        return np.zeros_like(logits)
    if alpha == 1.0:
        p = np.exp(logits - logits.max())
        return p / p.sum()
    scaled = (alpha - 1.0) * logits
    low, high = scaled.max() - 1.0, scaled.max()
    for _ in range(200):
        middle = (low + high) / 2
        p = np.maximum(scaled - middle, 0.0) ** (1.0 / (alpha - 1.0))
        low, high = (middle, high) if p.sum() >= 1.0 else (low, middle)
    p = np.maximum(scaled - low, 0.0) ** (1.0 / (alpha - 1.0))
    return p / p.sum()


def sorted_sparsemax(logits):
    """Martins and Astudillo 2016, algorithm 1."""
    ordered = np.sort(logits)[::-1]
    sums = np.cumsum(ordered)
    count = np.sum(1.0 + np.arange(1, len(logits) + 1) * ordered > sums)
    return np.maximum(logits - (sums[count - 1] - 1.0) / count, 0.0)


@pytest.mark.parametrize("alpha", [1.0, 1.01, 1.3, 1.5, 2.0, 3.7])
def test_entmax_equals_bisection_in_numpy(alpha):
    logits = 3 * normal(4, 11).astype(np.float64)
    logits[1, 4:] = -np.inf
    logits[2] = -np.inf
    wanted = np.array([by_bisection(row, alpha) for row in logits])
    with jax.enable_x64(True):
        np.testing.assert_allclose(entmax(logits, alpha), wanted, atol=1e-12)
    got = jax.jit(entmax)(logits.astype(np.float32), alpha)
    np.testing.assert_allclose(got, wanted, atol=1e-6)


def hard_rows(S, rng):
    return np.stack(
        [
            np.zeros(S),
            np.where(rng.random(S) < 0.5, 0.0, -0.3),
            np.where(np.arange(S) == 1, 3.0, 0.01 * rng.normal(size=S)),
            rng.standard_cauchy(S),
            np.where(rng.random(S) < 0.9, -np.inf, rng.normal(size=S)),
        ]
    ).astype(np.float32)


@pytest.mark.parametrize("S", [2, 33, 2048])
@pytest.mark.parametrize("alpha", [1.0, 1.0001, 1.05, 1.5, 2.0, 2.5])
def test_no_row_keeps_the_search_for_long(alpha, S, monkeypatch):
    monkeypatch.setattr(adaptive, "MOST_STEPS", 12 if alpha <= 2.0 else 30)
    logits = hard_rows(S, np.random.default_rng(S))
    wanted = [by_bisection(row, np.float64(np.float32(alpha))) for row in logits]
    got = jax.jit(lambda x: entmax(x, alpha))(logits)  # traced anew
    np.testing.assert_allclose(got, wanted, atol=2e-6)
    assert np.abs(got - np.array(wanted)).sum(axis=-1).max() < 1e-5


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_over_devices_as_on_one(kind):
    mesh = mesh_of(kind, data=4, model=2)
    logits, alphas = normal(8, 4, 5, 6), np.array([1.0, 1.3, 1.5, 2.0], np.float32)
    slopes = jax.value_and_grad(
        lambda x, a: jnp.sum(jnp.sin(entmax(x, a[:, None]))), (0, 1)
    )
    wanted = jax.jit(slopes)(logits, alphas)
    with jax.set_mesh(mesh):
        places = (PartitionSpec("data", "model"), PartitionSpec("model"))
        x, a = (
            jax.device_put(x, NamedSharding(mesh, place))
            for x, place in zip((logits, alphas), places, strict=True)
        )
        got = jax.jit(slopes)(x, a)
        alone = jax.shard_map(
            lambda x, a: entmax(x, a[:, None]), in_specs=places, out_specs=places[0]
        )
        weights = jax.jit(alone)(x, a)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-5), got, wanted)
    np.testing.assert_allclose(weights, entmax(logits, alphas[:, None]), atol=1e-6)


def test_sparsemax_equals_the_closed_form_and_has_exact_zeros():
    logits = normal(5, 13).astype(np.float64)
    with jax.enable_x64(True):
        got = np.asarray(sparsemax(logits))
    np.testing.assert_allclose(got, [*map(sorted_sparsemax, logits)], atol=1e-14)
    assert np.mean(got == 0.0) > 0.5
    np.testing.assert_allclose(got.sum(-1), 1.0, rtol=1e-12)


@pytest.mark.parametrize("alpha", [1.0, 1.2, 1.5, 2.0])
def test_gradients_for_logits_and_alpha_equal_finite_differences(alpha):
    logits, along = (x.astype(np.float64) for x in normal(2, 7))
    weights = normal(7, seed=4).astype(np.float64)

    def oracle(step, bend):
        return weights @ by_bisection(logits + step * along, alpha + bend)

    with jax.enable_x64(True):

        def loss(logits, alpha):
            return jnp.sum(weights * entmax(logits, alpha))

        d_logits, d_alpha = map(
            np.asarray, jax.grad(loss, argnums=(0, 1))(jnp.asarray(logits), alpha)
        )
        _, forward = jax.jvp(lambda x: loss(x, alpha), (logits,), (along,))
    step = 1e-6
    slope = (oracle(step, 0.0) - oracle(-step, 0.0)) / (2 * step)
    np.testing.assert_allclose(d_logits @ along, slope, rtol=1e-6)
    np.testing.assert_allclose(forward, slope, rtol=1e-6)
    low = 0.0 if alpha == 1.0 else -1e-5
    bend = (oracle(0.0, 1e-5) - oracle(0.0, low)) / (1e-5 - low)
    np.testing.assert_allclose(d_alpha, bend, rtol=1e-4)


def slope_for_alpha(logits, alpha):
    """d entmax / d alpha: Correia et al. 2019's limit next to alpha = 1, a chord elsewhere."""
    if alpha < 1.001:
        p = by_bisection(logits, 1.0)
        return p * (np.sum(p * np.log(p) ** 2) - np.log(p) ** 2) / 2
    up, down = (by_bisection(logits, alpha + bend) for bend in (1e-3, -1e-3))
    return (up - down) / 2e-3


@pytest.mark.parametrize("alpha", [1.0, 1 + 1e-6, 1 + 1e-4, 1.01, 1.1])
def test_a_learned_alpha_keeps_its_gradient_beside_the_softmax_in_float32(alpha):
    # Differences over (alpha - 1) ** 2 left 45833 of a slope of -0.29 at 1 + 1e-6.
    logits, weights = 3 * normal(17), normal(17, seed=1)
    slope = jax.grad(lambda a: jnp.sum(weights * entmax(jnp.asarray(logits), a)))
    wanted = weights @ slope_for_alpha(logits, alpha)
    np.testing.assert_allclose(slope(jnp.float32(alpha)), wanted, rtol=2e-3)
    np.testing.assert_allclose(
        entmax(logits, alpha), by_bisection(logits, alpha), atol=1e-6
    )


@pytest.mark.parametrize("alpha", [1.0, 1.3, 2.0])
def test_second_order_equals_differences_of_first_order(alpha):
    with jax.enable_x64(True):
        logits, weights = (jnp.asarray(x, jnp.float64) for x in normal(2, 6))

        def loss(logits, alpha):
            return jnp.sum(weights * jnp.sin(entmax(logits, alpha)))

        slope = jax.jit(jax.grad(loss, argnums=(0, 1)))
        step, at = 1e-6, jnp.float64(alpha)
        for way in ((1.0, 0.0), (0.0, 1.0)):
            ends = way[0] * weights, jnp.float64(way[1])
            _, got = jax.jvp(slope, (logits, at), ends)
            # Not under alpha = 1: the near side alone.
            ahead = slope(logits + step * ends[0], at + step * ends[1])
            change = jax.tree.map(lambda a, b: (a - b) / step, ahead, slope(logits, at))
            jax.tree.map(
                lambda g, w: np.testing.assert_allclose(g, w, atol=2e-5), got, change
            )


RULES = {
    "plain": (lambda: None, lambda b, q, k: True),
    "causal": (lambda: masks.causal(-1), lambda b, q, k: k <= q - 1),
    "padded": (
        lambda: masks.lengths(key=np.array([6, 2], np.int32)),
        lambda b, q, k: k < (6, 2)[b],
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_attention_equals_the_oracle(name):
    mask, rule = RULES[name]
    alphas = np.array([1.0, 1.3, 1.5, 2.0])
    query, key, value = (x.astype(np.float64) for x in qkv())
    wanted = np.zeros((2, 5, 4, 3))
    for b, q, h in np.ndindex(2, 5, 4):
        logits = [
            1.5 * np.tanh(query[b, q, h] @ key[b, k, h // 2] * 3**-0.5 / 1.5)
            if rule(b, q, k)
            else -np.inf
            for k in range(7)
        ]
        wanted[b, q, h] = by_bisection(logits, alphas[h]) @ value[b, :, h // 2]
    with jax.enable_x64(True):
        options = {"mask": mask(), "score": scores.soft_cap(1.5)}
        got = jax.jit(entmax_attention)(query, key, value, alphas, **options)
        np.testing.assert_allclose(got, wanted, atol=1e-12)
    slopes = jax.grad(
        lambda *x: jnp.sum(jnp.sin(entmax_attention(*x, mask=mask()))),
        argnums=(0, 1, 2, 3),
    )
    gradients = jax.jit(slopes)(*qkv(), jnp.asarray(alphas, jnp.float32))
    assert all(np.isfinite(x).all() for x in gradients)


def test_a_nan_reaches_just_the_rows_that_see_it():
    query, key, value = qkv(B=1, N=2, K=2)
    key[0, 4], value[0, 4] = np.nan, np.inf

    def run(query, value, mask):
        return entmax_attention(query, key, value, 1.5, mask=mask)

    out = run(query, value, masks.causal())
    assert np.isfinite(out[:, :4]).all() and np.isnan(out[:, 4]).all()
    gradients = jax.grad(
        lambda *x: jnp.sum(run(*x, ~masks.window(0, 0) & masks.prefix(4))), (0, 1)
    )(query, value)
    assert all(np.isfinite(x).all() for x in gradients)


def test_a_masked_bad_key_leaves_every_gradient_finite():
    query, key, value = qkv()
    mask = masks.lengths(key=np.array([4, 5], np.int32))

    def slopes(key, value):
        loss = lambda *x: jnp.sum(jnp.sin(entmax_attention(*x, mask=mask)))
        return jax.grad(loss, (0, 1, 2, 3))(query, key, value, jnp.full(4, 1.4))

    wanted = slopes(key, value)
    key, value = key.copy(), value.copy()  # JAX may not have read the others yet
    key[:, 5:], value[:, 5:] = np.nan, np.inf
    jax.tree.map(np.testing.assert_array_equal, slopes(key, value), wanted)


def test_few_keys_bfloat16_and_vmap():
    query, key, value = qkv()
    one = entmax_attention(query, key[:, :1], value[:, :1], 1.5)
    wanted = np.broadcast_to(np.repeat(value[:, :1], 2, axis=2), one.shape)
    np.testing.assert_allclose(one, wanted, rtol=1e-6)
    assert np.all(entmax_attention(query, key[:, :0], value[:, :0], 1.5) == 0.0)
    narrow = [x.astype(jnp.bfloat16) for x in (query, key, value)]
    out = entmax_attention(*narrow, 1.5)
    assert out.dtype == jnp.bfloat16
    wide = entmax_attention(*(x.astype(np.float32) for x in narrow), 1.5)
    np.testing.assert_allclose(out.astype(np.float32), wide, atol=3e-2)
    logits, alphas = normal(3, 5), np.array([1.0, 1.5, 2.0], np.float32)
    np.testing.assert_allclose(
        jax.vmap(entmax)(logits, alphas), entmax(logits, alphas), atol=1e-6
    )


def test_bad_alphas_are_named():
    with pytest.raises(ValueError, match="alpha must be at least 1; got 0.5"):
        entmax(jnp.zeros(3), 0.5)
    with pytest.raises(ValueError, match="alpha must be at least 1; got 0.5"):
        entmax_attention(*qkv(), 0.5)
    with pytest.raises(ValueError, match=r"alpha must broadcast to \(2,\); got .*2, 3"):
        entmax(jnp.zeros((2, 3)), jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"alpha must be \(\) or \(N,\) = \(4,\)"):
        entmax_attention(*qkv(), jnp.ones(3))
