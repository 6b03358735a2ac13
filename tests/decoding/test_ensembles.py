import functools

import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax.decoding import (
    EnsembleCache,
    LogProbs,
    average_log_probs,
    beam_search,
    ensemble,
    greedy_search,
    power,
)
from tests.decoding import toy

ROWS = [3, 50, 12, 7, 88]
TABLES = [toy.toy_table(11, seed=seed, spread=1.5) for seed in (1, 2, 3)]
MEANS = {
    "log_probs": lambda gains: np.mean(gains, axis=0),
    "probs": lambda gains: np.logaddexp.reduce(gains, axis=0) - np.log(len(gains)),
}


def _run(search, tables, hypotheses, average="log_probs", **options):
    step = ensemble([toy.toy_step(table) for table in tables], average=average)
    cache = EnsembleCache(tuple(toy.toy_cache(ROWS, hypotheses) for _ in tables))
    return toy.run(search, None, ROWS, hypotheses, step=step, cache=cache, **options)


@pytest.mark.parametrize("average", MEANS)
def test_a_beam_of_several_models_is_that_of_their_average(average, monkeypatch):
    single = toy.log_probs_after

    def averaged(tables, row, prefix):
        gains = [single(table, row, prefix) for table in tables]
        return MEANS[average](np.array(gains))

    monkeypatch.setattr(toy, "log_probs_after", averaged)
    found = _run(beam_search, TABLES, 4, average, beams=4, length_penalty=power(0.0))
    for b, row in enumerate(ROWS):
        want = toy.beam_oracle(TABLES, row, 6, 4, lambda n: 1.0)
        assert toy.as_tuples(found, b) == [x for _, x in want]
        np.testing.assert_allclose(found.log_probs[b], [s for s, _ in want], 2e-5)


@pytest.mark.parametrize("average", MEANS)
def test_copies_of_a_model_are_the_model(average):
    search = functools.partial(beam_search, beams=3)
    one = toy.run(search, TABLES[0], ROWS, 3)
    three = _run(search, [TABLES[0]] * 3, 3, average)
    np.testing.assert_array_equal(one.tokens, three.tokens)
    np.testing.assert_allclose(one.log_probs, three.log_probs, rtol=1e-5)


def test_the_averages_differ_where_models_disagree():
    found = [_run(greedy_search, TABLES, 1, average).log_probs for average in MEANS]
    assert (np.abs(found[0] - found[1]) > 1e-3).any()


def test_impossible_tokens_stay_impossible_without_nan():
    impossible = np.full((1, 2, 5), -np.inf, np.float32)
    certain = impossible.copy()
    certain[..., 3] = 2.0
    for average, at_three in (("log_probs", -np.inf), ("probs", np.log(0.5))):
        found = average_log_probs([impossible, certain], average=average).values
        np.testing.assert_allclose(found[..., 3], at_three, rtol=1e-6)
        np.testing.assert_array_equal(found[..., :3], -np.inf)


def test_log_probabilities_of_a_step_are_not_normalised_anew():
    def half(tokens, cache):
        logits, cache = toy.toy_step(TABLES[0])(tokens, cache)
        return LogProbs(logits - 20.0), cache

    found = toy.run(greedy_search, None, ROWS, 1, step=half)
    logits = [TABLES[0][toy.next_state(row, toy.BOS)] - 20.0 for row in ROWS]
    short = toy.run(greedy_search, None, ROWS, 1, step=half, max_length=1)
    np.testing.assert_allclose(
        short.log_probs[:, 0], np.array(logits)[:, toy.EOS], 1e-6
    )
    assert (found.log_probs < -10).all()


def test_wrong_ensembles_are_named():
    with pytest.raises(ValueError, match="steps must hold at least one"):
        ensemble([])
    with pytest.raises(ValueError, match="share the target vocabulary"):
        average_log_probs([jnp.zeros((1, 1, 5)), jnp.zeros((1, 1, 6))])
    with pytest.raises(ValueError, match='"log_probs" or "probs"; got \'mean\''):
        average_log_probs([jnp.zeros((1, 1, 5))], average="mean")
    step = ensemble([toy.toy_step(TABLES[0])] * 2)
    with pytest.raises(ValueError, match="a member for each of 2 steps; got 1"):
        step(jnp.zeros((5, 1), jnp.int32), EnsembleCache((toy.toy_cache(ROWS, 1),)))
