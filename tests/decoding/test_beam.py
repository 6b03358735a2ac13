import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax.decoding import beam_search, gnmt, power
from tests.decoding import toy

ROWS = [3, 50, 12, 7, 88]
PENALTIES = [power(0.0), power(1.0), power(2.0), power(-0.5), gnmt(0.6)]


@functools.partial(jax.jit, static_argnames=("beams", "step", "options"))
def _jitted(table, rows, limit, *, beams, step, options):
    return beam_search(
        step or toy.toy_step(table),
        toy.toy_cache(rows, beams),
        batch_size=len(rows),
        beams=beams,
        limit=limit,
        **dict(options),
    )


def _search(table, rows, beams, *, step=None, limit=None, **options):
    options = {"max_length": 6} | toy.SPECIAL | options
    rows = jnp.asarray(rows)
    return _jitted(
        table, rows, limit, beams=beams, step=step, options=tuple(options.items())
    )


def _counted(step, calls):
    """The step, noting every call of it."""

    def counted(tokens, cache):
        jax.debug.callback(lambda: calls.append(1))
        return step(tokens, cache)

    return counted


def _assert_row(found, b, want):
    assert toy.as_tuples(found, b)[: len(want)] == [tokens for _, tokens in want]
    np.testing.assert_allclose(found.scores[b, : len(want)], [s for s, _ in want], 2e-5)


@pytest.mark.parametrize("penalty", PENALTIES[1:4], ids=str)
def test_equals_exhaustive_search_when_the_beam_holds_everything(penalty):
    table, limit = toy.toy_table(3 + 3), 4
    found = _search(table, ROWS[:2], 81, max_length=limit, length_penalty=penalty)
    for b, row in enumerate(ROWS[:2]):
        want = toy.every_hypothesis(
            table, row, limit, lambda n: float(penalty(jnp.array(n)))
        )
        assert len(want) == 1 + 3 + 9 + 27
        _assert_row(found, b, want)
        np.testing.assert_array_equal(found.scores[b, len(want) :], -np.inf)
        np.testing.assert_array_equal(found.lengths[b, len(want) :], 0)
        np.testing.assert_array_equal(found.tokens[b, len(want) :], toy.PAD)


@pytest.mark.parametrize(
    ("beams", "penalty"), list(zip([2, 3, 5, 4, 3], PENALTIES, strict=True)), ids=str
)
@pytest.mark.parametrize("spread", [0.7, 3.0])
def test_equals_a_beam_in_plain_python_that_never_stops_early(beams, penalty, spread):
    table = toy.toy_table(11, seed=beams, spread=spread)
    table[:, toy.EOS] += 1.0
    found = _search(table, ROWS, beams, length_penalty=penalty)
    for b, row in enumerate(ROWS):
        divisor = lambda n: float(penalty(jnp.array(n)))
        _assert_row(found, b, toy.beam_oracle(table, row, 6, beams, divisor))


@pytest.mark.parametrize("penalty", PENALTIES[1:3], ids=str)
def test_one_beam_is_greedy(penalty):
    table = toy.toy_table(11, spread=1.0)
    found = _search(table, ROWS, 1, length_penalty=penalty)
    for b, row in enumerate(ROWS):
        assert toy.as_tuples(found, b) == [toy.greedy_oracle(table, row, 6)]


def test_results_are_sorted_distinct_and_end_with_eos():
    found = _search(toy.toy_table(11), ROWS, 4)
    assert (np.diff(found.scores, axis=1) <= 0).all()
    for b in range(len(ROWS)):
        hypotheses = toy.as_tuples(found, b)
        assert len(set(hypotheses)) == 4
        assert all(
            tokens.count(toy.EOS) == 1 and tokens[-1] == toy.EOS
            for tokens in hypotheses
        )


def test_scores_are_log_probabilities_over_the_penalty():
    table = toy.toy_table(11)
    found = _search(table, ROWS, 3, length_penalty=gnmt(0.6))
    for b, row in enumerate(ROWS):
        want = [toy.log_prob(table, row, tokens) for tokens in toy.as_tuples(found, b)]
        np.testing.assert_allclose(found.log_probs[b], want, 2e-5)
    want = found.log_probs / ((5 + found.lengths) / 6) ** 0.6
    np.testing.assert_allclose(found.scores, want, rtol=1e-6)


def test_the_length_penalty_decides_between_short_and_long():
    table = toy.toy_table(5, spread=0.1)
    shortest = _search(table, ROWS, 4, length_penalty=power(-1.0)).lengths[:, 0]
    longest = _search(table, ROWS, 4, length_penalty=power(3.0)).lengths[:, 0]
    np.testing.assert_array_equal(shortest, 1)
    np.testing.assert_array_equal(longest, 6)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _History:
    """Consumed tokens (B, Z, M) and their number (); asserts what reorder is given."""

    tokens: jax.Array
    calls: jax.Array

    def reorder(self, parents):
        assert parents.shape == self.tokens.shape[:2] and parents.dtype == jnp.int32
        return _History(
            jnp.take_along_axis(self.tokens, parents[..., None], 1), self.calls
        )


def test_the_cache_of_a_hypothesis_holds_its_own_tokens():
    rng = np.random.default_rng(0)
    table = (
        jnp.asarray(rng.normal(size=(6, 11)).astype(np.float32))
        .at[:, toy.EOS]
        .set(-9.0)
    )
    seen = []

    def step(tokens, cache):
        history = cache.tokens.at[:, :, cache.calls].set(tokens)
        jax.debug.callback(lambda history: seen.append(np.asarray(history)), history)
        logits = jnp.broadcast_to(table[cache.calls], (*tokens.shape, 11))
        return logits, _History(history, cache.calls + 1)

    cache = _History(jnp.zeros((1, 4, 6), jnp.int32), jnp.zeros((), jnp.int32))
    found = beam_search(step, cache, batch_size=1, beams=4, max_length=6, **toy.SPECIAL)
    jax.effects_barrier()
    assert len(seen) == 6
    want = {(toy.BOS, *tokens[:-1]) for tokens in toy.as_tuples(found, 0)}
    assert want == set(map(tuple, seen[-1][0].tolist()))


def test_each_row_ends_at_its_own_limit():
    table = toy.toy_table(11, spread=1.0)
    limits = [1, 2, 6, 0, 99]
    found = _search(table, ROWS, 3, limit=jnp.array(limits), length_penalty=power(1.0))
    for b, row in enumerate(ROWS):
        limit = min(limits[b], 6)
        _assert_row(found, b, toy.beam_oracle(table, row, limit, 3, lambda n: n))
    np.testing.assert_array_equal(found.lengths[3], 0)
    np.testing.assert_array_equal(found.scores[3], -np.inf)
    np.testing.assert_array_equal(found.scores[0, 1:], -np.inf)


def test_a_row_does_not_depend_on_its_batch():
    table, limits = toy.toy_table(70, spread=3.0), np.array([2, 6, 3, 5, 4])
    search = lambda rows, limits: _search(table, rows, 3, limit=limits)
    together = search(ROWS, limits)
    order = [4, 2, 0, 1, 3]
    permuted = search([ROWS[i] for i in order], limits[order])
    padded = search([*ROWS, 0, 0], np.array([*limits, 0, 6]))
    for i, b in enumerate(order):
        alone = search(ROWS[b : b + 1], limits[b : b + 1])
        for other, place in ((permuted, i), (padded, b), (alone, 0)):
            jax.tree.map(
                lambda x, y, b=b, place=place: np.testing.assert_array_equal(
                    x[b], y[place]
                ),
                together,
                other,
            )


def test_a_larger_buffer_changes_only_the_padding():
    table, limits = toy.toy_table(11, spread=3.0), np.array([2, 6, 3, 5, 4])
    small = _search(table, ROWS, 3, limit=limits)
    large = _search(table, ROWS, 3, limit=limits, max_length=16)
    np.testing.assert_array_equal(small.scores, large.scores)
    np.testing.assert_array_equal(small.tokens, large.tokens[:, :, :6])
    np.testing.assert_array_equal(large.tokens[:, :, 6:], toy.PAD)


def test_the_loop_ends_when_nothing_can_improve():
    table = toy.toy_table(11, spread=0.1)
    table[:, toy.EOS] = 12.0
    calls = []
    step = _counted(toy.toy_step(table), calls)
    found = _search(table, ROWS, 2, step=step, max_length=14, length_penalty=power(0.0))
    jax.effects_barrier()
    assert len(calls) == 2
    assert all(toy.as_tuples(found, b)[0] == (toy.EOS,) for b in range(len(ROWS)))


@pytest.mark.parametrize(("exact", "iterations"), [(True, 8), (False, 2)])
def test_the_loop_goes_on_while_a_longer_hypothesis_could_win(exact, iterations):
    # Each word costs 12, EOS nothing: the second best scores -12 / 2, and an alive one of n words
    # at most -12 n / 14.
    table = toy.toy_table(11, spread=0.1)
    table[:, toy.EOS] = 12.0
    calls = []
    step = _counted(toy.toy_step(table), calls)
    _search(
        table, ROWS, 2, step=step, max_length=14, length_penalty=power(1.0), exact=exact
    )
    jax.effects_barrier()
    assert len(calls) == iterations


def test_the_inexact_exit_changes_nothing_for_raw_log_probabilities():
    table = toy.toy_table(11, spread=1.0)
    options = {"length_penalty": power(0.0)}
    exact, inexact = (
        _search(table, ROWS, 3, exact=e, **options) for e in (True, False)
    )
    jax.tree.map(np.testing.assert_array_equal, exact, inexact)


def test_rows_without_budget_cost_no_iterations():
    calls = []
    step = _counted(toy.toy_step(toy.toy_table(11)), calls)
    found = _search(None, ROWS, 3, step=step, limit=np.zeros(5, np.int32))
    jax.effects_barrier()
    assert not calls and (found.tokens == toy.PAD).all()


def test_impossible_tokens_never_reach_a_result():
    table = np.full((toy.STATES, 11), -np.inf, np.float32)
    table[:, [toy.EOS, 5]] = [0.0, 1.0]
    found = _search(table, ROWS, 4, max_length=3)
    for b in range(len(ROWS)):
        assert set(toy.as_tuples(found, b)) == {(2,), (5, 2), (5, 5, 2), ()}
    assert not any(np.isnan(leaf).any() for leaf in jax.tree.leaves(found))


def test_forbidden_tokens_are_never_emitted_and_keep_their_probability():
    table = toy.toy_table(5)
    table[:, [toy.PAD, toy.BOS]] = 20.0
    found = _search(table, ROWS, 4, max_length=3, forbidden=(3,))
    assert set(toy.as_tuples(found, 0)) == {(2,), (4, 2), (4, 4, 2), ()}
    assert not (found.tokens == 3).any()
    single = _search(table, ROWS, 2, max_length=1, forbidden=(3, 4))
    want = [toy.log_prob(table, row, (toy.EOS,)) for row in ROWS]
    assert max(want) < -15
    np.testing.assert_allclose(single.log_probs[:, 0], want, 1e-5)


def test_equal_scores_keep_the_order_of_finishing_then_of_tokens():
    found = _search(np.zeros((toy.STATES, 200), np.float32), ROWS[:2], 3, max_length=2)
    for b in range(2):
        assert toy.as_tuples(found, b) == [(2,), (3, 2), (4, 2)]


def test_jit_equals_eager_and_traces_once():
    table = toy.toy_table(11)

    def search(rows, limit):
        options = {"batch_size": 5, "beams": 3, "max_length": 6} | toy.SPECIAL
        cache = toy.toy_cache(rows, 3)
        return beam_search(toy.toy_step(table), cache, limit=limit, **options)

    jitted = jax.jit(chex.assert_max_traces(search, n=1))
    for shift in range(2):
        rows, limit = jnp.array(ROWS) + shift, jnp.array([6, 2, 4, 3, 1]) + shift
        for x, y in zip(
            *map(jax.tree.leaves, (jitted(rows, limit), search(rows, limit)))
        ):
            np.testing.assert_allclose(x, y, rtol=1e-6)


def test_wrong_arguments_are_named():
    table = toy.toy_table(11)
    with pytest.raises(ValueError, match="beams must be at least 1; got 0"):
        _search(table, ROWS, 0)
    with pytest.raises(
        ValueError, match=r"limit must be integers of shape \(B,\) = \(5,\)"
    ):
        _search(table, ROWS, 2, limit=np.ones(4, np.int32))

    def flat(tokens, cache):
        return jnp.zeros((10, 11)), cache

    with pytest.raises(
        ValueError, match=r"logits \(B, Z, V\) = \(5, 2, V\); got \(10, 11\)"
    ):
        _search(table, ROWS, 2, step=flat)
