import random
import stat

import pytest

from qkv_jax.data import BOS, EOS, PAD, UNK, DataError, Tokenizer, train_tokenizer
from qkv_jax.data import tokenizer as module

_RNG = random.Random(0)
WORDS = [
    "".join(_RNG.choices(("ba", "l", "ein", "the", "mann", "o", "s", "är"), k=count))
    for count in (1, 2, 3, 4)
    for _ in range(40)
]
TEXT = [" ".join([*_RNG.choices(WORDS, k=5), "."]) for _ in range(200)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(TEXT, vocab_size=320, directory=tmp_path_factory.mktemp("t"))


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_text_comes_back_as_it_was(tmp_path, model_type):
    tokenizer = train_tokenizer(
        TEXT, vocab_size=320, model_type=model_type, directory=tmp_path
    )
    assert tokenizer.vocab_size == 320
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_encoding_adds_no_special_ids_and_knows_no_unknown_text(tokenizer):
    text = ["ein 漢字 😀\u00a0Ärger…", "½ ﬁ", ""]
    encoded = tokenizer.encode(text)
    assert min(min(ids, default=99) for ids in encoded) > UNK
    assert tokenizer.decode(encoded) == text


def test_decoding_stops_at_the_end_and_leaves_special_ids_out(tokenizer):
    (ids,) = tokenizer.encode(["the mann ."])
    assert tokenizer.decode([[BOS, *ids, UNK, EOS, *ids, PAD]]) == ["the mann ."]
    with pytest.raises(ValueError, match="vocab_size = 320; got 320"):
        tokenizer.decode([[320]])


def test_pieces_name_every_id(tokenizer):
    (ids,) = tokenizer.encode(["the mann"])
    pieces = tokenizer.pieces([*ids, EOS, PAD])
    assert "".join(pieces[:-2]) == "▁the▁mann"
    assert pieces[-2:] == ["</s>", "<pad>"]


def test_identity_keeps_characters_that_nfkc_changes(tmp_path):
    settings = {"vocab_size": 320, "directory": tmp_path}
    keep = train_tokenizer(TEXT, **settings)
    unify = train_tokenizer(TEXT, normalization="nmt_nfkc", **settings)
    assert keep.decode(keep.encode(["a…"])) == ["a…"]
    assert unify.decode(unify.encode(["a…"])) == ["a..."]


def test_a_corpus_is_trained_on_once(tmp_path, monkeypatch):
    first = train_tokenizer(TEXT, vocab_size=300, directory=tmp_path)
    monkeypatch.setattr(module, "_train", lambda *_: pytest.fail("trained again"))
    second = train_tokenizer(list(TEXT), vocab_size=300, directory=tmp_path)
    assert second.digest == first.digest


def test_every_setting_and_the_corpus_make_another_model(tmp_path):
    base = {"sentences": TEXT, "vocab_size": 300}
    changes = [
        {},
        {"sentences": TEXT[1:]},
        {"sentences": [" ".join(TEXT[:2]), *TEXT[2:]]},
        {"vocab_size": 301},
        {"model_type": "bpe"},
        {"normalization": "nmt_nfkc"},
        {"character_coverage": 1.0},
    ]
    for change in changes:
        settings = base | change
        sentences = settings.pop("sentences")
        train_tokenizer(sentences, **settings, directory=tmp_path)
    assert len(list(tmp_path.iterdir())) == len(changes)


def test_training_is_deterministic(tmp_path):
    first, second = (
        train_tokenizer(TEXT, vocab_size=300, directory=tmp_path / name)
        for name in ("a", "b")
    )
    assert first.digest == second.digest


def test_a_damaged_cache_entry_is_replaced(tmp_path):
    first = train_tokenizer(TEXT, vocab_size=300, directory=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:1000])
    assert (
        train_tokenizer(TEXT, vocab_size=300, directory=tmp_path).digest == first.digest
    )
    assert Tokenizer.load(path).digest == first.digest


def test_the_cache_is_the_users_by_default(tmp_path, monkeypatch):
    monkeypatch.setenv("QKV_JAX_CACHE", str(tmp_path))
    train_tokenizer(TEXT, vocab_size=300)
    (path,) = (tmp_path / "tokenizers").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_a_vocabulary_of_impossible_size_is_refused_with_the_limit(
    tmp_path, model_type
):
    def train(size):
        return train_tokenizer(
            TEXT, vocab_size=size, model_type=model_type, directory=tmp_path
        )

    with pytest.raises(DataError, match="larger than this text supports") as error:
        train(9_000)
    largest = int(str(error.value).rsplit(maxsplit=1)[-1])
    assert train(largest).vocab_size == largest
    with pytest.raises(DataError, match=r"too small .* smallest possible is \d+"):
        train(100)
    assert len(list(tmp_path.iterdir())) == 1


def test_an_empty_corpus_is_refused(tmp_path):
    for sentences in ([], ["", " "]):
        with pytest.raises(DataError, match="the corpus is empty"):
            train_tokenizer(sentences, vocab_size=300, directory=tmp_path)


@pytest.mark.parametrize("name", ["model_type", "normalization"])
def test_an_unknown_choice_is_named(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} must be one of .*; got 'other'"):
        train_tokenizer(TEXT, vocab_size=300, directory=tmp_path, **{name: "other"})


def test_a_character_coverage_out_of_range_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"character_coverage .* 0\.98 to 1; got 0\.9"):
        train_tokenizer(
            TEXT, vocab_size=300, directory=tmp_path, character_coverage=0.9
        )


def test_a_saved_tokenizer_is_loaded_from_its_directory_or_file(tokenizer, tmp_path):
    path = tokenizer.save(tmp_path / "run" / "tokenizer")
    for place in (path, path.parent):
        assert Tokenizer.load(place).digest == tokenizer.digest
    assert [entry.name for entry in path.parent.iterdir()] == ["tokenizer.model"]


def test_a_missing_damaged_or_foreign_model_is_named(tmp_path, tokenizer):
    with pytest.raises(
        DataError, match=r"tokenizer .*a\.model cannot be read: No such"
    ):
        Tokenizer.load(tmp_path / "a.model")
    for content in (b"", tokenizer.save(tmp_path).read_bytes()[:500]):
        (tmp_path / "b.model").write_bytes(content)
        with pytest.raises(DataError, match=r"b\.model: .*was cut short"):
            Tokenizer.load(tmp_path / "b.model")


def test_a_model_with_other_special_ids_is_refused(tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_prefix=str(tmp_path / "c"),
        vocab_size=40,
        minloglevel=2,
    )
    with pytest.raises(DataError, match=r"at 0, 1, 2 and 3; got \(-1, 1, 2, 0\)"):
        Tokenizer.load(tmp_path / "c.model")


def test_training_is_silent(tmp_path, capfd):
    train_tokenizer(TEXT, vocab_size=300, directory=tmp_path)
    assert capfd.readouterr() == ("", "")
