"""Decoding with every cache equals the full forward pass, compiled once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax.ops import dot_product_attention, masks, scores
from qkv_jax.ops.kv_caches import (
    cached_attention,
    full_cache,
    int8_cache,
    paged_cache,
    sliding_cache,
)
from tests.ops.cases import ints
from tests.ops.test_attention import normal

B, N, K, H, E, LENGTH = 2, 4, 2, 3, 5, 13
SIZES = (K, H, E)
CAUSAL = masks.causal()
WINDOW = CAUSAL & masks.window(3, 0)
SINKS = CAUSAL & (masks.window(3, 0) | masks.prefix(2))
CACHES = {
    "full": (lambda: full_cache(B, LENGTH, *SIZES, jnp.float32), CAUSAL),
    "sliding": (lambda: sliding_cache(B, 4, *SIZES, jnp.float32, chunk=5), WINDOW),
    "sinks": (
        lambda: sliding_cache(B, 4, *SIZES, jnp.float32, sinks=2, chunk=5),
        SINKS,
    ),
    "paged": (lambda: paged_cache(B, 8, 4, 4, *SIZES, jnp.float32), CAUSAL),
    "int8": (lambda: int8_cache(B, LENGTH, *SIZES), CAUSAL),
}
attend = jax.jit(cached_attention)
every_cache = pytest.mark.parametrize("name", CACHES)
SLOPES = np.array([0.5, 0.2, 0.1, 0.3], np.float32)


@jax.jit
def append(cache, key, value, counts=None):
    return cache.append(key, value, counts=counts)


def arrays():
    shapes = (B, LENGTH, N, H), (B, LENGTH, K, H), (B, LENGTH, K, E)
    return [normal(*shape, seed=i) for i, shape in enumerate(shapes)]


def tolerance(name, key, value):
    """int8: a score is off by |q| |dk|, an output by that of its weights and of its values."""
    if name != "int8":
        return 1e-5
    return np.abs(value).max() / 254 + 6 * np.abs(key).max() / 254 * np.abs(value).max()


@every_cache
def test_a_prompt_and_steps_equal_the_full_forward_pass(name):
    make, mask = CACHES[name]
    query, key, value = arrays()
    rule = masks.segments(np.array([[1] * 3 + [2] * 10, [5] * 13], np.int32))
    score = scores.alibi(SLOPES)
    wanted = dot_product_attention(query, key, value, mask=mask & rule, score=score)

    traced = []

    @jax.jit
    def step(cache, query, key, value):
        traced.append(query.shape)
        cache = cache.append(key, value)
        return cache, cached_attention(query, cache, mask=rule, score=score)

    cache, outs = make(), []
    for begin, end in ((0, 5), *((t, t + 1) for t in range(5, LENGTH))):
        cache, out = step(cache, *(x[:, begin:end] for x in (query, key, value)))
        outs.append(out)
    assert len(traced) == 2  # the prompt, and all of the steps
    got = np.concatenate(outs, axis=1)
    np.testing.assert_allclose(got, wanted, atol=tolerance(name, key, value))
    assert not cache.overflowed.any()


@every_cache
def test_rows_of_different_lengths_go_on_where_they_ended(name):
    make, mask = CACHES[name]
    query, key, value = arrays()
    wanted = dot_product_attention(query, key, value, mask=mask)
    cache = append(make(), key[:, :5], value[:, :5], ints(5, 2))
    for t in range(3):
        at = np.array([[5 + t], [2 + t]])
        q, k, v = (
            np.take_along_axis(x, at[..., None, None], 1) for x in (query, key, value)
        )
        cache = append(cache, k, v)
        out = attend(q, cache)
        rows = np.take_along_axis(np.asarray(wanted), at[..., None, None], 1)
        np.testing.assert_allclose(out, rows, atol=tolerance(name, key, value))
    np.testing.assert_array_equal(cache.lengths, [8, 5])


@pytest.mark.parametrize("name", ["full", "int8", "paged"])
def test_what_does_not_fit_is_dropped_and_said(name):
    make, _ = CACHES[name]
    _, key, value = arrays()
    cache = append(make(), key, value)
    for _ in range(2):
        cache = append(cache, key[:, :1], value[:, :1])
    room = 16 if name == "paged" else LENGTH
    before = cache.read()[0]
    cache = append(cache, 9 * key[:, :3], value[:, :3], ints(3, 0))
    np.testing.assert_array_equal(cache.overflowed, [True, 15 > room])
    kept = before[:, : min(room, 15)]
    np.testing.assert_array_equal(cache.read()[0][:, : kept.shape[1]], kept)


def test_pages_are_given_back_and_used_again():
    _, key, value = arrays()
    cache = paged_cache(B, 5, 4, 4, *SIZES, jnp.float32)
    cache = append(cache, key[:, :7], value[:, :7], ints(7, 4))
    assert cache.free.sum() == 2
    cache = append(cache, key[:, :9], value[:, :9], ints(0, 9))
    np.testing.assert_array_equal(
        cache.overflowed, [False, True]
    )  # 4 pages were needed
    cache = cache.release(np.array([False, True]))
    assert cache.free.sum() == 3 and cache.lengths[1] == 0
    cache = append(cache, key[:, :8], value[:, :8], ints(0, 8))
    np.testing.assert_array_equal(cache.overflowed, [False, False])
    np.testing.assert_allclose(cache.read()[0][1, :8], key[1, :8])
    np.testing.assert_allclose(cache.read()[0][0, :7], key[0, :7])


def test_int8_takes_about_a_quarter_and_stays_within_its_bound():
    _, key, value = arrays()
    cache = int8_cache(B, LENGTH, K, 64, 64)
    full = full_cache(B, LENGTH, K, 64, 64, jnp.float32)
    small, large = (
        sum(x.nbytes for x in jax.tree.leaves((c.key, c.value, c.scales)))
        for c in (cache, full)
    )
    assert small / large == (64 + 4) / 256
    read, _ = int8_cache(B, LENGTH, *SIZES).append(key, value).read()
    bound = np.abs(key).max(-1, keepdims=True) / 253.9
    assert np.all(np.abs(read - key) <= bound)


def test_bad_arguments_are_named():
    _, key, value = arrays()
    with pytest.raises(ValueError, match="takes 5 at a time: append in pieces"):
        CACHES["sliding"][0]().append(key, value)
    with pytest.raises(
        ValueError, match=r"key must be .* \(2, T, 2, 3\); got \(2, 13, 2, 5"
    ):
        CACHES["full"][0]().append(value, value)
    with pytest.raises(ValueError, match=r"value must be .* \(2, T, 2, 5\); got"):
        CACHES["paged"][0]().append(key, key)
    with pytest.raises(ValueError, match="window = 0, chunk = 1, sinks = 0"):
        sliding_cache(B, 0, *SIZES, jnp.float32)
