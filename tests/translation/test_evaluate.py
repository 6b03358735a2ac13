import pytest
import sacrebleu

from qkv_jax.translation import score

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


@pytest.mark.parametrize(("translations", "references"), [([], []), (["a"], [])])
def test_unequal_or_empty_sides_are_refused(translations, references):
    with pytest.raises(ValueError, match="equally many, and at least one; got"):
        score(translations, references)
