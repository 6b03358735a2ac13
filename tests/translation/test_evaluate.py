import json
import random
import sys
import types

import pytest
import sacrebleu

from qkv_jax.data import MultilingualData, ParallelData
from qkv_jax.translation import card, evaluate, score
from qkv_jax.translation.evaluate import score_by_target
from tests.translation.sacrebleu_program import run_sacrebleu, write

REFERENCES = ["A cat sits on the mat , quietly .", "There is one dog in the garden ."]
TRANSLATIONS = ["a cat sits on a mat , quietly .", "There is the dog in the garden !"]


def test_scores_are_sacrebleus_with_its_signatures():
    scores = score(TRANSLATIONS, REFERENCES)
    assert scores.bleu == sacrebleu.corpus_bleu(TRANSLATIONS, [REFERENCES]).score
    assert scores.chrf == sacrebleu.corpus_chrf(TRANSLATIONS, [REFERENCES]).score
    lower = [[line.lower() for line in side] for side in (TRANSLATIONS, REFERENCES)]
    expected = sacrebleu.corpus_bleu(lower[0], [lower[1]], tokenize="none", force=True)
    assert scores.bleu_lower_tokenized == expected.score
    assert "case:mixed|eff:no|tok:13a" in scores.signatures["bleu"]
    assert "case:lc|eff:no|tok:none" in scores.signatures["bleu_lower_tokenized"]
    assert "nw:0" in scores.signatures["chrf"]


def test_scores_and_signatures_are_those_of_sacrebleus_command_line(tmp_path):
    scores = score(TRANSLATIONS, REFERENCES, REFERENCES[::-1])
    sides = {"a": REFERENCES, "b": REFERENCES[::-1], "found": TRANSLATIONS}
    files = {name: write(tmp_path / name, lines) for name, lines in sides.items()}
    given = (files["a"], files["b"], "-i", files["found"], "-f", "json", "-m")
    usual = json.loads(run_sacrebleu(*given, "bleu", "chrf", "ter"))
    lower = ("-lc", "-tok", "none", "--force", "--chrf-word-order", "2")
    other = json.loads(run_sacrebleu(*given, "bleu", "chrf", *lower))
    names = ["bleu", "chrf", "ter", "bleu_lower_tokenized", "chrf_plus_plus"]
    for name, theirs in zip(names, [*usual, *other], strict=True):
        assert getattr(scores, name) == pytest.approx(theirs["score"], abs=1e-11)
        assert scores.signatures[name] == theirs["signature"]
    assert usual[0]["nrefs"] == "2"


def test_bleu_is_what_one_computes_by_hand():
    # Matches of n-grams, of 7: 6/7 words, 4/6 pairs, 2/5 triples, 1/4 of four; equal lengths.
    scores = score(["a b c d x f g"], ["a b c d e f g"])
    by_hand = 100 * (6 / 7 * 4 / 6 * 2 / 5 * 1 / 4) ** (1 / 4)
    assert scores.bleu == pytest.approx(by_hand)
    assert scores.length_ratio == 1.0


def test_a_perfect_translation_has_100():
    scores = score(REFERENCES, REFERENCES)
    assert [scores.bleu, scores.chrf] == pytest.approx([100.0, 100.0])


def test_only_the_lower_cased_score_is_blind_to_case():
    scores = score([line.upper() for line in REFERENCES], REFERENCES)
    assert scores.bleu < 50
    assert scores.bleu_lower_tokenized == pytest.approx(100.0)


def test_the_length_ratio_counts_tokens():
    assert score(["a b"], ["a b c d"]).length_ratio == 0.5


def test_exact_matches_are_counted_against_any_reference():
    scores = score(["a", "b ", "c"], ["a", "x", "x"], ["x", "b", "x"])
    assert scores.exact_match == pytest.approx(200 / 3)


def test_groups_of_lengths_are_scored_like_the_sentences_alone():
    sources = ["one two", "one two three", "one two three four"]
    references = [*REFERENCES, "So it is ."]
    translations = [*TRANSLATIONS, "So it was ."]
    scores = score(translations, references, sources=sources, lengths=(3, 4))
    assert scores.length_of == "source"
    assert [(x.least, x.most) for x in scores.by_length] == [(0, 2), (3, 3), (4, None)]
    alone = score(translations[1:2], references[1:2])
    assert scores.by_length[1].bleu == alone.bleu
    assert scores.by_length[1].chrf == alone.chrf
    assert scores.by_length[1].length_ratio == alone.length_ratio
    assert scores.to_json()["by_length"][2]["sentences"] == 1
    whole = score(translations, references, lengths=(9,))
    assert whole.length_of == "reference"
    assert [x.sentences for x in whole.by_length] == [2, 1]


def test_an_interval_is_that_of_sacrebleus_bootstrap():
    rng = random.Random(1)
    words = [rng.choices("abcdef", k=8) for _ in range(30)]
    references = [" ".join(line) for line in words]
    translations = [" ".join(sorted(line[:4]) + line[4:]) for line in words]
    scores = score(translations, references, resamples=200)
    theirs = sacrebleu.BLEU().corpus_score(translations, [references], n_bootstrap=200)
    assert scores.intervals["bleu"] == theirs._ci > 0
    assert "bs:200|seed:12345" in scores.signatures["bleu"]


@pytest.mark.parametrize(
    ("language", "expected"),
    [("de", None), ("zh", "zh"), ("zho_Hans", "zh"), (None, None), ("ja_XX", "char")],
)
def test_bleu_is_tokenised_by_the_target_language(monkeypatch, language, expected):
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: None)
    assert evaluate.bleu_tokenizer(language) == expected
    scores = score(["他 在 這裏"], ["他 在 這裏"], tokenize=expected)
    assert f"tok:{expected or '13a'}" in scores.signatures["bleu"]


def test_an_unknown_tokeniser_is_refused():
    with pytest.raises(ValueError, match="tokenize must be one of none, zh, 13a"):
        score(["a"], ["a"], tokenize="moses")


def test_comet_is_handed_sources_translations_and_references(monkeypatch):
    class Model:
        def predict(self, rows, **_):
            assert rows == [{"src": "s", "mt": "t", "ref": "r"}]
            return types.SimpleNamespace(system_score=0.5)

    comet = types.ModuleType("comet")
    comet.download_model = lambda name: f"{name}.ckpt"
    comet.load_from_checkpoint = {"wmt22.ckpt": Model()}.__getitem__
    monkeypatch.setitem(sys.modules, "comet", comet)
    assert evaluate.comet_score("wmt22", ["s"], ["t"], ["r"]) == 0.5


@pytest.mark.parametrize(("translations", "references"), [([], []), (["a"], [])])
def test_unequal_or_empty_sides_are_refused(translations, references):
    with pytest.raises(ValueError, match="equally many, and at least one; got"):
        score(translations, references)


def test_each_target_language_of_several_has_scores(tmp_path):
    corpus = MultilingualData(directory=tmp_path)
    pairs = [("<2de> a", "das ist gut so"), ("<2fr> a", "c'est bien comme ça")]
    found = score_by_target(corpus, pairs, ["das ist gut so", "tout à fait faux !"])
    assert {target: round(own.bleu) for target, own in found.items()} == {
        "de": 100,
        "fr": 0,
    }
    assert (
        score_by_target(ParallelData(directory=tmp_path), pairs, ["a b c d", "e f g h"])
        == {}
    )
    (section,) = card.by_target(found)
    assert "| de | 1 | 100.00 | 100.00 |" in section.text
