"""What is done to frames, by hand; and that what fills rows up never matters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax.models.spectrograms import (
    Augmentation,
    mask_runs,
    normalise,
    prepare,
    stretch,
    to_cepstra,
    warp,
)

LENGTHS = jnp.array([7, 4])
X = jax.random.normal(jax.random.key(0), (2, 7, 5)) + 3.0
ALL = Augmentation(
    tempo=0.2,
    warp=0.2,
    shift=1.0,
    time_masks=1,
    time_width=0.4,
    band_masks=1,
    band_width=2,
    noise=0.1,
)


def test_utterances_have_mean_0_and_deviation_1_over_their_frames():
    x = np.asarray(normalise(X, LENGTHS))
    for row, frames in zip(x, LENGTHS.tolist()):
        np.testing.assert_allclose(row[:frames].mean(0), 0.0, atol=1e-5)
        np.testing.assert_allclose(row[:frames].std(0), 1.0, atol=1e-3)
        assert (row[frames:] == 0).all()


def test_frames_are_stretched_between_their_ends():
    x = jnp.arange(5.0).reshape(1, 5, 1)
    slower, frames = stretch(x, jnp.array([3]), jnp.array([2 / 3]))
    assert frames.tolist() == [5]
    np.testing.assert_allclose(slower[0, :, 0], [0, 0.5, 1, 1.5, 2])
    faster, frames = stretch(x, jnp.array([5]), jnp.array([-0.4]))
    assert frames.tolist() == [3]
    np.testing.assert_allclose(faster[0, :3, 0], [0, 2, 4])
    assert stretch(x, jnp.array([4]), jnp.array([0.9]))[1].tolist() == [5]


def test_bands_are_moved_and_drawn_apart():
    x = jnp.arange(4.0).reshape(1, 1, 4)
    moved = warp(x, jnp.ones(1), jnp.array([0.5]))
    np.testing.assert_allclose(moved[0, 0], [0.5, 1.5, 2.5, 3.0])
    apart = warp(x, jnp.array([0.5]), jnp.zeros(1))
    np.testing.assert_allclose(apart[0, 0], [0.0, 0.5, 1.0, 1.5])


def test_masks_blank_runs_of_frames_and_of_bands():
    changes = Augmentation(time_masks=1, time_width=0.5, band_masks=1, band_width=3)
    rngs = jax.random.split(jax.random.key(1), 64)
    ones, lengths = jnp.ones((2, 8, 6)), jnp.array([8, 4])
    kept = jax.vmap(lambda rng: mask_runs(ones, lengths, changes, rng))(rngs)
    frames = np.asarray((kept == 0).all(-1).sum(-1))
    bands = np.asarray((kept == 0).all(2).sum(-1))
    assert frames.max(0).tolist() == [4, 2] and bands.max() == 3
    assert frames.min() == bands.min() == 0


def test_the_transform_to_cepstra_keeps_lengths():
    whole = to_cepstra(X, 5)
    np.testing.assert_allclose(jnp.sum(whole**2, -1), jnp.sum(X**2, -1), rtol=1e-5)
    np.testing.assert_allclose(to_cepstra(X, 2), whole[..., :2], rtol=1e-5)


@pytest.mark.parametrize("rng", [None, jax.random.key(2)])
@pytest.mark.parametrize("cepstra", [0, 3])
def test_what_fills_a_row_up_never_matters(rng, cepstra):
    settings = {"cepstra": cepstra, "augmentation": ALL, "rng": rng}
    one, lengths = prepare(X, LENGTHS, **settings)
    other, _ = prepare(X.at[1, 4:].set(99.0), LENGTHS, **settings)
    np.testing.assert_array_equal(one, other)
    assert one.shape == (2, 7, cepstra or 5)
    assert (one[1, int(lengths[1]) :] == 0).all()


def test_nothing_is_drawn_without_a_key_and_each_setting_with_one_matters():
    plain, lengths = prepare(X, LENGTHS)
    still, _ = prepare(X, LENGTHS, augmentation=ALL)
    np.testing.assert_array_equal(plain, still)
    assert lengths.tolist() == LENGTHS.tolist()
    for change in (
        {"tempo": 0.3},
        {"warp": 0.3},
        {"shift": 2.0},
        {"time_masks": 3, "time_width": 0.9},
        {"band_masks": 3, "band_width": 4},
        {"noise": 0.1},
    ):
        changed, _ = prepare(
            X, LENGTHS, augmentation=Augmentation(**change), rng=jax.random.key(3)
        )
        assert jnp.abs(changed - plain).max() > 1e-3, change


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="noise must not be negative"):
        Augmentation(noise=-1.0)
    with pytest.raises(ValueError, match="tempo must be below 1"):
        Augmentation(tempo=1.0)
