import sys
import types

import pytest

from qkv_jax.data import DataError, HubData, read_hub

ROWS = {
    "train": [{"translation": {"en": "dog", "de": "Hund"}}],
    "validation": [{"en": "cat", "de": "Katze"}],
    "empty": [],
}


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the datasets library that records how it was called."""
    calls = []

    def load_dataset(name, config=None, *, split):
        calls.append((name, config, split))
        if split not in ROWS:
            raise ValueError(f'Unknown split "{split}".\nShould be one of ...')
        return ROWS[split]

    fake = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return calls


def test_rows_and_nested_rows_are_read_by_language(hub):
    pairs = read_hub("org/set", "train", languages=("de", "en"), config="de-en")
    assert pairs == [("Hund", "dog")]
    assert hub == [("org/set", "de-en", "train")]


def test_settings_name_the_splits(hub):
    corpus = HubData(name="org/set", test=None).load()
    assert corpus.train == [("dog", "Hund")]
    assert corpus.valid == [("cat", "Katze")]
    assert corpus.test == []


@pytest.mark.parametrize(
    ("split", "languages", "message"),
    [
        ("nope", ("en", "de"), r'org/set, split nope: Unknown split "nope"\.$'),
        ("empty", ("en", "de"), "split empty holds no sentences"),
        ("train", ("en", "fr"), "split train, row 0: expected text under en and fr"),
    ],
)
def test_what_is_not_to_be_had_is_one_clear_line(hub, split, languages, message):
    with pytest.raises(DataError, match=message):
        read_hub("org/set", split, languages=languages)


def test_without_the_library_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'qkv_jax\[hub\]'"):
        read_hub("org/set")
