"""Score rules: their gradients, T5's buckets, the paper's slopes, and spans that skip blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax.ops import blockwise, dot_product_attention, masks, scores
from qkv_jax.ops.scores import supported
from tests.ops.cases import _bucket
from tests.ops.test_attention import normal, qkv
from tests.ops.test_blockwise import looked_at

LEARNED = {
    "alibi": (scores.alibi, np.array([0.5, 0.1, 0.02, 0.3])),
    "relative bias": (
        lambda table: scores.relative_bias(table, max_distance=9),
        normal(8, 4).astype(np.float64),
    ),
    "relative bias, one-sided": (
        lambda table: scores.relative_bias(table, False, 9),
        normal(6, 4).astype(np.float64),
    ),
    "adaptive span": (
        lambda spans: scores.adaptive_span(spans, ramp=3.0),
        np.array([0.3, 1.6, 4.2, 20.7]),
    ),
    "adaptive span, one for all": (
        lambda span: scores.adaptive_span(span, ramp=2.5),
        np.array(2.2),
    ),
    "soft cap": (scores.soft_cap, np.array(1.3)),
    "soft cap, one a head": (scores.soft_cap, np.array([0.4, 1.3, 0.8, 5.0])),
}


@pytest.mark.parametrize("name", LEARNED)
def test_gradients_of_learned_rules_equal_finite_differences(name, monkeypatch):
    monkeypatch.setattr(blockwise, "choose_blocks", lambda *_: (3, 3))
    rule, array = LEARNED[name]
    step = np.random.default_rng(5).normal(size=array.shape)
    with jax.enable_x64(True):
        arrays = [jnp.asarray(x, jnp.float64) for x in qkv(T=11, S=8)]

        def loss(array, implementation):
            out, lse = dot_product_attention(
                *arrays,
                score=rule(array),
                implementation=implementation,
                return_residuals=True,
            )
            return jnp.sum(jnp.sin(out)) + jnp.sum(lse)

        at = jax.jit(loss, static_argnums=1)
        up, down = (at(array + e * step, "reference") for e in (1e-6, -1e-6))
        for implementation in ("reference", "blockwise"):
            slope = jax.jit(jax.grad(loss), static_argnums=1)(array, implementation)
            np.testing.assert_allclose(
                np.sum(slope * step), (up - down) / 2e-6, rtol=1e-6
            )


def test_buckets_are_those_of_t5():
    distances = np.arange(-300, 301)
    for buckets, longest in ((32, 128), (8, 16), (32, 64)):
        got = scores.relative_buckets(jnp.asarray(distances), buckets, True, longest)
        wanted = [_bucket(int(d), buckets, longest) for d in distances]
        np.testing.assert_array_equal(got, wanted)
    causal = scores.relative_buckets(jnp.asarray(distances), 32, False, 128)
    assert np.all(causal[distances >= 0] == 0) and causal[0] == 31
    np.testing.assert_array_equal(causal[285:301], np.arange(15, -1, -1))


def test_slopes_are_those_of_the_paper():
    np.testing.assert_allclose(
        scores.alibi_slopes(8), 2.0 ** -np.arange(1.0, 9.0), rtol=1e-6
    )
    assert scores.alibi_slopes(16)[0] == np.float32(2**-0.5)
    twelve = scores.alibi_slopes(12)
    np.testing.assert_allclose(twelve[:8], scores.alibi_slopes(8))
    np.testing.assert_allclose(twelve[8:], scores.alibi_slopes(16)[::2][:4])


def test_blocks_past_the_span_are_not_looked_at():
    shape, size = (1, 2, 1024, 1024), (128, 128)  # 8 x 8 blocks a head
    rule = scores.adaptive_span(jnp.array([65.0, 321.0]), ramp=64.0)
    mask = supported(masks.causal(), scores.chain(rule, scores.soft_cap(5.0)))
    assert looked_at(mask, shape, size) == (15 + 26, 41 - 13)
    assert supported(None, scores.soft_cap(5.0)) is None


def test_a_pair_past_the_span_stays_masked_by_a_later_rule():
    query, key, value = qkv(T=9, S=9)
    rule = scores.chain(scores.adaptive_span(2.0, ramp=1.0), scores.soft_cap(4.0))
    raised = value + np.float32([0] * 6 + [9] * 3)[None, :, None, None]
    for implementation in ("reference", "blockwise"):
        out, far = (
            dot_product_attention(
                query, key, x, score=rule, implementation=implementation
            )
            for x in (value, raised)
        )
        np.testing.assert_array_equal(out[:, :4], far[:, :4])
        assert np.abs(out[:, 4] - far[:, 4]).max() > 1.0


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: scores.alibi(0.5), r"slopes must be \(N,\); got shape \(\)"),
        (lambda: scores.alibi_slopes(0), "heads must be at least 1; got 0"),
        (lambda: scores.relative_bias(np.ones(4)), r"\(buckets, N\); got shape \(4,\)"),
        (lambda: scores.relative_bias(np.ones((3, 2))), "at least 4 buckets"),
        (
            lambda: scores.relative_bias(np.ones((32, 2)), max_distance=8),
            "over the 8 .* max_distance = 8",
        ),
        (
            lambda: scores.adaptive_span(np.ones((2, 2))),
            r"spans must be \(\) or \(N,\)",
        ),
        (lambda: scores.adaptive_span(1.0, ramp=0.0), "ramp must be positive; got 0"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
