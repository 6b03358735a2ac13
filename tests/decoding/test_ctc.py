"""CTC's scores against all paths, enumerated."""

import itertools
from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax.decoding import (
    JointCache,
    PrefixCache,
    beam_search,
    ctc_greedy,
    joint_step,
    power,
    prefix_step,
)

EOS = 2
SETTINGS = {"bos": 1, "eos": EOS, "pad": 0, "length_penalty": power(0.0)}


def spelled(path):
    return tuple(unit for unit, _ in itertools.groupby(path) if unit)


def by_enumeration(log_probs):
    """Probability of everything that frames (T, V) can spell."""
    total = defaultdict(float)
    T, V = log_probs.shape
    for path in itertools.product(range(V), repeat=T):
        total[spelled(path)] += np.exp(log_probs[range(T), path].sum())
    return total


@pytest.fixture(scope="module")
def frames():
    """Logits (2, 5, 5) of 5 and 3 frames, which never spell BOS or EOS."""
    logits = 2.0 * jax.random.normal(jax.random.key(0), (2, 5, 5))
    return logits.at[..., 1:3].set(-40.0), jnp.array([5, 3])


@pytest.fixture(scope="module")
def totals(frames):
    logits, lengths = frames
    log_probs = np.asarray(jax.nn.log_softmax(logits), np.float64)
    return [by_enumeration(log_probs[b, :n]) for b, n in enumerate(lengths.tolist())]


def test_greedy_merges_repeats_and_drops_blanks():
    path = jnp.array([[3, 3, 0, 3, 4, 4], [0, 4, 4, 3, 3, 3]])
    got = ctc_greedy(jax.nn.one_hot(path, 5), jnp.array([6, 3]))
    assert got.tolist() == [[3, 3, 4, 0, 0, 0], [4, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("units", [(), (3,), (3, 3), (3, 4), (4, 4, 3)])
def test_gains_are_those_of_all_paths(frames, totals, units):
    step, cache = prefix_step(eos=EOS), PrefixCache.start(*frames, hypotheses=1)
    for token in (1, *units):
        gains, cache = step(jnp.full((2, 1), token), cache)
    for b, total in enumerate(totals):
        begins = [p for s, p in total.items() if s[: len(units)] == units]
        if not begins:
            continue
        assert np.exp(cache.prefix[b, 0]) == pytest.approx(sum(begins), rel=1e-4)
        for unit in (3, 4):
            longer = (*units, unit)
            wanted = sum(p for s, p in total.items() if s[: len(longer)] == longer)
            got = np.exp(gains.values[b, 0, unit] + cache.prefix[b, 0])
            assert got == pytest.approx(wanted, rel=1e-4, abs=1e-9)
        got = np.exp(gains.values[b, 0, EOS] + cache.prefix[b, 0])
        assert got == pytest.approx(total[units], rel=1e-4)


def test_prefix_beam_search_finds_what_all_paths_spell_likeliest(frames, totals):
    found = beam_search(
        prefix_step(eos=EOS),
        PrefixCache.start(*frames, hypotheses=4),
        batch_size=2,
        beams=4,
        max_length=6,
        **SETTINGS,
    )
    for b, total in enumerate(totals):
        best = max(total, key=total.get)
        tokens = found.tokens[b, 0].tolist()
        assert tuple(tokens[: tokens.index(EOS)]) == best
        assert np.exp(found.log_probs[b, 0]) == pytest.approx(total[best], rel=1e-4)


class Constant:
    """A decoder that always says the same, and has nothing to reorder."""

    def reorder(self, parents):
        return self


jax.tree_util.register_static(Constant)


def joint(frames, weight, says):
    def decoder(tokens, cache):
        return jnp.broadcast_to(jnp.array(says), (2, tokens.shape[1], 5)), cache

    return beam_search(
        joint_step(decoder, weight=weight, eos=EOS),
        JointCache(
            prefixes=PrefixCache.start(*frames, hypotheses=4), decoder=Constant()
        ),
        batch_size=2,
        beams=4,
        max_length=6,
        **SETTINGS,
    )


def test_a_joint_score_is_the_weighted_sum(frames, totals):
    says = np.log([0.0001, 0.0001, 0.1998, 0.2, 0.6])
    found = joint(frames, 0.7, says)
    for b, total in enumerate(totals):
        scores = {
            s: 0.7 * np.log(p) + 0.3 * (sum(says[u] for u in s) + says[EOS])
            for s, p in total.items()
            if not {1, 2} & set(s)
        }
        best = max(scores, key=scores.get)
        tokens = found.tokens[b, 0].tolist()
        assert tuple(tokens[: tokens.index(EOS)]) == best
        assert found.log_probs[b, 0] == pytest.approx(scores[best], rel=1e-4)


def test_a_weight_beyond_the_unit_interval_is_refused():
    with pytest.raises(ValueError, match="weight must be in"):
        joint_step(lambda tokens, cache: (tokens, cache), weight=1.5, eos=EOS)
