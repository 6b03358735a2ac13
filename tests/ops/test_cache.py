import jax
import jax.numpy as jnp
import numpy as np

from qkv_jax.ops import Ancestry, KVCache

B, Z, STEPS = 2, 3, 5


def test_write_fills_the_slots_at_hand_and_no_others():
    cache = KVCache.zeros(2, 6, 1, 4, jnp.bfloat16)
    key, value = np.ones((2, 2, 1, 4), np.float32), np.full((2, 2, 1, 4), 2, np.float32)
    written = jax.jit(KVCache.write)(cache, key, value, jnp.int32(3))
    for array, number in ((written.key, 1), (written.value, 2)):
        assert array.dtype == jnp.bfloat16
        filled = np.array(array[:, :, 0, 0], np.float32)
        np.testing.assert_array_equal(filled, [[0, 0, 0, number, number, 0]] * 2)
    assert not np.any(cache.key)


def test_a_cache_is_the_carry_of_a_loop():
    def step(t, cache):
        new = jnp.full((1, 1, 1, 2), t + 1.0)
        return cache.write(new, -new, t)

    cache = jax.lax.fori_loop(0, 4, step, KVCache.zeros(1, 4, 1, 2, jnp.float32))
    np.testing.assert_array_equal(cache.key[0, :, 0, 0], [1, 2, 3, 4])
    np.testing.assert_array_equal(cache.value[0, :, 0, 0], [-1, -2, -3, -4])


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
