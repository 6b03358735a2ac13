import random

import numpy as np
import pytest
from sacrebleu.metrics import CHRF

from qkv_jax.decoding import chrf, minimum_bayes_risk

TEXTS = [
    "",
    " ",
    "a",
    "ab cd",
    "abcd",
    "aaaa aa",
    "Hello,  wörld!",
    "hello world",
    "x" * 40,
]
TEXTS += [
    "Ein Haus steht am See.",
    "Am See steht ein Haus.",
    "\u4f60\u597d\u3000\u4e16\u754c",
]


def _reference(hypotheses, references, **options):
    metric = CHRF(**options)
    return np.array(
        [[metric.sentence_score(h, [r]).score for r in references] for h in hypotheses]
    )


def _random_texts(count, words=25, seed=0):
    rng = random.Random(seed)
    vocabulary = [
        "".join(rng.choices("abcdefghij", k=rng.randint(1, 9))) for _ in range(50)
    ]
    return [" ".join(rng.choices(vocabulary, k=words)) for _ in range(count)]


def test_chrf_is_sacrebleus():
    np.testing.assert_allclose(chrf(TEXTS, TEXTS), _reference(TEXTS, TEXTS), 1e-12)
    mixed = [*_random_texts(6), *TEXTS[:5]]
    np.testing.assert_allclose(chrf(mixed, TEXTS), _reference(mixed, TEXTS), 1e-12)


@pytest.mark.parametrize(("order", "beta"), [(1, 1), (4, 3), (9, 2)])
def test_chrf_takes_other_orders_and_weights(order, beta):
    want = _reference(TEXTS, TEXTS, char_order=order, beta=beta)
    np.testing.assert_allclose(chrf(TEXTS, TEXTS, order=order, beta=beta), want, 1e-12)


def test_the_text_most_like_the_others_wins():
    texts = ["ein Haus am See", "ein Haus am Meer", "drei Autos", "ein Haus am See."]
    found = minimum_bayes_risk(texts)
    want = _reference(texts, texts).mean(axis=1)
    np.testing.assert_allclose(found.utilities, want, 1e-12)
    np.testing.assert_array_equal(found.order, np.argsort(-want))
    assert found.order[0] == 3 and found.order[-1] == 2


def test_a_repeated_sample_counts_as_often_as_it_was_drawn():
    texts = ["eins zwei drei", "vier sechs", "vier sechs", "vier sechs", "eins zwei"]
    found = minimum_bayes_risk(texts)
    np.testing.assert_array_equal(found.order[:3], [1, 2, 3])
    assert len(set(found.utilities[1:4])) == 1


def test_references_and_utility_can_be_given():
    length = lambda hypotheses, references: (
        -np.abs(np.array([[len(h) - len(r) for r in references] for h in hypotheses]))
    )
    found = minimum_bayes_risk(
        ["aaaaaa", "a", "aaa"], references=["bbb", "bb"], utility=length
    )
    np.testing.assert_array_equal(found.order, [2, 1, 0])
    np.testing.assert_allclose(found.utilities, [-3.5, -1.5, -0.5])


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="must not be empty; got 0 and 2"):
        minimum_bayes_risk([], references=["a", "b"])
    with pytest.raises(ValueError, match=r"utility must return \(N, R\) = \(2, 2\)"):
        minimum_bayes_risk(["a", "b"], utility=lambda h, r: np.zeros(2))
