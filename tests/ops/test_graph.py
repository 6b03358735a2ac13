"""Attention along arcs, against dense sums over an adjacency in float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax.ops import dot_product_attention, scores
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
    with jax.enable_x64(True):
        got = np.asarray(FAMILIES[name][0](*map(jnp.asarray, arrays), **arcs))
    np.testing.assert_allclose(got, wanted, atol=1e-12)
    got = jax.jit(FAMILIES[name][0])(*inputs(np.float32), **arcs)
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
    got = arc_attention(
        query,
        key,
        value,
        receivers=receivers,
        senders=senders,
        bias=bias[receivers, senders],
    )
    wanted = dot_product_attention(
        *(x[None] for x in (query, key, value)),
        mask=pairs[None, None],
        score=scores.bias(bias.transpose(2, 0, 1)[None]),
    )[0]
    np.testing.assert_allclose(got, wanted, atol=1e-6)


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
        ({"dropout_rate": 0.1}, "dropout_rng must be a jax.random key"),
    ],
)
def test_bad_arguments_are_named(change, message):
    options = {"receivers": RECEIVERS, "senders": SENDERS} | change
    with pytest.raises(ValueError, match=message):
        gat_attention(*inputs(np.float32), **options)
    with pytest.raises(ValueError, match=r"a must have shape \(2, 3\); got \(3, 2\)"):
        x, y, a, _ = inputs(np.float32)
        gatv2_attention(x, y, a.T, receivers=RECEIVERS, senders=SENDERS)
