"""Models of the Marian toolkit: every number in its place, and what cannot be taken refused."""

import json

import numpy as np
import pytest

from qkv_jax.interop import (
    InteropError,
    convert_marian,
    is_marian_npz,
    load,
    load_tokenizer,
    read_tensors,
)
from tests.interop import toy, toy_marian


@pytest.fixture
def made(tmp_path):
    """A directory of Marian's, its options and its arrays."""
    directory = tmp_path / "marian"
    directory.mkdir()
    options = toy_marian.options(toy_marian.vocabulary(directory))
    arrays = toy_marian.arrays(np.random.default_rng(0), options)
    toy_marian.write(directory, options, arrays)
    return directory, options, arrays


def test_every_number_stands_in_its_place(made, tmp_path):
    directory, options, arrays = made
    convert_marian(directory, tmp_path / "out")
    found, x = read_tensors(tmp_path / "out"), arrays
    assert len(found) == len(arrays)
    V = options["dim-vocabs"][0]
    table = found["model.shared.weight"]
    np.testing.assert_array_equal(table[:V], x["Wemb"])
    np.testing.assert_array_equal(table[V:], np.zeros((1, 12)))
    bias = np.append(x["decoder_ff_logit_out_b"], np.float32([[0]]), axis=1)
    np.testing.assert_array_equal(found["final_logits_bias"], bias)
    for there, ours in (
        ("encoder.layers.1.self_attn.q_proj", "encoder_l2_self_{}q"),
        ("decoder.layers.0.encoder_attn.out_proj", "decoder_l1_context_{}o"),
        ("decoder.layers.0.fc1", "decoder_l1_ffn_{}1"),
    ):
        weight, row = (found[f"model.{there}.{x}"] for x in ("weight", "bias"))
        np.testing.assert_array_equal(weight, x[ours.format("W")].T)
        np.testing.assert_array_equal(row, x[ours.format("b")][0])
    norm = found["model.decoder.layers.0.encoder_attn_layer_norm.weight"]
    np.testing.assert_array_equal(norm, x["decoder_l1_context_Wo_ln_scale"][0])


def test_it_loads_with_its_tokeniser(made, tmp_path):
    directory, options, _ = made
    assert is_marian_npz(directory)
    convert_marian(directory, tmp_path / "out")
    assert not is_marian_npz(tmp_path / "out")
    model = load(tmp_path / "out")
    assert (model.config.tie, model.config.activation) == ("all", "silu")
    assert model.settings["num_beams"] == 6
    tokenizer = load_tokenizer(
        tmp_path / "out", family="marian", settings=model.settings, generation={}
    )
    pad = options["dim-vocabs"][0]
    assert (tokenizer.pad, tokenizer.start, model.start) == (pad, pad, pad)
    assert tokenizer.decode(tokenizer.encode_target([toy.GERMAN[1]])) == [toy.GERMAN[1]]
    vocabulary = json.loads((tmp_path / "out" / "vocab.json").read_text("utf-8"))
    assert (vocabulary["no"], vocabulary["1"], vocabulary['"']) == (2, 3, 4)


@pytest.mark.parametrize(
    ("tied", "tie"),
    [
        ({"tied_embeddings": True}, "target"),
        ({"tied_embeddings_src": True}, "input"),
        ({}, "none"),
    ],
)
def test_tables_that_are_not_tied_stay_apart(made, tmp_path, tied, tie):
    directory, options, _ = made
    tied = {"tied_embeddings_all": False} | tied
    options = toy_marian.options(options["dim-vocabs"][0], **tied)
    arrays = toy_marian.arrays(np.random.default_rng(1), options)
    toy_marian.write(directory, options, arrays)
    convert_marian(directory, tmp_path / "out")
    assert load(tmp_path / "out").config.tie == tie


def test_a_sentencepiece_model_is_a_vocabulary(made, tmp_path):
    directory, _, _ = made
    for path in directory.glob("*.[sy][pm]*"):
        path.unlink()
    text = toy.train(toy.ENGLISH + toy.GERMAN, eos_id=0, unk_id=1, bos_id=-1)
    (directory / "vocab.spm").write_bytes(text)
    options = toy_marian.options(len(toy.pieces(text)))
    arrays = toy_marian.arrays(np.random.default_rng(0), options)
    toy_marian.write(directory, options, arrays)
    convert_marian(directory, tmp_path / "out")
    settings = load(tmp_path / "out").settings
    tokenizer = load_tokenizer(
        tmp_path / "out", family="marian", settings=settings, generation={}
    )
    [ids] = tokenizer.encode_source(["The house"])
    assert tokenizer.source_pieces(ids) == [toy.pieces(text)[i] for i in ids]


def test_all_options_that_make_another_model_are_listed(made, tmp_path):
    directory, options, arrays = made
    odd = options | {"type": "s2s", "transformer-postprocess": "da", "novel": 1}
    odd |= {"transformer-ffn-activation": "tanh", "dim-vocabs": [90, 91]}
    toy_marian.write(directory, odd, arrays)
    with pytest.raises(InteropError) as caught:
        convert_marian(directory, tmp_path / "out")
    for words in (
        "type must be 'transformer'; it is 's2s'",
        "it is 'da'",
        "novel is unk",
    ):
        assert words in str(caught.value)
    assert "it is 'tanh'" in str(caught.value) and "[90, 91]" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_tensors_that_are_missing_left_or_odd_are_listed(made, tmp_path):
    directory, options, arrays = made
    arrays = arrays | {"Wpos": np.zeros((3, 12), np.float32)}
    arrays["encoder_l1_ffn_W1"] = arrays["encoder_l1_ffn_W1"].astype(np.int32)
    del arrays["decoder_l1_self_bq"]
    toy_marian.write(directory, options, arrays)
    message = (
        "decoder_l1_self_bq is missing; tensor Wpos is not used; .*_ffn_W1 must be"
    )
    with pytest.raises(InteropError, match=message):
        convert_marian(directory, tmp_path / "out")


def test_objects_in_a_npz_are_never_unpickled(made, tmp_path):
    directory, _, arrays = made
    np.savez(directory / "model.npz", **arrays, bad=np.array([object()]))
    with pytest.raises(InteropError, match="model.npz is damaged .*allow_pickle"):
        convert_marian(directory, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("source.spm", None, "source.spm is missing: models without SentencePiece"),
        ("opus.vocab.yml", None, "opus.vocab.yml is missing: decoder.yml names it"),
        ("opus.vocab.yml", '"a": 1', "does not fit the model: it must hold </s>"),
        ("opus.vocab.yml", "a: [1]", "must hold pieces with ids"),
        ("opus.vocab.yml", "a: 'b", "holds no YAML"),
        ("model.npz", "not a zip", "model.npz is damaged"),
        ("model.npz", None, "must hold one .npz; it holds none"),
    ],
)
def test_files_that_are_missing_or_damaged_are_named(
    made, tmp_path, name, content, message
):
    directory, _, _ = made
    (directory / name).unlink()
    if content is not None:
        (directory / name).write_text(content)
    with pytest.raises(InteropError, match=message):
        convert_marian(directory, tmp_path / "out")
