"""Error rates by hand."""

import numpy as np
import pytest

from qkv_jax.tasks.error_rates import ErrorRates, edit_distance, error_rates, spell


@pytest.mark.parametrize(
    ("first", "second", "edits"),
    [
        ("", "", 0),
        ("", "abc", 3),
        ("abc", "", 3),
        ("kitten", "sitting", 3),
        ("flaw", "lawn", 2),
        (["a", "b"], ["b"], 1),
        ("abcd", "badc", 3),
    ],
)
def test_edit_distance_by_hand(first, second, edits):
    assert edit_distance(first, second) == edits
    assert edit_distance(second, first) == edits


def test_rates_are_over_all_words_and_characters():
    rates = error_rates(["ONE TWO", "A"], ["ONE  TOO B", "A"])
    assert rates == {"wer": 100 * 2 / 3, "cer": 100 * 3 / 8, "exact": 50.0}


def test_nothing_heard_is_an_error_a_word():
    assert error_rates(["ONE TWO"], [""])["wer"] == 100.0


def test_no_words_have_no_rate():
    with pytest.raises(ValueError, match="no word"):
        error_rates([" "], ["A"])
    with pytest.raises(ValueError, match="as many"):
        error_rates(["A"], [])


def test_tokens_are_spelled_up_to_the_end(tmp_path):
    names = ("<pad>", "<s>", "</s>", "<unk>", "▁ON", "E", "▁")
    assert spell([4, 5, 6, 5, 2, 4], names) == "ONE E"
    text = np.zeros((1, 9), np.uint8)
    text[0, :5] = list(b"ONE E")
    tokens = np.array([[0, 4, 5, 6, 5, 0]])
    rates = ErrorRates()({"tokens": tokens}, {"text": text}, names)
    assert rates == {"wer": 0.0, "cer": 0.0, "exact": 100.0}
    ErrorRates().draw({"tokens": tokens}, {"text": text}, names, tmp_path)
    assert (tmp_path / "recognised.tsv").read_text("utf-8") == "ONE E\tONE E\n"
