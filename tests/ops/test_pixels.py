import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax.ops.pixels import patches, random_erase, random_flip, random_shift

IMAGES = jnp.asarray(np.random.default_rng(0).uniform(1, 2, (40, 6, 9, 2)))


def test_patches_are_the_squares_of_an_image():
    found = patches(IMAGES, 3)
    assert found.shape == (40, 2, 3, 18)
    np.testing.assert_array_equal(found[5, 1, 2], IMAGES[5, 3:6, 6:9].reshape(-1))
    with pytest.raises(ValueError, match="patches of 4 must divide .* got 6 x 9"):
        patches(IMAGES, 4)


def test_a_flip_turns_some_images_and_leaves_the_others():
    found = random_flip(IMAGES, jax.random.key(0))
    turned = (found == IMAGES[:, :, ::-1]).all((1, 2, 3))
    same = (found == IMAGES).all((1, 2, 3))
    assert (turned ^ same).all() and 5 < turned.sum() < 35


def test_a_shift_moves_each_image_by_a_few_pixels_of_its_own():
    found = np.asarray(random_shift(IMAGES, 2, jax.random.key(0)))
    wide = np.pad(IMAGES, ((0, 0), (2, 2), (2, 2), (0, 0)))
    moves = {
        (i, j): (found == wide[:, i : i + 6, j : j + 9]).all((1, 2, 3))
        for i in range(5)
        for j in range(5)
    }
    assert (sum(moves.values()) == 1).all()
    assert sum(moved.any() for moved in moves.values()) > 10


def test_an_erased_square_is_zero_and_all_else_is_kept():
    found = np.asarray(random_erase(IMAGES, 3, jax.random.key(0)))
    kept = found != 0
    np.testing.assert_array_equal(found[kept], np.asarray(IMAGES)[kept])
    gone = ~kept
    assert (gone == gone[..., :1]).all()
    rows, columns = gone.any((2, 3)).sum(1), gone.any((1, 3)).sum(1)
    assert (gone.sum((1, 2, 3)) == 2 * rows * columns).all()
    assert rows.max() == columns.max() == 3 and rows.min() == 2
