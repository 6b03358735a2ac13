"""Several language pairs as one corpus: tags, turns, shares, and tokenizers that keep tags whole."""

import pytest

from qkv_jax.data import DataError, MultilingualData, train_tokenizer
from qkv_jax.data.multilingual import repeated


@pytest.fixture
def directory(tmp_path):
    for part, count in (("train", 6), ("valid", 2), ("test", 1)):
        for language in ("en", "de", "fr"):
            lines = [f"{language} {part} {i}\n" for i in range(count)]
            (tmp_path / f"{part}.{language}").write_text("".join(lines))
    return tmp_path


def test_a_tag_before_each_source_names_its_target_language(directory):
    corpus = MultilingualData(directory=directory).load()
    assert corpus.symbols == ("<2de>", "<2fr>")
    assert len(corpus.train) == 12
    assert corpus.train[0] == ("<2de> en train 0", "de train 0")
    assert corpus.train[6] == ("<2fr> en train 0", "fr train 0")


def test_held_out_pairs_take_turns(directory):
    valid = MultilingualData(directory=directory).load().valid
    assert [target for _, target in valid] == [
        "de valid 0",
        "fr valid 0",
        "de valid 1",
        "fr valid 1",
    ]


def test_one_target_language_needs_no_tag(directory):
    data = MultilingualData(directory=directory, pairs=(("de", "en"), ("fr", "en")))
    corpus = data.load()
    assert corpus.symbols == ()
    assert corpus.test == [("de test 0", "en test 0"), ("fr test 0", "en test 0")]


def test_smaller_corpora_are_repeated_as_the_temperature_says(directory):
    assert repeated([100, 25], 1.0) == [100, 25]
    assert repeated([100, 25], 2.0) == [100, 50]
    assert repeated([100, 25], 1e9) == [100, 100]
    (directory / "train.fr").write_text("a\nb\n")
    (directory / "train.en").write_text("x\ny\n")
    (directory / "train.de").write_text("x\ny\n")
    (directory / "train.nl").write_text("a\nb\n")
    pairs = (("en", "de"), ("en", "nl"))
    names = {"valid": (), "test": ()}
    corpus = MultilingualData(directory=directory, pairs=pairs, **names).load()
    assert len(corpus.train) == 4


def test_a_tag_is_one_piece_and_comes_before_every_source():
    texts = [f"word{i} and {'abcdefgh'[i % 8 :]} more" for i in range(40)]
    tokenizer = train_tokenizer(texts, vocab_size=285, symbols=["<2de>"])
    (ids,) = tokenizer.encode_source(["<2de> word1"])
    assert "<2de>" in tokenizer.pieces(ids)
    tagged = tokenizer.tagged("<2de>")
    assert tagged.encode_source(["word1"]) == [ids]
    assert tagged.encode_target(["word1"]) == tokenizer.encode_target(["word1"])
    assert tagged.digest == tokenizer.digest
    with pytest.raises(ValueError, match="no piece '<2fr>'"):
        tokenizer.tagged("<2fr>")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": ()}, "pairs must be different language pairs"),
        ({"pairs": (("en", "de"),) * 2}, "pairs must be different language pairs"),
        ({"temperature": 0.5}, "temperature must be at least 1"),
        ({"train": ()}, "train must be one or two names"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        MultilingualData(directory=tmp_path, **change)


def test_a_missing_language_is_named(directory):
    with pytest.raises(DataError, match="en and it"):
        MultilingualData(directory=directory, pairs=(("en", "it"),)).load()
