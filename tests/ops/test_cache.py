import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax.ops import Ancestry, KVCache, dot_product_attention, masks, scores

B, Z, STEPS = 2, 3, 5


def test_write_fills_the_slots_at_hand_and_no_others():
    cache = KVCache.zeros(2, 6, 1, 4, jnp.bfloat16)
    key, value = np.ones((2, 2, 1, 4), np.float32), np.full((2, 2, 1, 4), 2, np.float32)
    written = jax.jit(KVCache.write)(cache, key, value, jnp.int32(3))
    # (B, K, H, S) and (B, K, S, E): slots last, and last but one.
    key, value = written.key[:, 0, 0], written.value[:, 0, :, 0]
    for array, number in ((key, 1), (value, 2)):
        assert array.dtype == jnp.bfloat16
        filled = np.array(array, np.float32)
        np.testing.assert_array_equal(filled, [[0, 0, 0, number, number, 0]] * 2)
    assert not np.any(cache.key)


def test_a_cache_is_the_carry_of_a_loop():
    def step(t, cache):
        new = jnp.full((1, 1, 1, 2), t + 1.0)
        return cache.write(new, -new, t)

    cache = jax.lax.fori_loop(0, 4, step, KVCache.zeros(1, 4, 1, 2, jnp.float32))
    np.testing.assert_array_equal(cache.key[0, 0, 0], [1, 2, 3, 4])
    np.testing.assert_array_equal(cache.value[0, 0, :, 0], [-1, -2, -3, -4])


def draw(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize("kv_heads", [6, 3, 1])
@pytest.mark.parametrize("score", [None, scores.soft_cap(0.7)])
def test_a_cache_is_attended_to_as_its_keys_and_values_are(kv_heads, score):
    query, key, value = draw((2, 3, 6, 5), (2, 11, kv_heads, 5), (2, 11, kv_heads, 7))
    options = {"mask": masks.lengths(key=jnp.array([11, 4])), "score": score}
    options["scale"] = 0.3

    @jax.jit
    def both(query, key, value):
        found = KVCache.of(key, value).attend(query, **options)
        return found, dot_product_attention(query, key, value, **options)

    np.testing.assert_allclose(*both(query, key, value), atol=1e-6)


@pytest.mark.parametrize("filled", [None, 3, 9])
def test_int8_is_attended_to_as_the_numbers_it_stands_for(filled):
    query, key, value = draw((2, 3, 6, 5), (2, 11, 3, 5), (2, 11, 3, 7))
    cache = KVCache.of(key, value).astype(jnp.int8)
    assert (cache.key.dtype, cache.value.dtype) == (jnp.int8, jnp.int8)
    for stored, real in zip(cache.rows(), (key, value)):
        step = np.abs(real).max(-1, keepdims=True) / 254
        assert np.all(np.abs(stored - real) <= 1.01 * step)
    last = 11 if filled is None else filled
    mask = masks.dense((jnp.arange(11) < last)[None, None, None])
    options = {"mask": mask, "scale": 0.3}
    count = None if filled is None else jnp.int32(filled)
    found = cache.attend(query, **options, filled=count)
    wanted = dot_product_attention(query, *cache.rows(), **options)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert (
        1e-5
        < np.abs(found - dot_product_attention(query, key, value, **options)).max()
        < 0.05
    )


def test_int8_is_written_with_its_scales():
    key, value = draw((2, 2, 3, 4), (2, 2, 3, 4))
    empty = KVCache.zeros(2, 6, 3, 4, jnp.int8)
    cache = jax.jit(KVCache.write)(empty, key, value, jnp.int32(3))
    whole = KVCache.of(key, value).astype(jnp.int8)
    for stored, new in zip(cache.rows(), whole.rows()):
        np.testing.assert_array_equal(stored[:, 3:5], new)
        assert not np.any(stored[:, :3]) and not np.any(stored[:, 5:])


def test_who_may_attend_to_nothing_in_a_cache_gets_zero():
    query, key, value = draw((2, 1, 2, 4), (2, 5, 2, 4), (2, 5, 2, 4))
    mask = masks.lengths(key=jnp.array([0, 5]))
    found = KVCache.of(key, value).attend(query, mask=mask)
    assert not np.any(found[0])
    assert np.all(found[1])


@pytest.mark.parametrize("filled", [1, 3, 4, 6, 7, 11])
def test_slots_past_the_filled_ones_change_nothing_and_are_not_read(filled):
    query, key, value = draw((2, 3, 2, 4), (2, 11, 2, 4), (2, 11, 2, 4))
    mask = masks.dense((jnp.arange(11) < filled)[None, None, None])
    wanted = dot_product_attention(query, key, value, mask=mask)
    # A quarter of 11 slots is 3 of them, half 6: what is not finite shows what was read.
    read = 3 if filled <= 3 else 6 if filled <= 6 else 11
    cache = KVCache.of(key.at[:, read:].set(jnp.nan), value)
    found = jax.jit(lambda n: cache.attend(query, mask=mask, filled=n))(filled)
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def slots_of(mask):
    """For each row and hypothesis, the list of slots that it may see."""
    allowed = np.asarray(mask.materialise((B, 1, Z, STEPS * Z)))[:, 0]
    return [[np.flatnonzero(slots).tolist() for slots in row] for row in allowed]


def test_reordered_hypotheses_see_their_ancestors_slots():
    rng = np.random.default_rng(0)
    ancestry = Ancestry.start(B, Z, STEPS)
    histories = [[[] for _ in range(Z)] for _ in range(B)]
    for step in range(STEPS):
        for row in histories:
            for z, history in enumerate(row):
                history.append(step * Z + z)
        assert slots_of(ancestry.mask()) == histories
        ancestry = ancestry.advance()
        parents = rng.integers(0, Z, (B, Z)).astype(np.int32)
        ancestry = jax.jit(Ancestry.reorder)(ancestry, parents)
        histories = [
            [list(row[parent]) for parent in parents[b]]
            for b, row in enumerate(histories)
        ]


def test_hypotheses_that_are_never_reordered_see_their_own_slots():
    ancestry = Ancestry.start(B, Z, STEPS).advance().advance()
    assert slots_of(ancestry.mask())[1] == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]


def test_reordering_moves_no_keys_and_traces_once():
    ancestry = Ancestry.start(B, Z, STEPS)
    moved = jax.eval_shape(Ancestry.reorder, ancestry, jnp.zeros((B, Z), jnp.int32))
    same = jax.eval_shape(lambda: ancestry)
    assert jax.tree.leaves(moved) == jax.tree.leaves(same)
