import random

import pytest

from qkv_jax.translation.overlong import split_text


def words(text):
    return len(text.split())


def test_a_text_that_fits_stays_whole():
    assert split_text("  a b c. d e f ", words, 6) == ["a b c. d e f"]


@pytest.mark.parametrize(
    "text, parts",
    [
        ("one two three. four five. six.", ["one two three.", "four five. six."]),
        ('one "two." three four five', ['one "two."', "three four five"]),
        ("one two, three four five", ["one two,", "three four five"]),
        ("one two three four five", ["one two three", "four five"]),
    ],
)
def test_a_text_is_parted_at_the_best_place_near_its_middle(text, parts):
    assert split_text(text, words, 4) == parts


def test_every_part_fits_and_no_word_is_lost():
    rng = random.Random(1)
    text = " ".join(rng.choices(["a", "bb.", "ccc,", "dddd"], k=1000))
    parts = split_text(text, words, 7)
    assert max(map(words, parts)) <= 7
    assert " ".join(parts).split() == text.split()


def test_a_word_without_any_space_is_parted_within():
    parts = split_text("x" * 100, len, 30)
    assert "".join(parts) == "x" * 100
    assert max(map(len, parts)) <= 30
