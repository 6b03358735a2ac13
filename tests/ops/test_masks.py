import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax.ops import masks
from qkv_jax.ops.masks import index_arrays
from tests.ops.cases import MASKS, Case, ints

SHAPE = (2, 3, 5, 7)


def grid(rule, shape=SHAPE):
    return np.array([bool(rule(*at)) for at in np.ndindex(shape)]).reshape(shape)


def whole(mask, shape=SHAPE):
    return np.broadcast_to(mask.materialise(shape), shape)


@pytest.mark.parametrize("case", MASKS, ids=lambda case: case.name)
def test_materialised_mask_equals_its_rule(case: Case):
    shape = (case.B, case.N, case.T, case.S)
    mask = masks.as_mask(case.mask())
    np.testing.assert_array_equal(whole(mask, shape), grid(case.rule, shape))


@pytest.mark.parametrize("case", MASKS, ids=lambda case: case.name)
def test_a_block_of_a_mask_is_that_block_of_the_whole(case: Case):
    shape = (case.B, case.N, case.T, case.S)
    mask = masks.as_mask(case.mask())
    b, h, q, k = index_arrays(shape)
    block = mask.allowed(b[1:], h[:, 1:], q[:, :, 2:4], k[..., 1:3])
    np.testing.assert_array_equal(
        np.broadcast_to(block, (case.B - 1, case.N - 1, 2, 2)),
        whole(mask, shape)[1:, 1:, 2:4, 1:3],
    )


@pytest.mark.parametrize("offset", [-3, 0, 2, 7])
def test_causal_admits_keys_up_to_the_query_plus_offset(offset):
    expected = np.tri(5, 7, offset, dtype=bool)
    np.testing.assert_array_equal(whole(masks.causal(offset))[1, 2], expected)


def test_lengths_of_queries_and_keys():
    mask = masks.lengths(query=ints(5, 0), key=ints(7, 3))
    np.testing.assert_array_equal(
        whole(mask), grid(lambda b, h, q, k: b == 0 and q < 5 and k < 7)
    )


def test_masks_are_small_until_they_are_broadcast():
    assert masks.lengths(key=ints(3, 4)).materialise(SHAPE).shape == (2, 1, 1, 7)
    assert masks.causal().materialise(SHAPE).shape == (1, 1, 5, 7)


def test_masks_obey_de_morgan():
    left, right = masks.causal(1), masks.lengths(key=ints(2, 6))
    for a, b in ((~(left & right), ~left | ~right), (~(left | right), ~left & ~right)):
        np.testing.assert_array_equal(whole(a), whole(b))


def test_a_mask_is_a_pytree_of_its_arrays_alone():
    mask = masks.causal(1) & ~masks.lengths(key=ints(2, 6))
    leaves, tree = jax.tree.flatten(mask)
    np.testing.assert_array_equal(leaves, [[2, 6]])
    same, other = (masks.causal(n) & ~masks.lengths(key=ints(1, 1)) for n in (1, 2))
    assert tree == jax.tree.structure(same) and hash(tree) == hash(
        jax.tree.structure(same)
    )
    assert tree != jax.tree.structure(other)
    np.testing.assert_array_equal(whole(jax.tree.unflatten(tree, leaves)), whole(mask))


def test_predicate_looks_up_its_arrays_under_jit():
    def rule(b, h, q, k, table):
        return table[h, q] > k

    table = np.arange(15, dtype=np.int32).reshape(3, 5) % 8
    run = jax.jit(lambda table: masks.predicate(rule, table).materialise(SHAPE))
    np.testing.assert_array_equal(
        np.broadcast_to(run(table), SHAPE), grid(lambda b, h, q, k: table[h, q] > k)
    )


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: masks.dense(np.ones((1, 1, 2, 2))), "mask must be bool"),
        (lambda: masks.dense(np.ones((2, 2), bool)), r"got \(2, 2\). Add head"),
        (lambda: masks.lengths(key=ints([1, 2])), r"key must be \(B,\); got shape"),
        (lambda: masks.lengths(query=np.int32(1)), r"query must be \(B,\)"),
        (lambda: masks.segments(ints(1, 2)), r"query must be \(B, length\)"),
        (lambda: whole(masks.lengths(key=ints(1, 2, 3))), r"shape \(2,\); got \(3,\)"),
        (lambda: whole(masks.dense(jnp.ones((1, 2, 5, 7), bool))), "must broadcast"),
        (lambda: whole(masks.segments(jnp.zeros((2, 5)))), r"key \(B, S\) must have"),
    ],
)
def test_a_shape_or_type_that_does_not_fit_is_an_error(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
