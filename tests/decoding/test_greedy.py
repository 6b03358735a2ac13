import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax.decoding import gnmt, greedy_search, power
from tests.decoding import toy

ROWS = [3, 50, 12, 7, 88]


@functools.partial(jax.jit, static_argnames="options")
def _jitted(table, rows, limit, *, options):
    cache = toy.toy_cache(rows, 1)
    options = dict(options)
    return greedy_search(
        toy.toy_step(table), cache, batch_size=len(rows), limit=limit, **options
    )


def _search(table, rows, *, limit=None, **options):
    options = {"max_length": 8} | toy.SPECIAL | options
    return _jitted(table, jnp.asarray(rows), limit, options=tuple(options.items()))


@pytest.mark.parametrize("seed", range(4))
def test_takes_the_likeliest_token_every_time(seed):
    table = toy.toy_table(7, seed=seed, spread=1.0)
    found = _search(table, ROWS)
    for b, row in enumerate(ROWS):
        (tokens,) = toy.as_tuples(found, b)
        assert tokens == toy.greedy_oracle(table, row, 8)
        np.testing.assert_allclose(
            found.log_probs[b, 0], toy.log_prob(table, row, tokens), 1e-5
        )


def test_scores_are_normalised_by_the_length():
    found = _search(toy.toy_table(7), ROWS, length_penalty=gnmt(0.7))
    want = found.log_probs / ((5 + found.lengths) / 6) ** 0.7
    np.testing.assert_allclose(found.scores, want, rtol=1e-6)


def test_each_row_ends_at_its_own_limit():
    table = toy.toy_table(7, spread=1.0)
    table[:, toy.EOS] = -5.0
    limits = [1, 2, 5, 0, 99]
    found = _search(table, ROWS, limit=jnp.array(limits))
    np.testing.assert_array_equal(found.lengths[:, 0], [1, 2, 5, 0, 8])
    for b, row in enumerate(ROWS):
        if limits[b]:
            (tokens,) = toy.as_tuples(found, b)
            assert tokens == toy.greedy_oracle(table, row, min(limits[b], 8))
    assert found.scores[3, 0] == -jnp.inf and (found.tokens[3] == toy.PAD).all()


def test_eos_at_the_first_step_ends_the_loop():
    table = toy.toy_table(7)
    table[:, toy.EOS] = 50.0
    calls = []

    def step(tokens, cache):
        jax.debug.callback(lambda: calls.append(1))
        return toy.toy_step(table)(tokens, cache)

    found = greedy_search(
        step, toy.toy_cache(ROWS, 1), batch_size=len(ROWS), max_length=8, **toy.SPECIAL
    )
    jax.effects_barrier()
    assert len(calls) == 1
    np.testing.assert_array_equal(found.tokens[:, 0, 0], toy.EOS)
    np.testing.assert_array_equal(found.lengths, 1)


def test_a_row_alone_equals_the_row_in_a_batch():
    table = toy.toy_table(9, spread=1.0)
    together = _search(table, ROWS)
    for b, row in enumerate(ROWS):
        alone = _search(table, [row])
        jax.tree.map(
            lambda x, y, b=b: np.testing.assert_array_equal(x[b], y[0]), together, alone
        )


def test_forbidden_tokens_are_never_emitted():
    table = toy.toy_table(7, spread=0.5)
    table[:, [toy.PAD, toy.BOS, 5]] = 9.0
    found = _search(table, ROWS, forbidden=(5,))
    assert not np.isin(found.tokens[:, 0, 0], [toy.PAD, toy.BOS, 5]).any()
    assert not (found.tokens == toy.BOS).any() and not (found.tokens == 5).any()


def test_a_model_that_allows_nothing_gives_an_empty_result_without_nan():
    found = _search(np.full((toy.STATES, 5), -np.inf, np.float32), ROWS)
    np.testing.assert_array_equal(found.scores, -np.inf)
    np.testing.assert_array_equal(found.lengths, 0)
    np.testing.assert_array_equal(found.tokens, toy.PAD)


def test_bfloat16_logits_are_scored_in_float32():
    step = toy.toy_step(toy.toy_table(7))

    def half(tokens, cache):
        logits, cache = step(tokens, cache)
        return logits.astype(jnp.bfloat16), cache

    found = greedy_search(
        half, toy.toy_cache(ROWS, 1), batch_size=5, max_length=8, **toy.SPECIAL
    )
    assert found.scores.dtype == found.log_probs.dtype == jnp.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 0}, "max_length must be at least 1; got 0"),
        ({"eos": toy.PAD}, "eos must differ from pad"),
        ({"forbidden": (toy.EOS,)}, "eos must differ"),
        ({"bos": -1}, "at least 0"),
        ({"eos": 7}, "below V = 7"),
        (
            {"limit": np.ones((5, 1), np.int32)},
            r"limit must be integers of shape \(B,\) = \(5,\)",
        ),
        ({"limit": np.ones(5, np.float32)}, "limit must be integers"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        _search(toy.toy_table(7), ROWS, **options)


def test_eos_may_start_a_target_as_in_fairseq():
    table = toy.toy_table(7)
    found = _search(table, ROWS, bos=toy.EOS, length_penalty=power(0.0))
    assert (found.lengths > 0).all() and (found.scores > -jnp.inf).all()
