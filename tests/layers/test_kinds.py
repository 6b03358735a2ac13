"""Kinds of attention in a layer: their options, masks, weights, and steps of decoding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax.layers import AttentionKind, MultiHeadAttention
from qkv_jax.layers.kinds import whole_keys
from qkv_jax.ops import Ancestry, KVCache, masks, scores

B, T, D, N = 2, 11, 12, 2
KINDS = {
    "softmax": AttentionKind(),
    "shared": AttentionKind(share_key_value=True),
    "window": AttentionKind(name="window", window=2),
    "block_sparse": AttentionKind(name="block_sparse", block=2, random=1, longest=16),
    "linear": AttentionKind(name="linear"),
    "performer": AttentionKind(name="performer", features=8),
    "linformer": AttentionKind(name="linformer", rank=3, longest=13),
    "entmax": AttentionKind(name="entmax"),
    "adaptive_span": AttentionKind(name="adaptive_span", longest=4, ramp=3.0),
}
each = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
CAUSAL = [name for name in KINDS if name != "linformer"]
each_causal = pytest.mark.parametrize("name", CAUSAL)
X = np.random.default_rng(3).normal(size=(B, T, D)).astype(np.float32)


@nnx.jit(static_argnums=0)
def make(kind):
    return MultiHeadAttention(D, N, kind=kind, rngs=nnx.Rngs(0))


@nnx.jit
def call(layer, x, mask):
    return layer(x, mask=mask)


def out(kind, mask=None, x=X):
    return np.asarray(call(make(kind), x, mask))


@pytest.mark.parametrize("name", [name for name in KINDS if name != "softmax"])
def test_every_kind_computes_something_of_its_own(name):
    assert np.abs(out(KINDS[name]) - out(KINDS["softmax"])).max() > 1e-3


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("window", {"window": 3}),
        ("block_sparse", {"block": 3}),
        ("block_sparse", {"random": 3}),
        ("performer", {"features": 9}),
        ("linformer", {"rank": 4}),
        ("adaptive_span", {"longest": 6}),
        ("adaptive_span", {"ramp": 2.0}),
    ],
)
def test_every_option_changes_what_comes_out(name, changes):
    other = dataclasses.replace(KINDS[name], **changes)
    assert np.abs(out(other) - out(KINDS[name])).max() > 1e-4


@each
def test_keys_that_are_not_there_change_nothing(kind):
    mask = masks.lengths(key=jnp.array([5, 9], jnp.int32))
    loud = X.copy()
    loud[0, 5:], loud[1, 9:] = 50.0, -40.0
    found, other = out(kind, mask), out(kind, mask, loud)
    np.testing.assert_allclose(found[0, :5], other[0, :5], atol=1e-5)
    np.testing.assert_allclose(found[1, :9], other[1, :9], atol=1e-5)


@each_causal
def test_what_is_to_come_changes_nothing(name):
    later = X.copy()
    later[:, 7:] += 3.0
    found, other = (out(KINDS[name], masks.causal(), x) for x in (X, later))
    np.testing.assert_allclose(found[:, :7], other[:, :7], atol=1e-5)
    assert np.abs(found[:, 7:] - other[:, 7:]).max() > 1e-3


@each_causal
def test_steps_of_decoding_equal_the_whole_causal_pass(name):
    layer = make(KINDS[name])
    whole = np.asarray(call(layer, X, masks.causal()))

    @nnx.jit
    def step(layer, x, cache, ancestry):
        return layer.step(x, cache, ancestry)

    # Two hypotheses a row: the second sees what the other row holds.
    both = np.stack([X, X[::-1]], axis=2)  # (B, T, Z, D)
    cache = KVCache.zeros(B, 2 * T, N, D // N, jnp.float32)
    ancestry = Ancestry.start(B, 2, T)
    for t in range(T):
        found, cache = step(layer, both[:, t], cache, ancestry)
        np.testing.assert_allclose(found[:, 0], whole[:, t], atol=2e-5)
        np.testing.assert_allclose(found[:, 1], whole[::-1, t], atol=2e-5)
        ancestry = ancestry.advance()


@each
def test_recorded_weights_are_those_that_values_are_summed_with(kind):
    layer = make(kind)
    mask = masks.lengths(key=jnp.array([5, 9], jnp.int32))
    layer.record = True
    found = layer(jnp.asarray(X), mask=mask)
    weights = layer.weights[...]
    value = layer.key(X) if layer.value is None else layer.value(X)
    summed = layer.out(jnp.einsum("BNTS,BSNE->BTNE", weights, value))
    np.testing.assert_allclose(summed, found, atol=2e-5)
    assert not np.asarray(weights)[0, :, :, 5:].any()


@each
def test_every_parameter_of_a_kind_has_a_gradient(kind):
    graph, params = nnx.split(make(kind))

    @jax.jit
    @jax.grad
    def slopes(params):
        return (nnx.merge(graph, params)(X) ** 2).sum()

    for path, slope in jax.tree.leaves_with_path(slopes(params)):
        size = np.abs(np.asarray(slope))
        # A bias on keys moves all scores alike, and the softmax does not see it.
        assert np.isfinite(size).all()
        assert size.max() > 0 or "key" in str(path)


def test_spans_and_alphas_are_learnt_a_head():
    spans = make(KINDS["adaptive_span"])
    np.testing.assert_allclose(spans.span_share(), [0.5, 0.5])
    near = AttentionKind(name="adaptive_span", longest=4, ramp=1.0)
    layer = make(near)
    layer.span.set_value(jnp.array([-20.0, 20.0]))
    layer.record = True
    layer(jnp.asarray(X))
    weights = np.asarray(layer.weights[...])
    far = np.abs(np.arange(T)[:, None] - np.arange(T))
    assert not weights[:, 0, far >= 1].any()
    assert not weights[:, 1, far >= 5].any() and weights[:, 1, far == 4].all()
    entmax = make(KINDS["entmax"])
    entmax.alpha.set_value(jnp.array([-20.0, 20.0]))
    entmax.record = True
    entmax(jnp.asarray(2 * X))
    zeros = (np.asarray(entmax.weights[...]) == 0).mean(axis=(0, 2, 3))
    assert zeros[0] == 0.0
    assert zeros[1] > 0.2


def test_whole_keys_are_read_from_masks():
    lengths = jnp.array([2, 3], jnp.int32)
    there = jnp.array([[[[1, 0, 1, 1]]]], bool)
    mask = masks.causal() & masks.lengths(key=lengths) & masks.dense(there)
    causal, keys = whole_keys(mask, 2, 4)
    assert causal
    np.testing.assert_array_equal(keys, [[1, 0, 0, 0], [1, 0, 1, 0]])
    assert whole_keys(None, 2, 4) == (False, None)
    for other in (masks.window(1, 1), masks.causal(1), ~masks.causal()):
        with pytest.raises(NotImplementedError, match="rules out whole keys"):
            whole_keys(other, 2, 4)


def test_what_a_kind_cannot_do_is_refused():
    x = jnp.asarray(X)
    with pytest.raises(NotImplementedError, match="no scores"):
        make(KINDS["linear"])(x, score=scores.soft_cap(1.0))
    with pytest.raises(NotImplementedError, match="a causal mask"):
        make(KINDS["linformer"])(x, mask=masks.causal())
    with pytest.raises(NotImplementedError, match="at most 13 keys"):
        make(KINDS["linformer"])(jnp.zeros((1, 14, D)))
    with pytest.raises(ValueError, match="no dropout on the weights"):
        MultiHeadAttention(
            D, N, kind=KINDS["linear"], dropout_rate=0.1, rngs=nnx.Rngs(0)
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "sparse"}, "name must be one of"),
        ({"window": 3}, "window is not of the kind 'softmax'"),
        ({"name": "window", "window": 0}, "window must be positive"),
        ({"name": "block_sparse", "random": -1}, "random must be positive"),
        ({"layers": ()}, "layers must be None"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AttentionKind(**options)
