import random

import numpy as np
import pytest

from qkv_jax.training import MeshConfig, make_mesh
from qkv_jax.translation import load_run
from qkv_jax.translation import translator as module
from tests.translation import toy

LAYERS = {
    "encoder.0.attention": ("source", "source"),
    "decoder.0.attention": ("shifted", "target"),
    "decoder.0.cross": ("source", "target"),
}


@pytest.fixture(scope="module")
def sentences():
    rng = random.Random(3)
    return [" ".join(rng.choices(toy.WORDS, k=rng.randint(1, 9))) for _ in range(11)]


def texts(results):
    return [[found.text for found in translations] for translations in results]


def test_order_and_company_do_not_change_a_translation(translator, sentences):
    together = translator(sentences, n_best=2)
    backwards = translator(sentences[::-1], n_best=2)[::-1]
    alone = [translator([sentence], n_best=2)[0] for sentence in sentences]
    assert texts(together) == texts(backwards) == texts(alone)
    scores = [found.score for translations in together for found in translations]
    others = [found.score for translations in alone for found in translations]
    np.testing.assert_allclose(scores, others, rtol=1e-5)


def test_the_size_of_batches_changes_nothing(finished, translator, sentences):
    wide = load_run(finished, batch_rows=16)
    assert texts(wide(sentences)) == texts(translator(sentences))


def test_calls_of_many_sizes_share_a_compilation(finished, sentences):
    one = load_run(finished, mesh=make_mesh(MeshConfig(data=1)))
    one(sentences[:5])
    compiled = module.search.search._cache_size()
    one(sentences[:6])
    one(sentences[:8])
    assert module.search.search._cache_size() == compiled


def test_a_blank_sentence_stays_blank(translator, sentences):
    results = translator(["", sentences[0], " \t", sentences[1]])
    assert results[0] == results[2] == [module.Translation("", 0.0)]
    assert results[1::2] == translator(sentences[:2])
    assert translator([]) == []


def test_the_n_best_are_distinct_and_sorted(translator, sentences):
    for found in translator(sentences, n_best=3):
        scores = [translation.score for translation in found]
        assert len(scores) == 3
        assert scores == sorted(scores, reverse=True)
        assert scores[0] < 0


def test_more_translations_than_beams_are_refused(translator):
    for n_best in (0, 4):
        with pytest.raises(ValueError, match=rf"1 .. beams = 3; got {n_best}"):
            translator(["one"], n_best=n_best)


def test_a_long_sentence_is_cut_and_counted(translator):
    long, longer = "one " * 40, "one " * 50
    assert translator.too_long(["one", long, "", longer]) == 2
    assert translator([long]) == translator([longer])


def test_one_beam_is_enough(finished, sentences):
    greedy = load_run(finished, beams=1)
    assert greedy.decoding.beams == 1
    assert [len(found) for found in greedy(sentences)] == [1] * len(sentences)


def test_a_translation_is_one_line(translator, monkeypatch):
    spelled = ["a\nb\r\nc" for _ in range(3)]
    monkeypatch.setattr(translator.tokenizer, "decode", lambda ids: spelled[: len(ids)])
    assert [found.text for found in translator(["one"], n_best=3)[0]] == ["a b c"] * 3


@pytest.mark.parametrize("layer", LAYERS)
def test_attention_has_a_row_for_each_token_that_asks(translator, layer):
    weights, looked_at, asks = translator.attention("one two three", layer=layer)
    assert weights.shape == (2, len(asks), len(looked_at))
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)
    for pieces, kind in zip((looked_at, asks), LAYERS[layer]):
        assert (pieces[0] == "<s>") == (kind == "shifted")
        if kind == "source":
            assert "".join(pieces) == "▁one▁two▁three</s>"


def test_attention_is_the_last_cross_attention_by_default(translator):
    chosen = translator.attention("one two", layer="decoder.0.cross")[0]
    np.testing.assert_array_equal(translator.attention("one two")[0], chosen)


def test_an_unknown_layer_is_refused(translator):
    with pytest.raises(ValueError, match="no attention layer 'decoder.9.cross'"):
        translator.attention("one", layer="decoder.9.cross")
