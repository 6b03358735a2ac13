"""Rules of decoding against `transformers`: the same hypotheses and scores under the same rules."""

import functools
import secrets

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from qkv_jax.decoding import (
    Constraints,
    beam_search,
    greedy_search,
    power,
    score_targets,
    truncation,
)
from qkv_jax.interop import load
from tests.peers.test_pretrained import draw_sizes, draw_source, make, run_ours

pytestmark = pytest.mark.peers

LONGEST = 14
RULES = {
    "none": ({}, {}),
    "min_length": ({"min_new_tokens": 6}, {"min_length": 6}),
    "unigrams": ({"no_repeat_ngram_size": 1}, {"no_repeat_ngram": 1}),
    "bigrams": ({"no_repeat_ngram_size": 2}, {"no_repeat_ngram": 2}),
    "trigrams": ({"no_repeat_ngram_size": 3}, {"no_repeat_ngram": 3}),
    "dearer": ({"repetition_penalty": 1.7}, {"repetition_penalty": 1.7}),
    "cheaper": ({"repetition_penalty": 0.7}, {"repetition_penalty": 0.7}),
}
RULES["all"] = tuple(
    {
        k: v
        for name in ("min_length", "trigrams", "dearer")
        for k, v in RULES[name][i].items()
    }
    for i in (0, 1)
)


MODELS = ("marian", "t5-gated", "m2m")
CASES = [("marian", rule) for rule in RULES]
CASES += [(model, rule) for model in MODELS[1:] for rule in ("none", "dearer", "all")]


@pytest.fixture(params=MODELS)
def pair(request, tmp_path):
    """Theirs, ours, and a source; the seed is printed."""
    seed = secrets.randbits(32)
    rng = np.random.default_rng(seed)
    sizes = draw_sizes(rng)
    print(f"seed {seed}: {request.param} {sizes}")
    torch.manual_seed(seed)
    theirs = make(request.param, sizes)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    return theirs, ours, *draw_source(rng, ours)


def search_theirs(theirs, ours, source, mask, beams, **rules):
    """Tokens (B, Z, M) and scores (B, Z), None for greedy search."""
    never = [i for i in {ours.config.pad, ours.start} if i != ours.eos]
    with torch.no_grad():
        found = theirs.generate(
            input_ids=torch.tensor(source, dtype=torch.long),
            attention_mask=torch.tensor(mask, dtype=torch.long),
            num_beams=beams,
            num_return_sequences=beams,
            early_stopping="never" if beams > 1 else False,
            length_penalty=0.8,
            max_new_tokens=LONGEST,
            suppress_tokens=never or None,
            do_sample=False,
            # Its cache fails for T5 with fewer encoder than decoder layers.
            use_cache=False,
            return_dict_in_generate=True,
            output_scores=True,
            **rules,
        )
    tokens = found.sequences[:, 1:].numpy().reshape(len(source), beams, -1)
    if beams == 1:
        return tokens, None
    return tokens, found.sequences_scores.numpy().reshape(len(source), beams)


def search_ours(ours, source, beams, **rules):
    model = ours.model()
    constraints = Constraints(**rules)

    @jax.jit
    def search(source):
        memory, lengths = model.encode(source)
        cache = model.init_cache(memory, lengths, hypotheses=beams, steps=LONGEST)
        options = {"length_penalty": power(0.8), "constraints": constraints}
        if ours.first is not None:
            options["prefix"] = jnp.full((len(source), 1), ours.first)
        method = greedy_search
        if beams > 1:
            method = functools.partial(beam_search, beams=beams)
        return method(
            model.decode_step,
            cache,
            batch_size=len(source),
            bos=ours.start,
            eos=ours.eos,
            pad=ours.config.pad,
            max_length=LONGEST,
            end_at_limit=False,
            **options,
        )

    return search(source)


def assert_same(found, tokens, scores, ours):
    """Every hypothesis of every row, those at the limit too."""
    for b, row in enumerate(tokens):
        for z, theirs in enumerate(row):
            length = int(found.lengths[b, z])
            assert np.asarray(found.tokens[b, z, :length]).tolist() == trim(
                theirs, ours
            )
    if scores is not None:
        np.testing.assert_allclose(found.scores, scores, rtol=2e-5, atol=2e-5)


def trim(tokens, ours):
    """Up to and with the first EOS."""
    tokens = tokens.tolist()
    return tokens[: tokens.index(ours.eos) + 1] if ours.eos in tokens else tokens


@pytest.mark.parametrize(("pair", "rule"), CASES, indirect=["pair"])
def test_rules_find_the_same(pair, rule):
    theirs, ours, source, mask = pair
    for beams in (1, 4):
        wanted = search_theirs(theirs, ours, source, mask, beams, **RULES[rule][0])
        found = search_ours(ours, source, beams, **RULES[rule][1])
        assert_same(found, *wanted, ours)


@pytest.mark.parametrize("beams", [1, 4])
def test_banned_phrases_find_the_same(pair, beams):
    theirs, ours, source, mask = pair
    free = search_ours(ours, source, beams, min_length=5)
    words = [[ours.config.vocabulary - 3]]
    for tokens in np.asarray(free.tokens[:, 0]).tolist():
        words += [tokens[1:3], tokens[2:5]]
    wanted = search_theirs(
        theirs, ours, source, mask, beams, bad_words_ids=words, min_new_tokens=5
    )
    found = search_ours(ours, source, beams, min_length=5, banned_phrases=words)
    assert_same(found, *wanted, ours)
    for before, after in zip(free.tokens[:, 0], found.tokens[:, 0]):
        assert not np.array_equal(before, after)


@pytest.mark.parametrize("beams", [1, 4])
def test_a_search_says_what_teacher_forcing_says(pair, beams):
    _, ours, source, _ = pair
    model, pad = ours.model(), ours.config.pad
    found = search_ours(ours, source, beams, repetition_penalty=1.3)
    prefix = None
    if ours.first is not None:
        prefix = jnp.full((len(source), 1), ours.first)
    for z in range(beams):
        targets = found.tokens[:, z]
        shifted = jnp.pad(targets[:, :-1], ((0, 0), (1, 0)), constant_values=ours.start)
        logits = run_ours(model, source, shifted)
        scores = score_targets(logits, targets, pad=pad, prefix=prefix)
        want = found.log_probs[:, z]
        np.testing.assert_allclose(scores.log_probs, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("warper", "ours"),
    [
        (lambda: transformers.TopKLogitsWarper(7), lambda x: truncation.top_k(x, 7)),
        (
            lambda: transformers.TopPLogitsWarper(0.8),
            lambda x: truncation.top_p(x, 0.8),
        ),
        (
            lambda: transformers.TypicalLogitsWarper(0.7),
            lambda x: truncation.typical(x, 0.7),
        ),
    ],
    ids=["top_k", "top_p", "typical"],
)
def test_the_same_tokens_may_be_drawn(warper, ours):
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    logits = 2.0 * np.random.default_rng(seed).normal(size=(50, 211)).astype(np.float32)
    wanted = warper()(None, torch.tensor(logits)).numpy()
    np.testing.assert_array_equal(ours(jnp.asarray(logits)), wanted)
