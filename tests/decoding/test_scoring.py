import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax.decoding import (
    Constraints,
    beam_search,
    gnmt,
    greedy_search,
    sample,
    score_targets,
)
from tests.decoding import toy

ROWS = [3, 50, 12, 7, 88]
SEARCHES = {
    "greedy": (greedy_search, 1),
    "beam": (functools.partial(beam_search, beams=4), 4),
    "sample": (functools.partial(sample, samples=4, rng=jax.random.key(1)), 4),
}
PREFIX = np.array([[5, 4], [8, -1], [-1, 6], [-1, -1], [4, toy.EOS]])


def _forced_logits(table, row, tokens):
    """(T, V): the model's logits at every position of the target."""
    state, logits = row, []
    for token in (toy.BOS, *tokens[:-1]):
        state = toy.next_state(state, int(token))
        logits.append(table[state])
    return np.array(logits)


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("prefix", [None, PREFIX], ids=["free", "prefix"])
def test_a_hypothesis_scores_what_its_search_said(name, prefix):
    table, (search, Z) = toy.toy_table(11), SEARCHES[name]
    rules = Constraints(min_length=2, repetition_penalty=1.3)
    options = {"length_penalty": gnmt(0.6), "constraints": rules, "prefix": prefix}
    found = toy.run(search, table, ROWS, Z, **options)
    for z in range(Z):
        targets = np.asarray(found.tokens[:, z])
        logits = [_forced_logits(table, *pair) for pair in zip(ROWS, targets)]
        options = {"pad": toy.PAD, "prefix": prefix, "length_penalty": gnmt(0.6)}
        scores = score_targets(np.array(logits), targets, **options)
        there = np.asarray(found.lengths[:, z]) > 0
        assert there.any()
        np.testing.assert_array_equal(scores.lengths[there], found.lengths[there, z])
        want = found.log_probs[there, z]
        np.testing.assert_allclose(scores.log_probs[there], want, rtol=1e-6, atol=1e-6)
        if name != "beam":  # There, the penalty counts in scores.
            want = found.scores[there, z]
            np.testing.assert_allclose(scores.scores[there], want, rtol=1e-6, atol=1e-6)


def test_beam_scores_without_penalty_are_the_same():
    table = toy.toy_table(11)
    found = toy.run(beam_search, table, ROWS, 3, beams=3, length_penalty=gnmt(0.6))
    targets = np.asarray(found.tokens[:, 0])
    logits = [_forced_logits(table, *pair) for pair in zip(ROWS, targets)]
    scores = score_targets(
        np.array(logits), targets, pad=toy.PAD, length_penalty=gnmt(0.6)
    )
    np.testing.assert_allclose(scores.scores, found.scores[:, 0], rtol=1e-6)


def test_tokens_get_their_log_softmax_and_padding_nothing():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 4, 7)).astype(np.float32)
    targets = np.array([[3, 2, 0, 0], [5, 6, 4, 2]])
    found = jax.jit(functools.partial(score_targets, pad=0))(logits, targets)
    wide = logits.astype(np.float64)
    logs = wide - np.logaddexp.reduce(wide, axis=-1, keepdims=True)
    want = np.take_along_axis(logs, targets[..., None], -1)[..., 0]
    want[0, 2:] = 0.0
    np.testing.assert_allclose(found.token_log_probs, want, 1e-5, 1e-6)
    np.testing.assert_allclose(found.log_probs, want.sum(axis=1), 1e-5)
    np.testing.assert_allclose(found.scores, want.sum(axis=1) / [2, 4], 1e-5)


def test_a_prefix_longer_than_the_target_costs_nothing():
    logits = jnp.zeros((1, 2, 7))
    found = score_targets(
        logits, jnp.array([[3, 2]]), pad=0, prefix=jnp.array([[3, 2, 4]])
    )
    np.testing.assert_array_equal(found.log_probs, 0.0)
    empty = score_targets(logits, jnp.array([[0, 0]]), pad=0)
    assert empty.scores[0] == 0.0 and empty.lengths[0] == 0


def test_wrong_targets_are_named():
    logits = jnp.zeros((2, 4, 7))
    with pytest.raises(ValueError, match=r"targets must be integers .* \(2, 4\)"):
        score_targets(logits, jnp.zeros((2, 3), jnp.int32), pad=0)
    with pytest.raises(ValueError, match=r"prefix must be \(B, P\) = \(2, P\)"):
        score_targets(
            logits, jnp.ones((2, 4), jnp.int32), pad=0, prefix=jnp.zeros(3, jnp.int32)
        )
