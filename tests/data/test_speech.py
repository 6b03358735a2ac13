"""The readers of speech: parts, units, rows; and what is wrong with a file."""

import numpy as np
import pytest

from qkv_jax.data import DataError
from qkv_jax.data.an4 import An4Data
from qkv_jax.data.fsdd import FsddData
from qkv_jax.data.utterances import train_units, utterance_rows
from tests.data.utterances import write_an4, write_fsdd


@pytest.fixture(scope="module")
def an4(tmp_path_factory):
    return write_an4(tmp_path_factory.mktemp("an4"))


@pytest.fixture(scope="module")
def fsdd(tmp_path_factory):
    return write_fsdd(tmp_path_factory.mktemp("fsdd") / "fsdd.npz")


@pytest.mark.parametrize(
    ("units", "pieces"),
    [
        ("characters", ["A", "▁", "B", "A"]),
        ("words", ["▁A", "▁BA"]),
        ("subwords", ["▁", "A", "▁BA"]),
    ],
)
def test_units_spell_a_transcript(units, pieces):
    tokenizer = train_units(["A BA", "BA A"], units, size=8)
    (ids,) = tokenizer.encode(["A BA"])
    assert tokenizer.pieces(ids) == pieces
    assert tokenizer.decode([ids]) == ["A BA"]


def test_units_that_are_none_are_refused():
    with pytest.raises(ValueError, match="units must be one of"):
        train_units(["A"], "phones")
    with pytest.raises(DataError, match="all are empty"):
        train_units([" "], "words")
    with pytest.raises(DataError, match="no subwords in 5 pieces"):
        train_units(["ABCDEFG"], "subwords", size=5)


def test_rows_are_padded_and_keep_text_that_units_lack():
    tokenizer = train_units(["A", "B"], "words")
    rows = utterance_rows([np.ones((2, 3)), np.ones((4, 3))], ["A", "B Ü"], tokenizer)
    assert rows["features"].shape == (2, 4, 3)
    assert rows["lengths"].tolist() == [2, 4]
    assert rows["features"][0, 2:].sum() == 0
    assert (rows["tokens"][1] == [tokenizer.encode(["B"])[0][0], 3]).all()
    assert bytes(rows["text"][1]).rstrip(b"\0").decode() == "B Ü"


def test_an4_holds_speakers_out_and_learns_units_from_the_others(an4):
    splits = An4Data(directory=an4, units="words", valid_speakers=1, mel=20).load()
    assert len(splits.train["lengths"]) == 9 and len(splits.valid["lengths"]) == 3
    assert len(splits.test["lengths"]) == 6
    assert splits.sizes == {"vocabulary": len(splits.names), "channels": 20}
    assert splits.train["lengths"].tolist() == [8, 16, 24] * 3
    other = An4Data(directory=an4, valid_speakers=1, mel=0, seed=1).load()
    assert other.sizes["channels"] == 13
    assert not np.array_equal(other.train["text"], splits.train["text"])


def test_fsdd_leaves_a_speaker_out(fsdd):
    settings = {"file": fsdd, "held_out": "bob", "mel": 12}
    splits = FsddData(**settings, valid_speaker="eve", speeds=(0.9, 1.0)).load()
    counts = [len(p["lengths"]) for p in (splits.train, splits.valid, splits.test)]
    assert counts == [80, 40, 40]
    assert splits.sizes == {"vocabulary": 14, "channels": 12}
    assert splits.train["tokens"].shape == (80, 1)
    slow, plain = splits.train["lengths"][:40], splits.train["lengths"][40:]
    assert (slow >= plain).all() and (slow > plain).any()


def test_fsdd_has_the_official_test_too(fsdd):
    splits = FsddData(file=fsdd, held_out=None, valid_share=0.25, mel=12).load()
    assert len(splits.test["lengths"]) == 60  # Index 3 and 4, of 3 to 6.
    assert len(splits.valid["lengths"]) == 15


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"held_out": "zoe"}, "held_out must be one of ann, bob, eve; got 'zoe'"),
        ({"held_out": "bob", "valid_speaker": "bob"}, "must not be held_out"),
        ({"held_out": "bob", "valid_share": 1.0}, "valid_share must be in"),
    ],
)
def test_wrong_options_of_fsdd_are_named(fsdd, changes, message):
    with pytest.raises(DataError, match=message):
        FsddData(file=fsdd, **changes).load()


def test_wrong_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere/an4_train.npz cannot be read"):
        An4Data(directory=tmp_path / "nowhere").load()
    (tmp_path / "text.npz").write_text("no zip")
    with pytest.raises(DataError, match=r"text.npz is no npz file"):
        FsddData(file=tmp_path / "text.npz").load()
    file = write_fsdd(tmp_path / "a.npz", label=np.zeros((2, 2)))
    with pytest.raises(DataError, match="'label' of 1 axes; found \\(2, 2\\)"):
        FsddData(file=file).load()
    file = write_fsdd(tmp_path / "b.npz", offsets=np.arange(121))
    with pytest.raises(DataError, match="'offsets' must rise from 0"):
        FsddData(file=file).load()
    directory = write_an4(tmp_path / "c", ids=np.array(["p1"] * 12))
    with pytest.raises(DataError, match="PART/SPEAKER/UTTERANCE"):
        An4Data(directory=directory).load()
    directory = write_an4(tmp_path / "d")
    with pytest.raises(DataError, match="leave some of the 4 speakers"):
        An4Data(directory=directory).load()
