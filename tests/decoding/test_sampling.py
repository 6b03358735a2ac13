import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax.decoding import Constraints, gnmt, greedy_search, sample
from tests.decoding import toy

ROWS = [3, 50, 12, 7, 88]


def _sample(table, rows, samples=3, *, rng=0, **options):
    rng = jax.random.key(rng) if isinstance(rng, int) else rng
    return toy.run(sample, table, rows, samples, samples=samples, rng=rng, **options)


def _same(x, y):
    np.testing.assert_array_equal(x.tokens, y.tokens)
    np.testing.assert_allclose(x.log_probs, y.log_probs, rtol=1e-6)


def _first_tokens(table, count=4000, **options):
    """Share of each token among the first of many samples of one row."""
    options = {"max_length": 1, "end_at_limit": False} | options
    found = _sample(table, [3], count, **options)
    return np.bincount(found.tokens[0, :, 0], minlength=table.shape[1]) / count


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_tokens_come_as_often_as_the_model_says(temperature):
    table = toy.toy_table(9, spread=1.0)
    shares = _first_tokens(table, temperature=temperature)
    logits = toy.log_probs_after(table, 3, ()) / temperature
    probs = np.exp(logits - np.logaddexp.reduce(logits))
    chi2 = 4000 * ((shares - probs)[probs > 0] ** 2 / probs[probs > 0]).sum()
    assert chi2 < 24.3  # 6 degrees of freedom: exceeded once in 2,000 seeds
    assert not shares[probs == 0].any()


def test_whole_samples_come_as_often_as_the_model_says():
    table = toy.toy_table(5, spread=0.5)
    found = _sample(table, [7], 4000, max_length=2)
    drawn = toy.as_tuples(found, 0)
    gains = toy.log_probs_after(table, 7, ())
    probs = np.exp(gains - np.logaddexp.reduce(gains))
    for first in (toy.EOS, 3, 4):
        share = np.mean([tokens[0] == first for tokens in drawn])
        assert abs(share - probs[first]) < 4 * 0.5 / np.sqrt(4000)


@pytest.mark.parametrize(
    ("options", "most"), [({"top_k": 2}, 2), ({"top_p": 0.4}, 3), ({"typical": 0.4}, 4)]
)
def test_a_part_of_the_distribution_keeps_its_proportions(options, most):
    table = toy.toy_table(9, spread=1.0)
    full, part = _first_tokens(table), _first_tokens(table, **options)
    kept = part > 0
    assert 1 <= kept.sum() <= most < (full > 0).sum()
    np.testing.assert_allclose(part[kept], full[kept] / full[kept].sum(), atol=0.04)


def test_truncations_compose():
    table = toy.toy_table(30, spread=0.7)
    both = _first_tokens(table, top_k=6, top_p=0.7) > 0
    single = [_first_tokens(table, **x) > 0 for x in ({"top_k": 6}, {"top_p": 0.7})]
    assert (both <= single[0]).all() and (both <= single[1]).all()
    assert both.sum() < min(x.sum() for x in single)


def test_samples_do_not_depend_on_the_batch_the_order_or_the_buffer():
    table, ids = toy.toy_table(70, spread=1.0), np.array([11, 4, 0, 7, 2])
    draw = functools.partial(_sample, table, top_p=0.95, temperature=1.2)
    together = draw(ROWS, row_ids=ids)
    order = [4, 2, 0, 1, 3]
    permuted = draw([ROWS[i] for i in order], row_ids=ids[order])
    wider = draw([*ROWS, 1, 2], row_ids=np.array([*ids, 90, 91]))
    limit = np.full(5, 6)
    longer = draw(ROWS, row_ids=ids, max_length=13, limit=limit)
    more = draw(ROWS, 5, row_ids=ids)
    for place, b in enumerate(order):
        np.testing.assert_array_equal(together.tokens[b], permuted.tokens[place])
        np.testing.assert_array_equal(together.tokens[b], wider.tokens[b])
        np.testing.assert_array_equal(together.tokens[b], longer.tokens[b, :, :6])
        np.testing.assert_array_equal(together.tokens[b], more.tokens[b, :3])
    alone = draw([ROWS[2]], row_ids=ids[2:3])
    np.testing.assert_array_equal(together.tokens[2], alone.tokens[0])


def test_noise_differs_between_seeds_rows_samples_and_steps():
    table = np.zeros((toy.STATES, 400), np.float32)
    table[:, toy.EOS] = -50.0
    found, again = (_sample(table, [3, 3], 3, max_length=9) for _ in range(2))
    other = _sample(table, [3, 3], 3, max_length=9, rng=1)
    free = np.asarray(found.tokens[..., :8])
    assert len(set(free.flatten().tolist())) > 40  # of 48; 45 are expected
    assert (free == other.tokens[..., :8]).mean() < 0.1
    _same(found, again)


@pytest.mark.parametrize("kind", ["rbg", "unsafe_rbg"])
def test_keys_of_any_kind_keep_rows_apart_from_the_batch(kind):
    table, rng = toy.toy_table(70, spread=1.0), jax.random.key(5, impl=kind)
    together = _sample(table, ROWS, rng=rng)
    alone = _sample(table, ROWS[2:3], rng=rng, row_ids=np.array([2]))
    np.testing.assert_array_equal(together.tokens[2], alone.tokens[0])


def test_log_probabilities_are_the_models_own():
    table = toy.toy_table(12)
    constraints = Constraints(repetition_penalty=2.0, min_length=2)
    options = {"temperature": 3.0, "top_k": 8, "constraints": constraints}
    found = _sample(table, ROWS, length_penalty=gnmt(0.6), **options)
    for b, row in enumerate(ROWS):
        want = [toy.log_prob(table, row, x) for x in toy.as_tuples(found, b)]
        np.testing.assert_allclose(found.log_probs[b], want, 2e-5)
    want = found.log_probs / ((5 + found.lengths) / 6) ** 0.6
    np.testing.assert_allclose(found.scores, want, rtol=1e-6)
    assert (found.lengths >= 3).all()


def test_one_likeliest_token_is_greedy_search():
    table = toy.toy_table(12)
    greedy = toy.run(greedy_search, table, ROWS, 1)
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        _same(_sample(table, ROWS, 1, **options), greedy)


def test_limits_prefixes_and_what_is_forbidden_hold():
    limit, prefix = np.array([1, 2, 6, 0, 99]), np.array([[-1]] * 2 + [[5]] * 3)
    table = toy.toy_table(9, spread=0.3)
    found = _sample(table, ROWS, 40, limit=limit, prefix=prefix, forbidden=(6,))
    lengths = np.asarray(found.lengths)
    assert (lengths <= np.minimum(limit, 6)[:, None]).all() and lengths.max() == 6
    assert not np.isin(found.tokens, [6, toy.BOS]).any()
    assert (found.tokens[[2, 4], :, 0] == 5).all() and (lengths[3] == 0).all()


def test_sampling_traces_once():
    table = toy.toy_table(11)

    def draw(rows, limit, ids, rng):
        cache, options = toy.toy_cache(rows, 3), {"samples": 3, "max_length": 6}
        options |= {"row_ids": ids, "limit": limit, "rng": rng} | toy.SPECIAL
        return sample(toy.toy_step(table), cache, batch_size=5, top_p=0.9, **options)

    jitted = jax.jit(chex.assert_max_traces(draw, n=1))
    for seed in range(3):
        limit = jnp.array([6, 2, 4, 3, 1]) + seed
        jitted(jnp.array(ROWS) + seed, limit, jnp.arange(5), jax.random.key(seed))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples must be at least 1; got 0"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\]; got 1.5"),
        ({"typical": 0.0}, r"typical must be in \(0, 1\]"),
        ({"row_ids": np.ones(4, int)}, r"row_ids must be integers of shape \(B,\)"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    options = {"samples": 2, "rng": jax.random.key(0)} | options
    with pytest.raises(ValueError, match=message):
        toy.run(sample, toy.toy_table(9), ROWS, 2, **options)
