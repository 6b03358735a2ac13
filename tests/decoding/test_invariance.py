"""A real model's outputs do not depend on the batch, its order or the bucket; one compilation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax.decoding import (
    Constraints,
    beam_search,
    greedy_search,
    sample,
    score_targets,
)
from qkv_jax.models.seq2seq import Config, Model
from tests.decoding import toy

B, S, V, STEPS = 5, 9, 23, 10
RULES = Constraints(
    min_length=3,
    no_repeat_ngram=2,
    repetition_penalty=1.2,
    banned_phrases=((7, 8), (9,)),
)
PHRASES = np.array([[[5, 6], [4, -1]], [[8, 8], [-1, -1]], [[-1, -1]] * 2] * 2)[:B]
SEARCHES = {
    "greedy": (greedy_search, 1, {"constraints": RULES}),
    "beam": (functools.partial(beam_search, beams=3), 3, {"constraints": RULES}),
    "phrases": (functools.partial(beam_search, beams=3), 3, {}),
    "sample": (functools.partial(sample, samples=3, top_p=0.9, temperature=1.5), 3, {}),
}


@functools.cache
def _model():
    config = Config(
        vocabulary=V, d_model=16, d_ff=24, heads=2, encoder_layers=1, decoder_layers=2
    )
    model = Model(config, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    state = jax.tree.map(lambda x: 3.0 * x, state)
    return nnx.merge(graph, state)


def _source():
    rng = np.random.default_rng(0)
    lengths = np.array([S, 3, 1, 6, 8])[:, None]
    source = rng.integers(3, V, (B, S))
    return np.where(np.arange(S) < lengths, source, toy.PAD).astype(np.int32)


@functools.cache
def _program(name):
    search, hypotheses, options = SEARCHES[name]
    model = _model()

    def run(source, ids, prefix, phrases, limit):
        options_ = dict(options)
        if name == "sample":
            options_ |= {"rng": jax.random.key(3), "row_ids": ids}
        if name == "phrases":
            options_ |= {"phrases": phrases}
        memory, lengths = model.encode(source)
        cache = model.init_cache(memory, lengths, hypotheses=hypotheses, steps=STEPS)
        arguments = {"batch_size": len(source), "max_length": STEPS} | toy.SPECIAL
        arguments |= {"prefix": prefix, "limit": limit} | options_
        return search(model.decode_step, cache, **arguments)

    return jax.jit(run)


def _search(name, rows, *, width=S, source=None):
    source = _source() if source is None else source
    source = np.pad(source, ((0, 0), (0, width - S)))[rows]
    ids, prefix = np.arange(B)[rows], np.array([[-1], [5], [-1], [6], [4]])[rows]
    limit = np.array([10, 8, 9, 10, 7])[rows]
    return _program(name)(source, ids, prefix, PHRASES[rows], limit)


@pytest.mark.parametrize("name", SEARCHES)
def test_a_sentence_is_the_same_in_any_batch_order_and_bucket(name):
    together = _search(name, np.arange(B))
    order = np.array([3, 0, 4, 2, 1])
    for rows, width in ((order, S), (np.array([2]), S), (order, 16)):
        found = _search(name, rows, width=width)
        np.testing.assert_array_equal(found.tokens, together.tokens[rows])
        for field in ("log_probs", "scores"):
            want = getattr(together, field)[rows]
            np.testing.assert_allclose(getattr(found, field), want, 1e-5, 1e-5)
    assert (together.lengths[:, 0] > 0).all()
    assert len({tuple(x) for x in together.tokens[:, 0].tolist()}) == B


@pytest.mark.parametrize("name", SEARCHES)
def test_other_sentences_prefixes_phrases_and_limits_compile_nothing(name):
    traces = []

    def traced(*arguments):
        traces.append(name)
        return _program(name).__wrapped__(*arguments)

    jitted = jax.jit(traced)
    for shift in range(3):
        source = np.where(_source() > 0, (_source() + shift) % (V - 3) + 3, 0)
        prefix = np.full((B, 1), 4 + shift)
        phrases = np.where(PHRASES > 0, PHRASES + shift, -1)
        jitted(source, np.arange(B) + shift, prefix, phrases, np.full(B, 7 + shift))
    assert len(traces) == 1


@pytest.mark.parametrize("name", SEARCHES)
def test_a_models_search_says_what_teacher_forcing_says(name):
    found, source = _search(name, np.arange(B)), _source()
    prefix = jnp.array([[-1], [5], [-1], [6], [4]])
    for z in range(SEARCHES[name][1]):
        targets = found.tokens[:, z]
        shifted = jnp.pad(targets[:, :-1], ((0, 0), (1, 0)), constant_values=toy.BOS)
        logits = _model()(source, shifted)
        scores = score_targets(logits, targets, pad=toy.PAD, prefix=prefix)
        there = np.asarray(found.lengths[:, z]) > 0
        want = found.log_probs[there, z]
        np.testing.assert_allclose(scores.log_probs[there], want, 1e-5, 1e-5)
