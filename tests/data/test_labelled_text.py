"""Texts with labels: what becomes of words, how parts are drawn, and what is refused."""

import zipfile

import numpy as np
import pytest

from qkv_jax.data import DataError, LabelledCsv, LabelledDocuments, WordFeatures
from qkv_jax.data.labelled_text import CLS, PAD, SPECIAL, UNK, words_of

WORDS = WordFeatures(length=6)
LETTERS = WordFeatures(length=4, letters=(3, 3), buckets=50, most=3)


def write_csv(directory, **files):
    for name, lines in files.items():
        path = directory / f"{name}.csv"
        path.write_text("\n".join(["text,label", *lines]) + "\n", encoding="utf-8")
    return LabelledCsv(directory=directory, features=WORDS, valid_share=0.0)


def write_documents(directory, count=20):
    for number in range(count):
        kind = "good" if number % 2 else "bad"
        path = directory / "reviews" / kind / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"film {number} is {kind}", encoding="utf-8")
    return LabelledDocuments(path=directory, features=WORDS)


def test_words_and_marks_stand_apart_in_lower_case():
    assert words_of("Why ISN'T my card here?!") == [
        *("why", "isn't", "my", "card", "here", "?", "!")
    ]


def test_a_text_is_a_class_token_and_its_words_cut_and_padded():
    vocabulary = WORDS.vocabulary(["b a", "b c b"])
    assert vocabulary == {"b": SPECIAL, "a": SPECIAL + 1, "c": SPECIAL + 2}
    arrays = WORDS.encode(["a b new", "", "c " * 9], vocabulary)
    a, b, c = (vocabulary[word] for word in "abc")
    assert arrays["tokens"][..., 0].tolist() == [
        [CLS, a, b, UNK, PAD, PAD],
        [CLS, PAD, PAD, PAD, PAD, PAD],
        [CLS, c, c, c, c, c],
    ]
    assert arrays["lengths"].tolist() == [4, 1, 6]


def test_rare_words_have_no_number():
    features = WordFeatures(length=6, least=2)
    assert features.vocabulary(["a b", "a"]) == {"a": SPECIAL}


def test_a_new_word_shares_letters_with_those_that_are_known():
    tokens = LETTERS.encode(["cards", "cardz"], {"cards": SPECIAL})["tokens"][:, 1]
    assert tokens[:, 0].tolist() == [SPECIAL, UNK]
    assert tokens[0, 1:].tolist() == tokens[1, 1:].tolist()
    assert (tokens[:, 1:] > SPECIAL).all() and (tokens < SPECIAL + 1 + 50).all()
    assert tokens[0, 1] == SPECIAL + 1 + 24  # The CRC-32 of "<ca", in any process.


def test_csv_files_give_numbered_classes_and_a_part_to_validate_on(tmp_path):
    lines = [f'"word{i}, yes",{"xy"[i % 2]}' for i in range(10)]
    reader = write_csv(tmp_path, train=lines, test=["word1,y", "other,x"])
    found = reader.load()
    assert found.names == ("x", "y") and found.test["labels"].tolist() == [1, 0]
    assert found.sizes == {"classes": 2, "vocabulary": SPECIAL + 12}
    assert len(found.train["labels"]) == 10 and not len(found.valid["labels"])
    held = LabelledCsv(directory=tmp_path, features=WORDS, valid_share=0.3).load()
    assert [len(part["labels"]) for part in (held.train, held.valid)] == [7, 3]


def test_documents_are_drawn_by_seed_alike_from_a_folder_and_a_zip(tmp_path):
    reader = write_documents(tmp_path / "folder")
    with zipfile.ZipFile(tmp_path / "reviews.zip", "w") as archive:
        for file in sorted((tmp_path / "folder").rglob("*.txt"), reverse=True):
            archive.write(file, file.relative_to(tmp_path / "folder"))
        archive.writestr("reviews/README", "not a review")
    packed = LabelledDocuments(path=tmp_path / "reviews.zip", features=WORDS)
    one, other = reader.load(), packed.load()
    assert one.names == ("bad", "good")
    for name, count in (("train", 14), ("valid", 2), ("test", 4)):
        part = getattr(one, name)
        assert len(part["labels"]) == count
        np.testing.assert_array_equal(part["tokens"], getattr(other, name)["tokens"])


def test_what_is_validated_on_changes_nothing_about_the_test_part(tmp_path):
    write_documents(tmp_path)
    labels = [
        LabelledDocuments(path=tmp_path, features=WORDS, valid_share=share).load().test
        for share in (0.0, 0.3)
    ]
    np.testing.assert_array_equal(labels[0]["labels"], labels[1]["labels"])


def test_a_csv_file_that_does_not_fit_is_an_error_that_names_it(tmp_path):
    reader = write_csv(tmp_path, train=["a,x"], test=["a,z"])
    with pytest.raises(DataError, match="no example to train on has the label 'z'"):
        reader.load()
    with pytest.raises(DataError, match="train.csv has no column 'kind', but 'text'"):
        LabelledCsv(directory=tmp_path, features=WORDS, label="kind").load()
    with pytest.raises(DataError, match="tset.csv does not exist"):
        LabelledCsv(directory=tmp_path, features=WORDS, test="tset.csv").load()
    with pytest.raises(DataError, match="train.csv, example 1: a column is empty"):
        write_csv(tmp_path, train=["a"], test=["a,x"]).load()
    with pytest.raises(DataError, match="test.csv holds a header and no example"):
        write_csv(tmp_path, train=["a,x"], test=[]).load()


def test_documents_that_are_not_there_are_an_error_that_names_the_path(tmp_path):
    with pytest.raises(DataError, match="reviews.zip does not exist"):
        LabelledDocuments(path=tmp_path / "reviews.zip", features=WORDS).load()
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match="a.txt is neither a directory nor a zip file"):
        LabelledDocuments(path=tmp_path / "a.txt", features=WORDS).load()
    with pytest.raises(DataError, match=r"two classes or more; found 0 such files"):
        LabelledDocuments(path=tmp_path, features=WORDS).load()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WordFeatures(length=1), "length must be at least 2"),
        (lambda: WordFeatures(length=9, letters=(3, 4)), "buckets and most positive"),
        (
            lambda: LabelledDocuments(path=".", features=WORDS, valid_share=0.9),  # type: ignore[arg-type]
            "their sum below 1",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
