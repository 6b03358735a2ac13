"""Folders of pictures with captions: read, and refused with a line that says why."""

import json

import numpy as np
import pytest

from qkv_jax.data import DataError
from qkv_jax.data.captioned_images import CaptionedImages
from tests.tasks.emoji_toy import write


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QKV_JAX_CACHE", str(tmp_path / "cache"))


def reader(directory, **changes):
    given = {"languages": ("en", "de"), "styles": ("flat", "round"), "vocabulary": 290}
    return CaptionedImages(directory=directory, **given | changes)


def test_styles_and_languages_are_axes(tmp_path):
    splits = reader(write(tmp_path / "emoji")).load()
    assert splits.train["image"].shape == (12, 2, 16, 16, 3)
    assert splits.test["tokens"].shape == (2, 2, splits.sizes["longest"])
    assert splits.sizes["vocabulary"] == len(splits.names) == 292
    assert splits.names[-2:] == ("<en>", "<de>")


def test_a_caption_is_its_tag_its_pieces_and_an_end(tmp_path):
    splits = reader(write(tmp_path / "emoji")).load()
    tag, *pieces = splits.train["tokens"][1, 1]
    end = pieces.index(2)
    text = "".join(splits.names[token] for token in pieces[:end])
    assert tag == 291 and text.replace("▁", " ").strip() == "grün oben links"
    assert not any(pieces[end + 1 :])
    short = reader(tmp_path / "emoji", longest=4).load().train["tokens"]
    assert short.shape[2] == 4 and (short[:, :, 3] == 2).all()


def test_one_style_is_learnt_and_another_is_tested(tmp_path):
    data = reader(write(tmp_path / "emoji"), styles=("flat",), test_styles=("round",))
    splits = data.load()
    assert splits.train["image"].shape[1] == splits.test["image"].shape[1] == 1
    assert splits.train["image"].min() == 0 and splits.test["image"].min() == 60


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(DataError, match="emoji.jsonl.*--data.directory"):
        reader(tmp_path).load()
    directory = write(tmp_path / "emoji")
    with pytest.raises(DataError, match="oval_64.npz.*--data.styles"):
        reader(directory, styles=("oval",)).load()
    with pytest.raises(DataError, match="line 1: there is no 'name_fr'"):
        reader(directory, languages=("fr",)).load()
    np.savez(directory / "flat_64.npz", images=np.zeros((3, 8, 8, 3), np.uint8))
    with pytest.raises(DataError, match=r"must be \(16, height, .*got \(3, 8, 8, 3\)"):
        reader(directory).load()
    (directory / "emoji.jsonl").write_text(json.dumps({}) + "\nno json\n")
    with pytest.raises(DataError, match="no file of captions"):
        reader(directory).load()


@pytest.mark.parametrize("wrong", [{"languages": ()}, {"styles": ()}, {"longest": 2}])
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CaptionedImages(**wrong)
