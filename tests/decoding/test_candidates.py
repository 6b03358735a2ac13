import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax.decoding.candidates import top_candidates


def _sorted(logits, normaliser, log_probs, count):
    totals = log_probs[..., None] + (logits - normaliser[..., None])
    flat = totals.reshape(len(totals), -1)
    order = np.argsort(-flat, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(flat, order, 1), *np.divmod(order, logits.shape[-1])


# V below, at and above a block, divided by it or not; 2Z above and below the number of blocks.
@pytest.mark.parametrize(
    ("beams", "vocabulary"), [(1, 5), (3, 64), (2, 65), (5, 131), (4, 640)]
)
@pytest.mark.parametrize("levels", [3, 100_000], ids=["ties", "distinct"])
def test_equals_a_stable_sort(beams, vocabulary, levels):
    rng = np.random.default_rng(vocabulary)
    logits = rng.integers(0, levels, (3, beams, vocabulary)).astype(np.float32)
    normaliser = rng.integers(0, 2, (3, beams)).astype(np.float32)
    log_probs = -rng.integers(0, 2, (3, beams)).astype(np.float32)
    got = jax.jit(top_candidates, static_argnames="count")(
        logits, normaliser, log_probs, count=2 * beams
    )
    want = _sorted(logits, normaliser, log_probs, 2 * beams)
    for actual, expected in zip(got, want, strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_dead_hypotheses_and_forbidden_tokens_come_last_without_nan():
    logits = jnp.full((1, 3, 70), -jnp.inf).at[0, 1, 69].set(1.0).at[0, 2, 4].set(5.0)
    log_probs = jnp.array([[-1.0, -2.0, -jnp.inf]])
    got = top_candidates(logits, jnp.zeros((1, 3)), log_probs, count=6)
    np.testing.assert_array_equal(got.log_probs[0], [-1.0] + [-np.inf] * 5)
    assert (int(got.parents[0, 0]), int(got.tokens[0, 0])) == (1, 69)
    assert ((got.parents >= 0) & (got.parents < 3)).all()
