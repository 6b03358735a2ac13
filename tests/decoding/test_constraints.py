"""Each rule against plain Python, in greedy and in beam search, over the same tables."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax.decoding import Constraints, beam_search, greedy_search, power
from tests.decoding import toy

ROWS = [3, 50, 12, 7, 88, 21, 60, 33]
LIMIT = 10


def no_end_before(count):
    def rule(tokens, gains, last):
        if len(tokens) < count and not last:
            gains[toy.EOS] = -np.inf
        return gains

    return rule


def no_repeat(n):
    def rule(tokens, gains, last):
        seen = toy.sub_sequences((toy.BOS, *tokens), n)
        for token in range(len(gains)):
            ends = ((toy.BOS, *tokens, token)[-n:] if n > 1 else (token,)) in seen
            if ends and token != toy.EOS:
                gains[token] = -np.inf
        return gains

    return rule


def never(phrases):
    def rule(tokens, gains, last):
        for phrase in phrases:
            if (toy.BOS, *tokens)[len(tokens) + 2 - len(phrase) :] == phrase[:-1]:
                gains[phrase[-1]] = -np.inf
        return gains

    return rule


def starts_with(prefix):
    def rule(tokens, gains, last):
        wanted = prefix[len(tokens)] if len(tokens) < len(prefix) else -1
        if wanted < 0:
            return gains
        return np.where(np.arange(len(gains)) == wanted, 0.0, -np.inf)

    return rule


def dearer_again(factor):
    """In beam search: of log-probabilities, which are never positive."""

    def rule(tokens, gains, last):
        seen = list({toy.BOS, *tokens})
        gains[seen] *= factor
        return gains

    return rule


PHRASES = ((5,), (3, 4), (6, 6), (toy.BOS, 7), (4, 3, 8), (8, toy.EOS))
CASES = {
    "min_length": (Constraints(min_length=3), no_end_before(3)),
    "min_length-over-limit": (Constraints(min_length=30), no_end_before(30)),
    "no_repeat-1": (Constraints(no_repeat_ngram=1), no_repeat(1)),
    "no_repeat-2": (Constraints(no_repeat_ngram=2), no_repeat(2)),
    "no_repeat-3": (Constraints(no_repeat_ngram=3), no_repeat(3)),
    "no_repeat-30": (Constraints(no_repeat_ngram=30), no_repeat(30)),
    "phrases": (Constraints(banned_phrases=PHRASES), never(PHRASES)),
}


def _repetitive_table(vocabulary, seed=0):
    """A model that likes few tokens, so that rules have something to do."""
    table = toy.toy_table(vocabulary, seed=seed, spread=0.8)
    table[:, 3:5] += 2.0
    table[:, toy.EOS] += 1.0
    return table


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ends", [True, False])
def test_a_rule_in_greedy_search(case, ends):
    constraints, rule = CASES[case]
    table, changed = _repetitive_table(9), 0
    options = {"max_length": LIMIT, "end_at_limit": ends}
    found = toy.run(greedy_search, table, ROWS, 1, constraints=constraints, **options)
    for b, row in enumerate(ROWS):
        want = toy.greedy_oracle(table, row, LIMIT, rule, ends)
        if "phrases" in case and ends and want[-2:] == (8, toy.EOS):
            want = ()  # Banned at the limit, where nothing else is allowed.
        assert toy.as_tuples(found, b) == [want]
        changed += want != toy.greedy_oracle(table, row, LIMIT, ends=ends)
    assert changed or case == "no_repeat-30"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ends", [True, False])
def test_a_rule_in_beam_search(case, ends):
    constraints, rule = CASES[case]
    table, changed = _repetitive_table(9, seed=1), 0
    options = {"max_length": LIMIT, "end_at_limit": ends, "length_penalty": power(1.0)}
    found = toy.run(
        beam_search, table, ROWS, 4, beams=4, constraints=constraints, **options
    )
    for b, row in enumerate(ROWS):
        oracle = functools.partial(toy.beam_oracle, table, row, LIMIT, 4, lambda n: n)
        want = oracle(rule, ends)
        assert toy.as_tuples(found, b)[: len(want)] == [x for _, x in want]
        np.testing.assert_allclose(
            found.scores[b, : len(want)], [s for s, _ in want], 2e-5
        )
        changed += want != oracle(ends=ends)
    assert changed or case == "no_repeat-30"


def test_repetition_is_dearer_in_beam_scores_and_never_in_log_probabilities():
    table = _repetitive_table(9)
    constraints = Constraints(repetition_penalty=1.7)
    found = toy.run(beam_search, table, ROWS, 4, beams=4, constraints=constraints)
    for b, row in enumerate(ROWS):
        want = toy.beam_oracle(table, row, 6, 4, lambda n: n, dearer_again(1.7))
        tokens = toy.as_tuples(found, b)
        assert tokens == [x for _, x in want]
        np.testing.assert_allclose(found.scores[b], [s for s, _ in want], 2e-5)
        own = [toy.log_prob(table, row, x) for x in tokens]
        np.testing.assert_allclose(found.log_probs[b], own, 2e-5)


def test_repetition_is_dearer_by_the_sign_of_logits_in_greedy_search():
    table = _repetitive_table(9) + 2.0
    constraints = Constraints(repetition_penalty=2.5)
    found = toy.run(greedy_search, table, ROWS, 1, constraints=constraints)

    def lowered(row, tokens):
        state = row
        for token in (toy.BOS, *tokens):
            state = toy.next_state(state, token)
        logits = table[state].astype(np.float64)
        for token in {toy.BOS, *tokens}:
            logits[token] *= 2.5 if logits[token] < 0 else 1 / 2.5
        logits[[toy.PAD, toy.BOS]] = -np.inf
        return logits

    for b, row in enumerate(ROWS):
        rule = lambda tokens, gains, last, row=row: lowered(row, tokens)
        (tokens,) = toy.as_tuples(found, b)
        assert tokens == toy.greedy_oracle(table, row, 6, rule)
        own = toy.log_prob(table, row, tokens)
        np.testing.assert_allclose(found.log_probs[b, 0], own, 2e-5)


PREFIXES = [
    [5, 4],
    [8, -1],
    [-1, 6],
    [-1, -1],
    [4, toy.EOS],
    [3, 3],
    [-1, toy.EOS],
    [7, 8],
]


@pytest.mark.parametrize("beams", [1, 4])
def test_a_prefix_is_what_each_row_starts_with_at_no_cost(beams):
    table = toy.toy_table(9)
    search = functools.partial(beam_search, beams=beams)
    found = toy.run(search, table, ROWS, beams, prefix=np.array(PREFIXES))
    for b, row in enumerate(ROWS):
        rule = starts_with(PREFIXES[b])
        if beams == 1:
            tokens = toy.greedy_oracle(table, row, 6, rule)
            assert toy.as_tuples(found, b) == [tokens]
            continue
        want = toy.beam_oracle(table, row, 6, beams, lambda n: n, rule)
        assert toy.as_tuples(found, b)[: len(want)] == [x for _, x in want]
        scores = [s for s, _ in want]
        np.testing.assert_allclose(found.scores[b, : len(want)], scores, 2e-5, 1e-6)


def test_a_prefix_may_hold_what_rules_exclude():
    prefix = np.full((8, 3), 5)
    constraints = Constraints(no_repeat_ngram=1, banned_phrases=((5, 5),))
    options = {"prefix": prefix, "constraints": constraints, "forbidden": (5,)}
    found = toy.run(greedy_search, toy.toy_table(9), ROWS, 1, **options)
    assert all(toy.as_tuples(found, b)[0][:3] == (5, 5, 5) for b in range(8))
    assert not (found.tokens[:, 0, 3:] == 5).any()


@pytest.mark.parametrize("beams", [1, 3])
def test_a_prefix_without_room_for_eos_leaves_no_hypothesis(beams):
    limit, prefix = np.array([2, 3, 4, 5, 6, 1, 0, 5]), np.full((8, 3), 5)
    search = functools.partial(beam_search, beams=beams)
    found = toy.run(search, toy.toy_table(9), ROWS, beams, prefix=prefix, limit=limit)
    np.testing.assert_array_equal(found.lengths[:, 0] > 0, limit > 3)
    np.testing.assert_array_equal(found.scores[:2], -np.inf)


def test_a_model_whose_start_is_its_end_can_end_without_repeats():
    options = {"bos": toy.EOS, "constraints": Constraints(no_repeat_ngram=1)}
    found = toy.run(beam_search, toy.toy_table(9), ROWS, 3, beams=3, **options)
    assert (np.asarray(found.lengths[:, 0]) < 6).any()
    for b in range(8):
        assert all(len(set(x)) == len(x) for x in toy.as_tuples(found, b))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_length": -1}, "min_length must be at least 0; got -1"),
        ({"no_repeat_ngram": -2}, "no_repeat_ngram must be at least 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be positive"),
        ({"banned_phrases": ((),)}, "banned_phrases must hold sequences"),
        ({"banned_phrases": ((3, -1),)}, "banned_phrases must hold sequences"),
    ],
)
def test_wrong_rules_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Constraints(**fields)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"constraints": Constraints(banned_phrases=((2,),))}, "eos must differ"),
        ({"constraints": Constraints(banned_phrases=((3, 9),))}, "below V = 9; got 9"),
        ({"prefix": np.ones(8, int)}, r"prefix must be integers of shape \(B, P\)"),
        ({"phrases": np.ones((8, 2), int)}, r"\(B, C, L\) = \(8, C, L\); got"),
        ({"phrases": np.ones((8, 2, 2))}, r"\(B, C, L\) = \(8, C, L\); got float"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        toy.run(greedy_search, toy.toy_table(9), ROWS, 1, **options)


def test_rules_are_values():
    lists = Constraints(banned_phrases=[[3, 4]])
    assert hash(lists) == hash(Constraints(banned_phrases=((3, 4),)))
    assert lists != Constraints()
    assert jnp.asarray(lists.banned_phrases).shape == (1, 2)
