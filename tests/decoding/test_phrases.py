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
    power,
    sample,
)
from qkv_jax.decoding.phrases import progress
from tests.decoding import toy

ROWS = [3, 50, 12, 7, 88]


def packed(rows, C=3, L=3):
    """(B, C, L) int32, padded by -1."""
    array = np.full((len(rows), C, L), -1, np.int32)
    for b, row in enumerate(rows):
        for c, phrase in enumerate(row):
            array[b, c, : len(phrase)] = phrase
    return array


def holds(tokens, phrases):
    return all(phrase in toy.sub_sequences(tokens, len(phrase)) for phrase in phrases)


# Single and long, overlapping with one another and with themselves, twice the same, none.
PHRASES = [
    [(5,)],
    [(3, 4), (4, 3)],
    [(4, 4, 3), (5,)],
    [],
    [(3, 4, 5), (3, 4)],
]


@pytest.mark.parametrize("penalty", [power(0.0), power(1.0), gnmt(0.6)], ids=str)
def test_equals_a_filtered_exhaustive_search_when_the_beam_holds_everything(penalty):
    table, limit = toy.toy_table(3 + 3), 5
    phrases = [[(5,)], [(4, 5)], [(3, 3)], [], [(3, 4, 5)]]
    options = {
        "max_length": limit,
        "length_penalty": penalty,
        "phrases": packed(phrases),
    }
    found = toy.run(beam_search, table, ROWS, 130, beams=130, **options)
    for b, row in enumerate(ROWS):
        divisor = lambda n: float(penalty(jnp.array(n)))
        every = toy.every_hypothesis(table, row, limit, divisor)
        want = [(score, x) for score, x in every if holds(x, phrases[b])]
        assert toy.as_tuples(found, b)[: len(want)] == [x for _, x in want]
        scores = [score for score, _ in want]
        np.testing.assert_allclose(found.scores[b, : len(want)], scores, 2e-5)
        np.testing.assert_array_equal(found.scores[b, len(want) :], -np.inf)


@pytest.mark.parametrize("beams", [1, 2, 4, 7])
@pytest.mark.parametrize("slack", [0, 1, 5])
@pytest.mark.parametrize("likes_to_end", [-6.0, 6.0])
def test_every_hypothesis_holds_every_phrase_at_any_beam_and_limit(
    beams, slack, likes_to_end
):
    table = toy.toy_table(40, spread=2.0)
    table[:, toy.EOS] += likes_to_end
    limit = np.array([sum(map(len, row)) + 1 + slack for row in PHRASES])
    options = {"max_length": 16, "limit": limit, "phrases": packed(PHRASES)}
    search = functools.partial(beam_search, beams=beams)
    found = toy.run(search, table, ROWS, beams, **options)
    for b, phrases in enumerate(PHRASES):
        first, *others = toy.as_tuples(found, b)
        assert first and first[-1] == toy.EOS and len(first) <= limit[b]
        assert all(holds(x, phrases) for x in [first, *others] if x)
        assert len(set(others) - {()}) == sum(map(bool, others))


def test_a_row_without_phrases_is_searched_as_ever():
    table = toy.toy_table(11)
    plain = toy.run(beam_search, table, ROWS, 4, beams=4)
    found = toy.run(beam_search, table, ROWS, 4, beams=4, phrases=packed([[]] * 5))
    np.testing.assert_array_equal(plain.tokens, found.tokens)
    np.testing.assert_array_equal(plain.scores, found.scores)


def test_a_narrow_beam_comes_near_the_best():
    table, rows, limit = toy.toy_table(6, spread=1.0), list(range(40)), 6
    phrases = [[(3, 4), (5,)]] * 40
    options = {"max_length": limit, "length_penalty": power(0.0)}
    found = toy.run(
        beam_search, table, rows, 8, beams=8, phrases=packed(phrases), **options
    )
    lost = []
    for b, row in enumerate(rows):
        every = toy.every_hypothesis(table, row, limit, lambda n: 1.0)
        best = next(score for score, x in every if holds(x, phrases[b]))
        lost.append(best - float(found.scores[b, 0]))
    assert min(lost) > -1e-4 and np.mean(np.array(lost) < 1e-4) >= 0.8


def test_a_limit_without_room_leaves_no_hypothesis():
    limit = np.array([1, 4, 4, 0, 5])
    options = {"max_length": 8, "limit": limit, "phrases": packed(PHRASES)}
    found = toy.run(beam_search, toy.toy_table(11), ROWS, 3, beams=3, **options)
    np.testing.assert_array_equal(found.lengths, 0)
    np.testing.assert_array_equal(found.scores, -np.inf)
    np.testing.assert_array_equal(found.tokens, toy.PAD)


def test_phrases_go_with_the_other_rules():
    constraints = Constraints(min_length=8, no_repeat_ngram=3, banned_phrases=((6, 7),))
    prefix = np.array([[3, -1]] * 5)
    options = {"constraints": constraints, "prefix": prefix, "max_length": 14}
    found = toy.run(
        beam_search,
        toy.toy_table(11),
        ROWS,
        4,
        beams=4,
        phrases=packed(PHRASES),
        **options,
    )
    for b, phrases in enumerate(PHRASES):
        for tokens in toy.as_tuples(found, b):
            assert tokens[0] == 3 and len(tokens) >= 9 and holds(tokens, phrases)
            assert (6, 7) not in toy.sub_sequences(tokens, 2)
            triples = toy.sub_sequences(tokens, 3)
            assert len(set(triples)) == len(triples)


def test_a_phrase_that_another_rule_bans_leaves_no_hypothesis():
    options = {"phrases": packed([[(5,)]] * 5), "forbidden": (5,)}
    found = toy.run(beam_search, toy.toy_table(11), ROWS, 3, beams=3, **options)
    np.testing.assert_array_equal(found.lengths, 0)


@pytest.mark.parametrize("end_at_limit", [True, False])
def test_greedy_search_and_samples_hold_the_phrases_too(end_at_limit):
    table = toy.toy_table(30)
    options = {
        "phrases": packed(PHRASES),
        "max_length": 8,
        "end_at_limit": end_at_limit,
    }
    drawn = toy.run(sample, table, ROWS, 6, samples=6, rng=jax.random.key(0), **options)
    greedy = toy.run(greedy_search, table, ROWS, 1, **options)
    for b, phrases in enumerate(PHRASES):
        for tokens in toy.as_tuples(drawn, b) + toy.as_tuples(greedy, b):
            assert tokens and holds(tokens, phrases)


def test_progress_is_read_off_the_tokens():
    tokens = jnp.array([[[4, 4, 3, 9, 9], [3, 4, 4, 4, 9], [7, 7, 7, 4, 4]]])
    phrases = jnp.array([[[4, 4, 3], [5, -1, -1], [-1, -1, -1]]])
    found = progress(phrases, tokens, jnp.array(4))
    np.testing.assert_array_equal(found.met[0, :, 0], [True, False, False])
    np.testing.assert_array_equal(found.met[0, :, 2], True)
    np.testing.assert_array_equal(found.needed, [[1, 2, 3]])
    # Suffixes 4 and 4 4 of the second, 4 of the third; the empty one of each.
    matched = [[False] * 3, [True] * 3, [True, True, False]]
    np.testing.assert_array_equal(found.matched[0, :, 0], matched)
