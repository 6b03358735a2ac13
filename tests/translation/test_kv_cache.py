"""Searches whose keys and values are remembered in int8."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax.models import recurrent, seq2seq
from qkv_jax.training import RunError
from qkv_jax.translation import DecodingConfig, load_run, search
from qkv_jax.translation.models import init_params, model_graph
from tests.translation import toy

B, S, STEPS = 4, 12, 20
CONFIG = seq2seq.Config(
    vocabulary=32, d_model=64, d_ff=64, heads=2, encoder_layers=1, decoder_layers=1
)
IDS = search.Ids(start=1, eos=2, pad=0, never=(0, 1))
SEARCHES = {
    "greedy": {"beams": 1},
    "beam": {"beams": 3},
    "sample": {"beams": 1, "samples": 3},
}


def graph_and_params(config=CONFIG):
    return model_graph(config), init_params(config, seed=0)


def source():
    rows = np.random.default_rng(0).integers(3, 32, (B, S)).astype(np.int32)
    return np.where(np.arange(S) < np.array([S, 5, 9, 2])[:, None], rows, 0)


def options(config=CONFIG, **decoding):
    graph, params = graph_and_params(config)
    given = ((params,), source(), None, None, jax.random.key(0), np.arange(B))
    return given, {
        "graphs": (graph,),
        "ids": IDS,
        "decoding": DecodingConfig(**decoding),
        "banned": (),
        "longest": STEPS,
    }


@jax.jit
def float_log_probs(tokens):
    """What the model gives to tokens (B, Z, T) at once, without a cache: (B, Z)."""
    graph, params = graph_and_params()
    rows = tokens.reshape(-1, STEPS)
    sources = jnp.repeat(source(), tokens.shape[1], axis=0)
    logits = nnx.merge(graph, params)(sources, search.shift(rows, IDS.start))
    log_probs = jax.nn.log_softmax(logits)
    each = jnp.take_along_axis(log_probs, rows[..., None], axis=-1)[..., 0]
    return jnp.where(rows != IDS.pad, each, 0.0).sum(-1).reshape(tokens.shape[:2])


@pytest.mark.parametrize("name", SEARCHES)
def test_what_is_found_is_scored_about_as_floats_score_it(name):
    """After all reorderings: a scale that is left behind would be another token's."""
    given, static = options(**SEARCHES[name], kv_cache="int8")
    found = search.search(*given, **static)
    wanted = float_log_probs(found.tokens)
    assert found.tokens.shape == (B, 1 if name == "greedy" else 3, STEPS)
    np.testing.assert_allclose(found.log_probs, wanted, atol=0.05, rtol=5e-3)
    assert np.abs(found.log_probs - wanted).max() > 1e-4  # The numbers are others.


def held(dtype):
    graph, params = graph_and_params()

    def cache(params, source):
        model = nnx.merge(graph, params)
        made = model.encode(source)
        return model.init_cache(*made, hypotheses=3, steps=STEPS, dtype=dtype)

    found = jax.eval_shape(cache, params, source())
    return {
        part: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(caches))
        for part, caches in (("own", found.layers), ("source", found.memory))
    }


def test_keys_and_values_take_a_little_more_than_a_quarter_of_the_bytes():
    floats, int8 = held(None), held(jnp.int8)
    # Heads of 32: 32 bytes and a scale of 4, where float32 has 128.
    assert {n: int8[n] / floats[n] for n in floats} == {
        "own": 0.28125,
        "source": 0.28125,
    }


def test_the_compiled_search_takes_less_memory():
    @functools.cache
    def taken(kind):
        # XLA on a CPU has floats of a layer at a time, so there have to be several.
        deep = dataclasses.replace(CONFIG, decoder_layers=4)
        (params, rows, *_), static = options(deep, beams=4, kv_cache=kind)
        rows = np.tile(rows, (8, 8))
        given = (params, rows, None, None, None, None)
        static["longest"] = 150
        compiled = search.search.lower(*given, **static).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = taken("int8"), taken("float")
    assert small < 0.8 * large


def test_a_run_translates_with_it_where_it_is_asked_for(finished):
    rounded, floats = load_run(finished, kv_cache="int8"), load_run(finished)
    assert rounded.decoding.kv_cache == "int8"
    sentences = ["one two three", "nine"]
    ours, theirs = (
        [best[0].score for best in each(sentences)] for each in (rounded, floats)
    )
    np.testing.assert_allclose(ours, theirs, atol=0.05)
    assert ours != theirs


def test_a_recurrent_model_has_no_such_cache(corpus, finished, tmp_path):
    with pytest.raises(ValueError, match="kv_cache 'int8' is of the Transformer"):
        toy.make_config(
            corpus,
            tmp_path,
            model=recurrent.Config(d_model=16),
            decoding=DecodingConfig(kv_cache="int8"),
        )
    with pytest.raises(ValueError, match="must be 'float' or 'int8'; got 'int4'"):
        DecodingConfig(kv_cache="int4")
    with pytest.raises(RunError, match="kv_cache must be"):
        load_run(finished, kv_cache="int4")
