"""Tokenisers of every family in their published layouts: the ids and text of `transformers`."""

import json
import random
import secrets
import warnings
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")

from qkv_jax.interop import load_tokenizer
from tests.interop import toy

pytestmark = pytest.mark.peers

# Layout, class of theirs, source and target language.
CASES: dict[str, tuple[Any, str, str | None, str | None]] = {
    "marian": (toy.marian, "MarianTokenizer", None, None),
    "marian-separate": (
        lambda path: toy.marian(path, separate=True),
        "MarianTokenizer",
        None,
        None,
    ),
    "m2m": (toy.m2m_100, "M2M100Tokenizer", "en", "de"),
    "nllb": (toy.nllb, "NllbTokenizer", "eng_Latn", "deu_Latn"),
    "mbart50": (toy.mbart50, "MBart50Tokenizer", "en_XX", "de_DE"),
    "mbart": (toy.mbart, "MBartTokenizer", "en_XX", "de_DE"),
    "bart": (toy.bart, "BartTokenizer", None, None),
    "t5": (toy.t5, "T5Tokenizer", None, None),
}


def theirs(name: str, directory, source: str | None, target: str | None):
    languages = {"src_lang": source, "tgt_lang": target} if source else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It recommends sacremoses.
        return getattr(transformers, name).from_pretrained(directory, **languages)


def ours(directory, settings, source=None, target=None, **options):
    return load_tokenizer(
        directory,
        family=settings["model_type"],
        settings=settings,
        generation={},
        source_language=source,
        target_language=target,
        **options,
    )


@pytest.fixture(params=CASES)
def pair(request, tmp_path):
    """Case, theirs, ours."""
    layout, name, source, target = CASES[request.param]
    settings = layout(tmp_path)
    found = ours(tmp_path, settings, source, target)
    return request.param, theirs(name, tmp_path, source, target), found


def draw(seed: int) -> list[str]:
    """Sentences of pieces that a vocabulary has and has not."""
    rng = random.Random(seed)
    parts = " ".join(toy.ENGLISH + toy.GERMAN).split() + list("äß🙂你é'., -1  ")
    lines = [
        "".join(rng.choices([*parts, " "], k=rng.randint(1, 20))) for _ in range(200)
    ]
    return [" ".join(line.split()) for line in lines]  # Theirs keep a space at the end.


@pytest.fixture
def texts():
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    return toy.DIFFICULT + draw(seed)


def test_sources_have_their_ids(pair, texts):
    _, wanted, found = pair
    assert found.encode_source(texts) == wanted(texts)["input_ids"]


def test_targets_have_their_labels(pair, texts):
    case, wanted, found = pair
    labels = wanted(text_target=texts)["input_ids"]
    if case == "mbart":  # Theirs end in the language; ours start from it.
        assert {row[-1] for row in labels} == {found.start}
        labels = [row[:-1] for row in labels]
    assert found.encode_target(texts) == labels


def test_text_is_decoded_as_theirs(pair, texts):
    case, wanted, found = pair
    labels = found.encode_target(texts)
    padded = [[*row, found.pad, found.pad] for row in labels]
    text = wanted.batch_decode(padded, skip_special_tokens=True)
    if case not in (
        "marian",
        "m2m",
    ):  # Theirs keep a space before what follows an unknown.
        text = [line.strip() for line in text]
    assert [line.strip() for line in found.decode(padded)] == text
    assert case == "marian-separate" or found.decode(padded)[1] == toy.DIFFICULT[1]


def test_what_looks_like_a_special_token_is_text(pair):
    case, wanted, found = pair
    split = wanted(toy.SPECIAL, split_special_tokens=True)["input_ids"]
    sources = found.encode_source(toy.SPECIAL)
    if case not in ("t5", "mbart", "mbart50"):  # Theirs find "</s>" among the pieces.
        assert sources == split
    ending = len(found.source_ending)
    inner = {x for row in sources for x in row[len(found.source_beginning) : -ending]}
    assert inner & found.silent <= {found.unk}


def test_blank_text_has_no_pieces(pair):
    case, wanted, found = pair
    blank, nothing = found.encode_source([" ", ""])
    assert nothing == wanted("")["input_ids"]
    assert case == "bart" or blank == nothing


@pytest.mark.parametrize("case", ["nllb", "mbart", "mbart50", "bart", "t5"])
def test_tokenizer_json_alone_is_enough(case, tmp_path, texts):
    layout, name, source, target = CASES[case]
    settings = layout(tmp_path)
    wanted = theirs(name, tmp_path, source, target)
    (tmp_path / "fast").mkdir()
    wanted.backend_tokenizer.save(str(tmp_path / "fast" / "tokenizer.json"))
    config = (
        json.loads((tmp_path / "tokenizer_config.json").read_text()) if source else {}
    )
    toy.write_json(
        tmp_path / "fast" / "tokenizer_config.json",
        {"tokenizer_class": config.get("tokenizer_class")},
    )
    found = ours(tmp_path / "fast", settings, source, target)
    assert found.encode_source(texts) == wanted(texts)["input_ids"]
    labels = found.encode_target(texts)
    text = wanted.batch_decode(labels, skip_special_tokens=True)
    assert found.decode(labels) == text
    slow = ours(tmp_path, settings, source, target)
    assert labels == slow.encode_target(texts)
    special = {x for row in found.encode_target(toy.SPECIAL) for x in row[1:-1]}
    assert special & found.silent <= {found.unk}
    for field in ("pad", "start", "eos", "unk", "prefix", "source_ending", "never"):
        assert getattr(found, field) == getattr(slow, field)
    assert slow.silent == found.silent


def test_legacy_nllb_ends_sources_in_their_language(tmp_path):
    settings = toy.nllb(tmp_path, legacy=True)
    wanted = theirs("NllbTokenizer", tmp_path, "eng_Latn", "deu_Latn")
    found = ours(tmp_path, settings, "eng_Latn", "deu_Latn")
    assert found.encode_source(toy.DIFFICULT) == wanted(toy.DIFFICULT)["input_ids"]
    assert found.source_ending == (2, wanted.convert_tokens_to_ids("eng_Latn"))
    assert found.prefix == (wanted.convert_tokens_to_ids("deu_Latn"),)


def test_marian_takes_the_language_at_the_start_as_one_token(tmp_path):
    settings = toy.marian(tmp_path, codes=("deu", "nld"))
    wanted, found = (
        theirs("MarianTokenizer", tmp_path, None, None),
        ours(tmp_path, settings),
    )
    texts = [f">>{code}<< {text}" for code in ("deu", "nld") for text in toy.DIFFICULT]
    texts.append(">>deu<<The >>nld<< house")
    assert found.encode_source(texts) == wanted(texts)["input_ids"]
    given = ours(tmp_path, settings, None, "nld").encode_source(toy.DIFFICULT)
    dutch = [f">>nld<<{text}" for text in toy.DIFFICULT]
    assert given == wanted(dutch)["input_ids"]


@pytest.mark.parametrize("case", ["marian", "m2m", "mbart50", "t5", "nllb"])
def test_spaces_are_cleaned_where_theirs_are(case, tmp_path):
    layout, name, source, target = CASES[case]
    settings = layout(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8"))
    toy.write_json(path, config | {"clean_up_tokenization_spaces": True})
    wanted, found = theirs(name, tmp_path, source, target), None
    found = ours(tmp_path, settings, source, target)
    labels = found.encode_target(["a bird , a cat !", "is n't it ' s ?"])
    assert found.decode(labels) == wanted.batch_decode(labels, skip_special_tokens=True)


def test_a_source_prefix_stands_before_every_source(tmp_path):
    settings, prefix = toy.t5(tmp_path), "the garden: "
    found = ours(tmp_path, settings, source_prefix=prefix)
    wanted = theirs("T5Tokenizer", tmp_path, None, None)
    texts = [prefix + text for text in toy.DIFFICULT]
    assert found.encode_source(toy.DIFFICULT) == wanted(texts)["input_ids"]
