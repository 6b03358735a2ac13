import random

import numpy as np
import pytest

import qkv_jax
from qkv_jax.data import EncodedPairs, Sentences, encode_sources
from qkv_jax.training import MeshConfig, make_mesh
from qkv_jax.training.distributed import fetch
from qkv_jax.translation import Wishes, load_run, load_translator
from qkv_jax.translation import translator as module
from qkv_jax.translation.alignment import align
from qkv_jax.translation.attention import pair_attention
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


def test_calls_of_many_sizes_share_compilations(finished, sentences):
    one = load_run(finished, mesh=make_mesh(MeshConfig(data=1)))
    before = module.search.search._cache_size()
    for count in (5, 6, 8, 7):
        one(sentences[:count])
    assert len(one.shapes) <= len(one.lengths)
    assert module.search.search._cache_size() - before <= len(one.shapes)


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


def test_long_sentences_are_cut_split_or_refused_and_counted(finished, translator):
    long = " ".join(toy.WORDS * 4)
    split, refuse = (load_run(finished, overlong=how) for how in ("split", "refuse"))
    assert split.too_long([long, "one"]) == refuse.too_long([long, "one"]) == 1
    assert refuse([long, "one"]) == [
        [module.Translation("", 0.0)],
        translator(["one"])[0],
    ]
    found = split([long], align=True)[0][0]
    parts = split._parts(long)
    assert len(parts) > 1 and " ".join(parts) == long
    assert found.text == " ".join(split([part])[0][0].text for part in parts)
    assert found.alignment.weights.shape == (len(found.text.split()), len(long.split()))


def test_scores_of_its_own_translations_are_those_it_gave(translator, sentences):
    encoded = encode_sources(sentences[:8], translator.tokenizer)
    found = fetch(translator.search(encoded.rows(np.arange(8), 24)))
    targets = [row[0, : n[0]].tolist() for row, n in zip(found.tokens, found.lengths)]
    again = translator.score_encoded(
        EncodedPairs(encoded, Sentences.from_lists(targets))
    )
    np.testing.assert_allclose([x.score for x in again], found.scores[:, 0], rtol=1e-5)
    np.testing.assert_allclose(
        [x.log_prob for x in again], found.log_probs[:, 0], rtol=1e-5
    )
    assert [x.tokens for x in again] == found.lengths[:, 0].tolist()


def test_scores_do_not_depend_on_company(translator, sentences):
    pairs = [(sentence, sentence) for sentence in sentences]
    together, alone = translator.score(pairs), [translator.score([p])[0] for p in pairs]
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    whole = translator.tokenizer.encode_target(sentences)
    longest = translator.decoding.max_length
    assert [one.tokens for one in together] == [min(len(x), longest) for x in whole]


def test_an_alignment_has_a_row_for_each_word(translator):
    source, target = translator.tokenizer.encode_source(["one two", "zero three four"])
    weights = np.random.default_rng(0).random((2, len(target) + 3, len(source) + 3))
    rows = [np.array([*row, 0, 0, 0]) for row in (source, target)]
    pair = pair_attention(translator.tokenizer, *rows, {"decoder.0.cross": weights})
    found = align(pair.weights["decoder.0.cross"], pair.source.text, pair.target.text)
    assert found.weights.shape == (3, 2)
    assert sorted(target for _, target in found.pairs) == [0, 1, 2]


def test_samples_are_of_the_seed_and_the_sentence(finished, sentences):
    drawn = load_run(finished, samples=4, top_k=20)
    first = texts(drawn(sentences, n_best=4))
    assert texts(drawn(sentences[::-1], n_best=4))[::-1] == first
    assert texts([drawn([s], n_best=4)[0] for s in sentences]) == first
    assert (
        texts(load_run(finished, samples=4, top_k=20, seed=1)(sentences, n_best=4))
        != first
    )
    assert any(len(set(four)) > 1 for four in first)


def test_minimum_risk_orders_the_samples(finished, sentences):
    risk = load_run(finished, samples=4, minimum_risk=True)
    drawn = texts(load_run(finished, samples=4)(sentences, n_best=4))
    for found, four in zip(risk(sentences, n_best=4), drawn):
        assert sorted(x.text for x in found) == sorted(four)
        scores = [x.score for x in found]
        assert scores == sorted(scores, reverse=True)


def test_wishes_are_fulfilled(translator, sentences):
    few = sentences[:3]
    wishes = Wishes(prefixes=["seven", "", "eight"], phrases=[[], ["nine"], []])
    found = [best[0].text for best in translator(few, wishes=wishes)]
    assert found[0].startswith("seven") and found[2].startswith("eight")
    assert "nine" in found[1]


def test_banned_tokens_are_not_emitted(translator, sentences):
    rows = encode_sources(sentences[:8], translator.tokenizer).rows(np.arange(8), 24)
    plain = fetch(translator.search(rows)).tokens
    first = int(plain[0, 0, 0])
    found = fetch(translator.search(rows, banned=((first,),))).tokens
    assert (plain == first).any() and not (found == first).any()
    assert translator(["one"], wishes=Wishes(banned=["nine"]))[0][0].text


def test_what_cannot_be_fulfilled_leaves_an_empty_translation(translator):
    long = Wishes(phrases=[[" ".join(toy.WORDS)], []])
    none, some = translator(["one", "two"], wishes=long)
    assert none == [module.Translation("", -np.inf)]
    assert some[0].score > -np.inf


def test_wishes_for_other_sentences_are_refused(translator):
    with pytest.raises(ValueError, match="prefixes must be one a sentence, 2; got 1"):
        translator(["one", "two"], wishes=Wishes(prefixes=["one"]))


def test_a_model_agrees_with_itself(finished, translator, sentences):
    twice = load_translator(finished, finished)
    assert texts(twice(sentences, n_best=2)) == texts(translator(sentences, n_best=2))
    pairs = list(zip(sentences, sentences))
    np.testing.assert_allclose(twice.score(pairs), translator.score(pairs), rtol=1e-5)


def test_one_call_translates(finished, translator, sentences):
    found = qkv_jax.translate(finished, sentences, n_best=2, align=True)
    assert texts(found) == texts(translator(sentences, n_best=2))
    assert all(best[0].alignment.pharaoh is not None for best in found)
    assert texts(qkv_jax.translate(translator, sentences)) == [
        best[:1] for best in texts(found)
    ]
    with pytest.raises(ValueError, match="a Translator keeps its decoding"):
        qkv_jax.translate(translator, sentences, beams=2)
