"""Attention along arcs, against dense sums over an adjacency in float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax.ops import dot_product_attention, scores
from qkv_jax.ops.dropout import keep
from qkv_jax.ops.graph import (
    arc_attention,
    gat_attention,
    gatv2_attention,
    segment_softmax,
)
from tests.ops.test_attention import normal

P, S, N, H = 5, 7, 2, 3
# Node 3 receives nothing; the arc 0 <- 2 is listed twice.
RECEIVERS = np.array([0, 0, 1, 2, 2, 4, 0, 4, 2], np.int32)
SENDERS = np.array([2, 5, 0, 6, 1, 3, 2, 4, 0], np.int32)


def leaky(x):
    return np.where(x > 0, x, 0.2 * x)


FAMILIES = {
    "gat": (
        lambda x, y, a, b, **arcs: gat_attention(x, y, a, b, **arcs),
        lambda x, y, a, b: leaky(a @ x + b @ y),
    ),
    "gatv2": (
        lambda x, y, a, b, **arcs: gatv2_attention(x, y, a + b, **arcs),
        lambda x, y, a, b: (a + b) @ leaky(x + y),
    ),
    "dot": (
        lambda x, y, a, b, **arcs: arc_attention(x * (a + b)[None], y, y, **arcs),
        lambda x, y, a, b: (x * (a + b)) @ y * H**-0.5,
    ),
}
families = pytest.mark.parametrize("name", FAMILIES)


def inputs(dtype=np.float64):
    shapes = (P, N, H), (S, N, H), (N, H), (N, H)
    return [normal(*shape, seed=i).astype(dtype) for i, shape in enumerate(shapes)]


def oracle(name, x, y, a, b, receivers=RECEIVERS, senders=SENDERS):
    out = np.zeros((P, N, H))
    for i, h in np.ndindex(P, N):
        at = senders[receivers == i]
        if len(at):
            score = [FAMILIES[name][1](x[i, h], y[j, h], a[h], b[h]) for j in at]
            weights = np.exp(score - np.max(score))
            out[i, h] = weights @ y[at, h] / weights.sum()
    return out


@families
def test_values_equal_the_dense_form_and_lone_nodes_get_zero(name):
    arrays, arcs = inputs(), {"receivers": RECEIVERS, "senders": SENDERS}
    wanted = oracle(name, *arrays)
    compiled = jax.jit(FAMILIES[name][0])
    with jax.enable_x64(True):
        got = np.asarray(compiled(*arrays, **arcs))
    np.testing.assert_allclose(got, wanted, atol=1e-12)
    got = compiled(*inputs(np.float32), **arcs)
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    assert np.all(got[3] == 0.0)


@families
def test_gradients_equal_finite_differences(name):
    arrays, arcs = inputs(), {"receivers": RECEIVERS, "senders": SENDERS}
    weights = normal(P, N, H, seed=9).astype(np.float64)
    with jax.enable_x64(True):
        run = lambda *x: jnp.sum(weights * FAMILIES[name][0](*x, **arcs))
        slopes = jax.grad(run, argnums=(0, 1, 2, 3))(*map(jnp.asarray, arrays))
        slopes = [np.asarray(x) for x in slopes]
    for i, slope in enumerate(slopes):
        way = normal(*slope.shape, seed=20 + i).astype(np.float64)
        up, down = (
            np.sum(
                weights
                * oracle(
                    name,
                    *(x + e * way if j == i else x for j, x in enumerate(arrays)),
                )
            )
            for e in (1e-6, -1e-6)
        )
        np.testing.assert_allclose(np.sum(slope * way), (up - down) / 2e-6, rtol=1e-6)


@families
def test_arcs_that_are_not_there_do_not_matter(name):
    x, y, a, b = inputs(np.float32)
    wanted = oracle(name, *inputs())
    y = np.concatenate([y, np.full((1, N, H), np.nan, np.float32)])
    order = np.random.default_rng(0).permutation(len(RECEIVERS) + 2)
    arcs = {
        "receivers": np.append(RECEIVERS, [3, 0])[order].astype(np.int32),
        "senders": np.append(SENDERS, [S, S])[order].astype(np.int32),
        "arc_mask": np.append(np.ones(len(RECEIVERS), bool), [False, False])[order],
    }
    run = jax.jit(lambda *z: FAMILIES[name][0](*z, **arcs))
    np.testing.assert_allclose(run(x, y, a, b), wanted, atol=1e-5)
    gradients = jax.grad(lambda *z: run(*z).sum(), argnums=(0, 1, 2, 3))(x, y, a, b)
    assert all(np.isfinite(g).all() for g in gradients)
    assert np.all(gradients[1][S] == 0.0)


def test_arcs_of_a_dense_mask_give_dot_product_attention():
    query, key, value = (
        normal(P, N, H),
        normal(S, N, H, seed=1),
        normal(S, N, 4, seed=2),
    )
    bias = normal(P, S, N, seed=3)
    pairs = normal(P, S, seed=4) > 0
    receivers, senders = np.nonzero(pairs)
    got = jax.jit(arc_attention)(
        query,
        key,
        value,
        receivers=receivers,
        senders=senders,
        bias=bias[receivers, senders],
    )
    wanted = jax.jit(dot_product_attention)(
        *(x[None] for x in (query, key, value)),
        mask=pairs[None, None],
        score=scores.bias(bias.transpose(2, 0, 1)[None]),
    )[0]
    np.testing.assert_allclose(got, wanted, atol=1e-6)


@families
@pytest.mark.parametrize("bad", [-1, 99])
def test_an_arc_out_of_range_is_not_there(name, bad):
    # A sender past the end was taken for the last node.
    x, y, a, b = inputs(np.float32)
    arcs = {
        "receivers": np.append(RECEIVERS, [0, bad, 3]).astype(np.int32),
        "senders": np.append(SENDERS, [bad, 1, bad]).astype(np.int32),
    }
    got = jax.jit(lambda *z: FAMILIES[name][0](*z, **arcs))(x, y, a, b)
    np.testing.assert_allclose(got, oracle(name, *inputs()), atol=1e-5)


@families
def test_a_bad_node_reaches_just_those_who_see_it(name):
    x, y, a, b = (jnp.asarray(z) for z in inputs(np.float32))
    y = y.at[3].set(np.nan)  # seen by node 4 alone; the arc 1 <- 3 is not there
    arcs = {
        "receivers": np.append(RECEIVERS, 1).astype(np.int32),
        "senders": np.append(SENDERS, 3).astype(np.int32),
        "arc_mask": np.arange(len(RECEIVERS) + 1) < len(RECEIVERS),
    }
    run = jax.jit(lambda x, y: FAMILIES[name][0](x, y, a, b, **arcs))
    out = run(x, y)
    assert np.isnan(out[4]).all() and np.isfinite(out[:4]).all()
    d_x, d_y = jax.grad(lambda *z: jnp.sum(jnp.sin(run(*z))), (0, 1))(x, y)
    assert np.isfinite(d_x[:4]).all()
    assert np.isfinite(np.delete(d_y, [3, 4], axis=0)).all()  # 4 sees 3 and 4


def test_a_graph_without_arcs_gives_zeros():
    x, y, a, b = (jnp.asarray(z) for z in inputs(np.float32))
    none = np.zeros(0, np.int32)
    slopes = jax.grad(
        lambda x: jnp.sum(gat_attention(x, y, a, b, receivers=none, senders=none) ** 2)
    )(x)
    assert np.all(slopes == 0.0)


@families
def test_bfloat16_comes_back_and_the_softmax_is_wider(name):
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in inputs()]
    out = FAMILIES[name][0](*arrays, receivers=RECEIVERS, senders=SENDERS)
    assert out.dtype == jnp.bfloat16
    wanted = oracle(name, *(np.asarray(x, np.float64) for x in arrays))
    np.testing.assert_allclose(np.asarray(out, np.float64), wanted, atol=3e-2)


def test_gradients_reach_the_bias_of_an_arc():
    x, y, weights = normal(P, N, H), normal(S, N, H, seed=1), normal(P, N, H, seed=2)
    bias = normal(len(RECEIVERS), N, seed=3)
    with jax.enable_x64(True):
        x, y, weights, bias = (
            jnp.asarray(z, jnp.float64) for z in (x, y, weights, bias)
        )

        def loss(bias):
            out = arc_attention(
                x, y, y, receivers=RECEIVERS, senders=SENDERS, bias=bias
            )
            return jnp.sum(weights * out)

        slope, way = jax.grad(loss)(bias), jnp.sin(bias)
        chord = (loss(bias + 1e-6 * way) - loss(bias - 1e-6 * way)) / 2e-6
        np.testing.assert_allclose(jnp.sum(slope * way), chord, rtol=1e-6)
    assert np.any(np.abs(slope) > 1e-2)


def test_dropout_scales_what_it_keeps_and_nothing_else():
    x, y, a, b = inputs(np.float32)
    rng, rate = jax.random.key(3), 0.5
    ends = RECEIVERS[:, None], SENDERS[:, None]
    kept = keep(rng, rate, jnp.arange(N)[None], *map(jnp.asarray, ends))
    score = leaky(np.sum(x * a, -1)[RECEIVERS] + np.sum(y * b, -1)[SENDERS])
    weights = np.exp(score)
    for i in range(P):
        weights[RECEIVERS == i] /= weights[RECEIVERS == i].sum(0)
    wanted = np.zeros((P, N, H))
    np.add.at(wanted, RECEIVERS, (weights * kept / (1 - rate))[..., None] * y[SENDERS])
    got = gat_attention(
        *(x, y, a, b),
        receivers=RECEIVERS,
        senders=SENDERS,
        dropout_rate=rate,
        dropout_rng=rng,
    )
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    assert 0 < np.sum(np.asarray(kept)) < kept.size


def test_features_may_be_constants_of_a_compiled_function():
    # A numpy array within a compiled function cannot be indexed by what is traced.
    arrays = inputs(np.float32)
    run = jax.jit(lambda r, s: gat_attention(*arrays, receivers=r, senders=s))
    wanted = oracle("gat", *inputs())
    np.testing.assert_allclose(run(RECEIVERS, SENDERS), wanted, atol=1e-5)


def test_dropout_depends_on_the_arc_and_not_on_its_place():
    x, y, a, b = inputs(np.float32)
    order = np.random.default_rng(1).permutation(len(RECEIVERS))

    def run(at, rng):
        return gat_attention(
            x,
            y,
            a,
            b,
            receivers=RECEIVERS[at],
            senders=SENDERS[at],
            dropout_rate=0.5,
            dropout_rng=jax.random.key(rng),
        )

    plain = run(slice(None), 0)
    np.testing.assert_allclose(run(order, 0), plain, atol=1e-6)
    assert not np.allclose(run(order, 1), plain)


def test_graphs_are_mapped_over():
    x, y, a, b = (np.stack([z, z + 1]) for z in inputs(np.float32))
    mapped = jax.vmap(
        lambda x, y, a, b, r, s: gatv2_attention(x, y, a + b, receivers=r, senders=s)
    )(x, y, a, b, np.stack([RECEIVERS, RECEIVERS[::-1]]), np.stack([SENDERS, SENDERS]))
    alone = gatv2_attention(
        x[1], y[1], a[1] + b[1], receivers=RECEIVERS[::-1], senders=SENDERS
    )
    np.testing.assert_allclose(mapped[1], alone, atol=1e-6)


def test_a_segment_sums_to_one_however_large_its_logits():
    weights = segment_softmax(
        jnp.array([[1e4], [1e4], [-1e4], [3.0]]), jnp.array([0, 0, 2, 2]), 3
    )
    np.testing.assert_allclose(weights[:, 0], [0.5, 0.5, 0.0, 1.0])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"senders": SENDERS[:3]}, r"senders must have shape \(9,\); got \(3,\)"),
        ({"receivers": RECEIVERS * 1.0}, r"receivers must be \(A,\) int; got .* float"),
        ({"arc_mask": np.ones(2, bool)}, r"arc_mask must have shape \(9,\)"),
        ({"arc_mask": np.ones(9, np.int32)}, "arc_mask must be bool; got int32"),
        ({"dropout_rate": 0.1}, "dropout_rng must be a jax.random key"),
        ({"dropout_rate": -0.5}, r"dropout_rate must be in \[0, 1\); got -0.5"),
    ],
)
def test_bad_arguments_are_named(change, message):
    options = {"receivers": RECEIVERS, "senders": SENDERS} | change
    with pytest.raises((ValueError, TypeError), match=message):
        gat_attention(*inputs(np.float32), **options)
    with pytest.raises(ValueError, match=r"a must have shape \(2, 3\); got \(3, 2\)"):
        x, y, a, _ = inputs(np.float32)
        gatv2_attention(x, y, a.T, receivers=RECEIVERS, senders=SENDERS)


def test_features_that_do_not_fit_are_named_as_the_caller_knows_them():
    x, y, a, b = inputs(np.float32)
    arcs = {"receivers": RECEIVERS, "senders": SENDERS}
    with pytest.raises(ValueError, match="key must be .* with query's N and H"):
        arc_attention(x, y[:, :1], y, **arcs)
    with pytest.raises(ValueError, match="value must be .* with key's S and N"):
        arc_attention(x, y, y[:3], **arcs)
    with pytest.raises(TypeError, match="source must be floating, of target's dtype"):
        gat_attention(x, y.astype(np.float16), a, b, **arcs)
