import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax.decoding import truncation

SHAPE = (2, 3, 41)


def _softmax(x):
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def _kept(logits, found):
    """Which places a truncation left, which must be as they were."""
    kept = np.asarray(found) > -np.inf
    np.testing.assert_array_equal(np.asarray(found)[kept], logits[kept])
    return kept


def _prefixes(order, probs, mass):
    """The shortest beginning of each row's order with the mass."""
    kept = np.zeros(probs.shape, bool)
    for row in np.ndindex(probs.shape[:-1]):
        total = 0.0
        for token in order[row]:
            if total >= mass:
                break
            kept[*row, token] = True
            total += probs[*row, token]
    return kept


@pytest.fixture
def logits():
    return 2.0 * np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)


@pytest.mark.parametrize("k", [1, 7, 41, 100])
def test_top_k_keeps_the_k_likeliest(logits, k):
    kept = _kept(logits, truncation.top_k(logits, k))
    want = np.argsort(np.argsort(-logits, axis=-1), axis=-1) < k
    np.testing.assert_array_equal(kept, want)


@pytest.mark.parametrize("mass", [1e-6, 0.3, 0.9, 0.999])
def test_top_p_keeps_the_fewest_that_hold_the_mass(logits, mass):
    kept = _kept(logits, jax.jit(truncation.top_p, static_argnums=1)(logits, mass))
    probs = _softmax(logits.astype(np.float64))
    want = _prefixes(np.argsort(-probs, axis=-1), probs, mass)
    np.testing.assert_array_equal(kept, want)


@pytest.mark.parametrize("mass", [1e-6, 0.3, 0.9])
def test_typical_keeps_those_of_nearly_the_expected_surprise(logits, mass):
    kept = _kept(logits, jax.jit(truncation.typical, static_argnums=1)(logits, mass))
    probs = _softmax(logits.astype(np.float64))
    surprise = -np.log(probs)
    entropy = (probs * surprise).sum(axis=-1, keepdims=True)
    order = np.argsort(np.abs(surprise - entropy), axis=-1)
    np.testing.assert_array_equal(kept, _prefixes(order, probs, mass))


@pytest.mark.parametrize("name", ["top_p", "typical"])
def test_ruled_out_tokens_stay_out_and_a_row_without_tokens_is_left(logits, name):
    logits[0, 0] = -np.inf
    logits[..., 5:] = -np.inf
    found = getattr(truncation, name)(jnp.asarray(logits), 1.0)
    np.testing.assert_array_equal(np.asarray(found)[..., 5:], -np.inf)
    np.testing.assert_array_equal(np.asarray(found)[0, 0], -np.inf)
    np.testing.assert_array_equal(np.asarray(found)[1, :, :5], logits[1, :, :5])


@pytest.mark.parametrize("name", ["top_p", "typical"])
def test_one_certain_token_stays(name):
    logits = np.full((1, 1, 9), -200.0, np.float32)
    logits[0, 0, 4] = 50.0
    found = np.asarray(getattr(truncation, name)(jnp.asarray(logits), 0.5))
    assert np.flatnonzero(found[0, 0] > -np.inf).tolist() == [4]


@pytest.mark.parametrize("name", ["top_p", "typical"])
def test_the_token_at_the_threshold_stays_under_jit(name):
    # XLA once rounded the numbers of the loop and of the last comparison differently.
    rng = np.random.default_rng(3)
    rows = 2.0 * rng.normal(size=(300, 1, 23)).astype(np.float32)

    def kept(rows):
        return getattr(truncation, name)(rows / 1.5, 0.9) > -jnp.inf

    np.testing.assert_array_equal(jax.jit(kept)(rows), kept(rows))
    probs = _softmax(rows / 1.5)
    assert ((probs * jax.jit(kept)(rows)).sum(axis=-1) > 0.9 - 1e-5).all()
