"""What a tokeniser promises, and how it refuses; the ids are checked in tests/peers."""

import hashlib
import json
import sys

import pytest

from qkv_jax.data import train_tokenizer
from qkv_jax.interop import InteropError, load_tokenizer
from qkv_jax.interop.export import write_marian_tokenizer
from qkv_jax.interop.trained import Trained
from qkv_jax.models.seq2seq import Config
from tests.interop import toy


def load(directory, settings, source=None, target=None, *, generation=None, **options):
    return load_tokenizer(
        directory,
        family=settings["model_type"],
        settings=settings,
        generation=generation or {},
        source_language=source,
        target_language=target,
        **options,
    )


def test_ids_stand_where_the_family_has_them(tmp_path):
    tokenizer = load(tmp_path, toy.m2m_100(tmp_path), "en", "__de__")
    [source], [target] = (
        tokenizer.encode_source(["The dog"]),
        tokenizer.encode_target(["Der Hund"]),
    )
    assert tokenizer.source_pieces(source)[0] == "__en__"
    assert tokenizer.source_pieces(source)[-1] == "</s>"
    assert tokenizer.target_pieces(target)[0] == "__de__"
    assert tuple(target[:1]) == tokenizer.prefix and target[-1] == tokenizer.eos == 2
    assert (tokenizer.start, tokenizer.pad, tokenizer.unk) == (2, 1, 3)
    assert tokenizer.never == (1,)


def test_mbart_starts_targets_from_their_language(tmp_path):
    tokenizer = load(tmp_path, toy.mbart(tmp_path), "en_XX", "de_DE")
    assert tokenizer.target_pieces([tokenizer.start]) == ["de_DE"]
    assert tokenizer.prefix == ()
    assert tokenizer.source_pieces(tokenizer.source_ending) == ["</s>", "en_XX"]


def test_marian_pieces_have_ids_of_their_own_and_never_the_padding(tmp_path):
    tokenizer = load(tmp_path, settings := toy.marian(tmp_path))
    vocabulary = json.loads((tmp_path / "vocab.json").read_text("utf-8"))
    [ids] = tokenizer.encode_source(["The house"])
    assert ids == [vocabulary[x] for x in tokenizer.source_pieces(ids)]
    assert tokenizer.start == tokenizer.pad == settings["vocab_size"] - 1
    assert tokenizer.never == (tokenizer.pad,)


def test_decoding_ends_at_the_first_eos_and_leaves_special_ids_out(tmp_path):
    tokenizer = load(tmp_path, toy.nllb(tmp_path), "eng_Latn", "deu_Latn")
    [ids] = tokenizer.encode_target(["Der Hund"])
    longer = [ids[0], 1, 3, *ids[1:-1], ids[0], 2, *ids[1:]]
    assert tokenizer.decode([longer, ids[1:], [], [2, *ids]]) == [
        "Der Hund",
        "Der Hund",
        "",
        "",
    ]
    assert tokenizer.decode([[tokenizer.target_size - 1, *ids[1:]]]) == ["Der Hund"]
    assert tokenizer.target_pieces([tokenizer.target_size - 1]) == ["<unused>"]


def test_an_id_outside_the_vocabulary_is_an_error(tmp_path):
    tokenizer = load(tmp_path, toy.t5(tmp_path))
    for index in (-1, tokenizer.target_size):
        with pytest.raises(ValueError, match=f"target_size = .*; got {index}"):
            tokenizer.decode([[index]])


@pytest.mark.parametrize(
    "name", ["marian", "m2m_100", "nllb", "mbart", "mbart50", "t5"]
)
def test_saved_files_are_the_same_bytes_and_load_again(name, tmp_path):
    (tmp_path / "in").mkdir()
    settings = getattr(toy, name)(tmp_path / "in")
    codes = {"m2m_100": ("en", "de"), "nllb": ("eng_Latn", "deu_Latn")}
    codes |= dict.fromkeys(("mbart", "mbart50"), ("en_XX", "de_DE"))
    languages = codes.get(name, (None, None))
    tokenizer = load(tmp_path / "in", settings, *languages)
    tokenizer.save(tmp_path / "out")
    digests = [
        {x.name: hashlib.sha256(x.read_bytes()).digest() for x in path.iterdir()}
        for path in (tmp_path / "in", tmp_path / "out")
    ]
    assert digests[0] == digests[1]
    again = load(tmp_path / "out", settings, *languages)
    assert again.digest == tokenizer.digest
    assert again.encode_source(toy.DIFFICULT) == tokenizer.encode_source(toy.DIFFICULT)


def test_the_digest_tells_files_and_options_apart(tmp_path):
    settings = toy.m2m_100(tmp_path)
    digests = [load(tmp_path, settings, "en", x).digest for x in ("de", "fr", "de")]
    digests.append(load(tmp_path, settings, "en", "de", source_prefix=" ").digest)
    (tmp_path / "added_tokens.json").write_text("{}")
    digests.append(load(tmp_path, settings, "en", "de").digest)
    assert digests[0] == digests[2] and len(set(digests)) == 4


@pytest.mark.parametrize(
    ("languages", "message"),
    [
        ((None, "deu_Latn"), "give source_language, one of ace_Arab, .* and 190 more"),
        (("eng_Latn", None), "give target_language, one of"),
        (("eng_Latn", "de"), "target_language 'de' .*did you mean .*deu_Latn"),
        (("english", "deu_Latn"), "source_language 'english' .*did you mean eng_Latn"),
        (("eng_Latn", "?"), "target_language '\\?' is not one of the model's 202"),
    ],
)
def test_a_language_is_needed_and_has_to_be_known(languages, message, tmp_path):
    with pytest.raises(InteropError, match=message):
        load(tmp_path, toy.nllb(tmp_path), *languages)


def test_languages_that_the_files_name_are_taken(tmp_path):
    settings = toy.mbart50(tmp_path)
    plain = load(tmp_path, settings, "en_XX", "de_DE")
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8"))
    toy.write_json(path, config | {"src_lang": "en_XX", "tgt_lang": "fr_XX"})
    forced = {"forced_bos_token_id": plain.prefix[0]}
    assert load(tmp_path, settings, generation=forced).prefix == plain.prefix
    named = load(tmp_path, settings)
    assert named.target_pieces(named.prefix) == ["fr_XX"]
    assert named.source_beginning == plain.source_beginning


def test_marian_languages_are_needed_known_and_may_be_waived(tmp_path):
    settings = toy.marian(tmp_path, codes=("deu", "nld"))
    tokenizer = load(tmp_path, settings)
    with pytest.raises(InteropError, match="give target_language, one of deu, nld"):
        tokenizer.encode_source(["The house"])
    with pytest.raises(InteropError, match="did you mean deu"):
        tokenizer.encode_source([">>dej<< The house"])
    waived = load(tmp_path, settings, None, "")
    assert len(waived.encode_source(["The house"])[0]) == (
        len(tokenizer.encode_source([">>nld<<The house"])[0]) - 1
    )
    with pytest.raises(InteropError, match="target_language 'xyz' is not one of"):
        load(tmp_path, settings, None, "xyz")


@pytest.mark.parametrize("options", [{"source": "en"}, {"target": "de"}])
def test_a_language_that_a_model_does_not_take_is_refused(options, tmp_path):
    with pytest.raises(InteropError, match="takes none: leave it out"):
        load(tmp_path, toy.t5(tmp_path), **options)


def test_ids_that_do_not_fit_the_model_are_refused(tmp_path):
    settings = toy.marian(tmp_path)
    small = settings | {"vocab_size": settings["vocab_size"] - 1}
    with pytest.raises(InteropError, match="different models"):
        load(tmp_path, small)
    with pytest.raises(
        InteropError, match="pad_token_id is 5, but .* different models"
    ):
        load(tmp_path, settings | {"pad_token_id": 5})
    with pytest.raises(InteropError, match="eos_token_id is 3"):
        load(tmp_path, settings, generation={"eos_token_id": 3})


def test_files_that_are_missing_or_damaged_are_named(tmp_path):
    with pytest.raises(InteropError, match="nowhere is no directory"):
        load(tmp_path / "nowhere", {"model_type": "t5"})
    with pytest.raises(InteropError, match="spiece.model or tokenizer.json is missing"):
        load(tmp_path, {"model_type": "t5"})
    with pytest.raises(InteropError, match="known of marian, .* is of 'gpt2'"):
        load(tmp_path, {"model_type": "gpt2"})
    settings = toy.nllb(tmp_path)
    toy.write_json(
        tmp_path / "tokenizer_config.json", {"added_tokens_decoder": {"3": 1}}
    )
    with pytest.raises(InteropError, match="tokenizer_config.json .* is damaged"):
        load(tmp_path, settings, "eng_Latn", "deu_Latn")
    settings = toy.marian(tmp_path)
    (tmp_path / "target.spm").write_bytes(b"not a model")
    with pytest.raises(InteropError, match="target.spm is damaged"):
        load(tmp_path, settings)
    (tmp_path / "vocab.json").write_text('{"a": "b"}')
    (tmp_path / "target.spm").write_bytes((tmp_path / "source.spm").read_bytes())
    with pytest.raises(InteropError, match="vocab.json is damaged"):
        load(tmp_path, settings)


def test_a_model_trained_here_is_read_like_its_own_tokeniser(tmp_path):
    sentences = (toy.ENGLISH + toy.GERMAN) * 3
    own = train_tokenizer(sentences, vocab_size=330, directory=tmp_path / "cache")
    own.save(tmp_path)
    config = Config(vocabulary=own.vocab_size, d_model=8, d_ff=8, heads=2, pad=own.pad)
    model = Trained(
        config=config, params=None, start=own.start, eos=own.eos, first=None
    )
    content = (tmp_path / "tokenizer.model").read_bytes()
    write_marian_tokenizer(tmp_path, content, model=model)
    settings = {"model_type": "pegasus", "vocab_size": own.vocab_size}
    found = load(tmp_path, settings | {"decoder_start_token_id": own.start})
    assert found.encode_source(toy.DIFFICULT) == own.encode_source(toy.DIFFICULT)
    labels = own.encode_target(toy.DIFFICULT)
    assert found.decode(labels) == own.decode(labels)
    assert "🙂🙃" in found.decode(labels)[4]


def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch):
    settings = toy.bart(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(InteropError, match=r"pip install 'qkv_jax\[hub\]'"):
        load(tmp_path, settings)


def test_one_string_is_no_list_of_sentences(tmp_path):
    tokenizer = load(tmp_path, toy.t5(tmp_path))
    with pytest.raises(TypeError, match="list of strings"):
        tokenizer.encode_source("The house")
