"""What follows from the log-sum-exp, against dense weights in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax.ops import attention_weights, blockwise, dot_product_attention, masks
from qkv_jax.ops import scores as rules
from qkv_jax.ops.residuals import column_sums, largest_logit, merge, with_sinks
from tests.ops.cases import ints
from tests.ops.test_attention import normal, qkv
from tests.ops.test_blockwise import arrays_of

MASKS = {
    "none": lambda: None,
    "causal, empty rows": lambda: masks.causal(-2),
    "lengths": lambda: masks.lengths(key=ints(5, 0)),
}
each_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


@pytest.fixture
def in_blocks(monkeypatch):
    monkeypatch.setattr(blockwise, "choose_blocks", lambda *_: (3, 3))
    monkeypatch.setattr("qkv_jax.ops.attention.DENSE_PAIRS", 0)


@each_mask
def test_a_sink_is_a_key_with_a_logit_of_its_own_and_value_zero(mask):
    query, key, value = qkv(T=5, S=7)
    sinks = normal(4, seed=8)

    def run(query, sinks):
        residuals = dot_product_attention(
            query, key, value, mask=mask(), return_residuals=True
        )
        return with_sinks(*residuals, sinks)

    out, lse = run(query, sinks)
    logits = np.asarray(attention_logits(query, key, mask()))
    logits = np.concatenate(
        [logits, np.broadcast_to(sinks[:, None, None], (2, 4, 5, 1))], -1
    )
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    heads = np.repeat(value, 2, axis=2)
    wanted = np.einsum("BNTS,BSNE->BTNE", weights[..., :-1], heads)
    np.testing.assert_allclose(out, wanted, atol=1e-6)
    np.testing.assert_allclose(
        lse, np.log(np.exp(logits).sum(-1)).swapaxes(1, 2), atol=1e-6
    )
    loss = jax.jit(lambda *x: jnp.sum(jnp.sin(run(*x)[0])) + jnp.sum(run(*x)[1]))
    gradients = jax.grad(loss, argnums=(0, 1))(query, sinks)
    assert all(np.isfinite(x).all() for x in gradients)
    way = [normal(*x.shape, seed=9) for x in (query, sinks)]
    up, down = (
        loss(query + step * way[0], sinks + step * way[1]) for step in (1e-2, -1e-2)
    )
    slope = sum(np.sum(x * y) for x, y in zip(gradients, way))
    np.testing.assert_allclose(slope, (up - down) / 2e-2, rtol=5e-3, atol=5e-2)


def attention_logits(query, key, mask):
    shape = (*query.shape[:1], query.shape[2], query.shape[1], key.shape[1])
    logits = np.einsum("BTNH,BSNH->BNTS", query, np.repeat(key, 2, axis=2))
    logits = logits * query.shape[-1] ** -0.5
    if mask is None:
        return logits
    return np.where(np.broadcast_to(mask.materialise(shape), shape), logits, -np.inf)


@each_mask
def test_keys_in_two_parts_merge_to_the_whole(mask):
    query, key, value = qkv(T=5, S=7)
    whole = masks.prefix(7) if mask() is None else mask()

    def run(part):
        return dot_product_attention(
            query, key, value, mask=whole & part, return_residuals=True
        )

    out, lse = merge(run(masks.prefix(4)), run(~masks.prefix(4)))
    wanted = run(masks.prefix(7))
    np.testing.assert_allclose(out, wanted[0], atol=1e-6)
    np.testing.assert_allclose(lse, wanted[1], atol=1e-6)


@each_mask
@pytest.mark.parametrize("score", [None, rules.soft_cap(0.7)], ids=["", "cap"])
def test_column_sums_and_largest_logits_equal_those_of_the_dense_weights(
    mask, score, in_blocks
):
    query, key, _ = qkv(T=8, S=7)
    options = {"mask": mask(), "score": score}
    weights = np.asarray(attention_weights(query, key, **options))
    sums = column_sums(query, key, **options)
    wanted = weights.sum(2).reshape(2, 2, 2, 7).sum(2).swapaxes(1, 2)
    np.testing.assert_allclose(sums, wanted, atol=1e-5)
    logits = attention_logits(query, key, mask())
    if score is not None:
        logits = np.where(logits == -np.inf, -np.inf, 0.7 * np.tanh(logits / 0.7))
    top = largest_logit(query, key, **options)
    np.testing.assert_allclose(top, logits.max(-1).swapaxes(1, 2), atol=1e-6)


def test_neither_makes_the_matrix():
    shape = jax.ShapeDtypeStruct((1, 4096, 2, 8), jnp.float32)
    for run in (column_sums, largest_logit):
        jaxpr = jax.make_jaxpr(lambda *x, run=run: run(*x, mask=masks.causal()))(
            shape, shape
        )
        assert max(np.prod(s) for s in arrays_of(jaxpr.jaxpr)) < 4096 * 4096 / 16


def test_bad_shapes_are_named():
    out, lse = jnp.zeros((2, 5, 4, 3)), jnp.zeros((2, 5, 4))
    with pytest.raises(
        ValueError, match=r"sinks must be \(N,\) = \(4,\); got .*\(3,\)"
    ):
        with_sinks(out, lse, jnp.zeros(3))
    with pytest.raises(ValueError, match=r"\(B, T, N\) = \(2, 5, 4\); got \(2, 4, 5\)"):
        with_sinks(out, lse.swapaxes(1, 2), jnp.zeros(4))
