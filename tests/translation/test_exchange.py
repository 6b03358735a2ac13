"""Runs out as published models, in again, and trained on."""

import dataclasses
import io
import json
import shutil

import jax
import numpy as np
import pytest
from rich.console import Console

from qkv_jax.interop import InteropError, import_published, load, read_tensors
from qkv_jax.interop.pretrained import flatten
from qkv_jax.interop.tensors import write_tensors
from qkv_jax.training import FinetuneConfig, LoraConfig, RunError, train_task
from qkv_jax.translation import (
    LanguageConfig,
    load_run,
    load_translator,
)
from qkv_jax.translation.exchange import export_model
from qkv_jax.translation.start import load_start
from tests.translation import toy

SENTENCES = ["one two three", "nine", "", "zero seven seven four ü"]


@pytest.fixture(scope="module")
def published(finished, tmp_path_factory):
    """The toy run as a Hugging Face directory."""
    directory = tmp_path_factory.mktemp("published") / "model"
    export_model(finished, directory, to="hf")
    return directory


def found(translator):
    return [[x.text for x in best] for best in translator(SENTENCES, n_best=2)]


def scores(translator):
    return translator.score([(text, text) for text in SENTENCES])


def leaves(directory):
    return jax.tree.leaves(load_start(directory).params)


def test_an_exported_run_translates_alike_when_it_is_imported(
    finished, published, tmp_path
):
    import_published(published, tmp_path / "in")
    ours, theirs = load_run(finished), load_translator(tmp_path / "in")
    assert theirs.decoding.beams == ours.decoding.beams
    assert theirs.decoding.max_length == ours.decoding.max_length
    assert found(theirs) == found(ours)
    np.testing.assert_allclose(scores(theirs), scores(ours), atol=1e-5)


def test_import_then_export_gives_the_same_bytes(published, tmp_path):
    import_published(published, tmp_path / "in")
    export_model(tmp_path / "in", tmp_path / "out", to="hf")
    first, last = toy.contents(published), toy.contents(tmp_path / "out")
    assert first.keys() == last.keys()
    assert all(first[name] == last[name] for name in first if name != "config.json")


def tune(corpus, directory, start, **changes):
    config = toy.make_config(
        corpus, directory, init_from=str(start), steps=2, **changes
    )
    return config, toy.run(config)


@pytest.mark.parametrize("kind", ["run", "published"])
def test_a_run_starts_from_a_model_and_keeps_its_tokeniser(
    corpus, finished, published, tmp_path, kind
):
    start = {"run": finished, "published": published}[kind]
    tune(corpus, tmp_path / "run", start)
    begun, tuned = load_start(start), load_start(tmp_path / "run")
    assert tuned.tokenizer.digest == begun.tokenizer.digest
    assert tuned.model.d_model == begun.model.d_model
    moved = [
        float(abs(a - b).max()) for a, b in zip(leaves(start), leaves(tmp_path / "run"))
    ]
    assert 0 < max(moved) < 0.1
    assert len(found(load_run(tmp_path / "run"))) == len(SENTENCES)


def test_the_score_before_the_first_step_is_printed(corpus, published, tmp_path):
    said = io.StringIO()
    config = toy.make_config(
        corpus, tmp_path / "run", init_from=str(published), validation_sentences=4
    )
    train_task(config, console=Console(file=said, width=200))
    assert "before the first step  validation  " in said.getvalue()
    assert " bleu " in said.getvalue()


def test_a_tuned_published_model_is_exported_under_its_own_names(
    corpus, published, tmp_path
):
    tune(corpus, tmp_path / "run", published)
    export_model(tmp_path / "run", tmp_path / "out", to="hf")
    before, after = read_tensors(published), read_tensors(tmp_path / "out")
    computed = {name for name in before if "embed_positions" in name}
    assert after.keys() == before.keys() - computed
    assert found(load_translator(tmp_path / "out")) == found(load_run(tmp_path / "run"))


@pytest.mark.parametrize(
    "finetune, moves",
    [
        (
            FinetuneConfig(freeze=("encoder.*", "*embedding*")),
            ("decoder", "output_bias"),
        ),
        (
            FinetuneConfig(
                lora=LoraConfig(rank=2, kernels=("decoder.*.query.kernel",))
            ),
            "decoder",
        ),
    ],
    ids=["freeze", "lora"],
)
def test_what_is_not_trained_keeps_its_bits(
    corpus, published, tmp_path, finetune, moves
):
    _, result = tune(corpus, tmp_path / "run", published, finetune=finetune)
    assert 0 < result["trained_parameters"] < result["parameters"]
    before, after = load_start(published).params, load_start(tmp_path / "run").params
    for name, x in load_flat(before).items():
        same = np.array_equal(x, load_flat(after)[name])
        assert same or name.startswith(moves), name
    assert not all(
        np.array_equal(x, load_flat(after)[name])
        for name, x in load_flat(before).items()
    )


def load_flat(params):
    return {name: np.asarray(x) for name, x in flatten(params).items()}


def test_the_padding_of_a_model_that_starts_from_it_stays_zero(
    corpus, published, tmp_path
):
    other, pad = tmp_path / "other", 0
    shutil.copytree(published, other)
    tensors = {name: x.copy() for name, x in read_tensors(published).items()}
    for name, x in tensors.items():
        if "shared" in name or "embed_tokens" in name or name == "lm_head.weight":
            x[pad] = 0
    write_tensors(other, tensors)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((other / name).read_text())
        settings["decoder_start_token_id"] = pad
        (other / name).write_text(json.dumps(settings))
    tune(corpus, tmp_path / "run", other)
    tuned = load_start(tmp_path / "run")
    assert tuned.model.zero_pad and tuned.tokenizer.start == tuned.model.pad == pad
    flat = load_flat(tuned.params)
    rows = [x for name, x in flat.items() if name.endswith("embedding.table")]
    assert rows and not any(x[pad].any() for x in rows)


def test_a_vocabulary_that_does_not_fit_is_an_error_before_anything_is_written(
    corpus, published, tmp_path
):
    other = tmp_path / "other"
    shutil.copytree(published, other)
    vocabulary = json.loads((other / "vocab.json").read_text())
    vocabulary["more"] = len(vocabulary)
    (other / "vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(InteropError, match="they are of different models"):
        tune(corpus, tmp_path / "run", other)
    assert not (tmp_path / "run").exists()


def test_languages_are_of_published_models(corpus, finished, tmp_path):
    with pytest.raises(RunError, match="whose languages are those it was trained with"):
        load_translator(finished, languages=LanguageConfig(target="deu"))
    with pytest.raises(ValueError, match="languages are of the model of init_from"):
        toy.make_config(corpus, tmp_path, languages=LanguageConfig(target="deu"))


def test_nothing_is_written_where_something_is(finished, published, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for to in ("hf", "ctranslate2"):
        with pytest.raises(InteropError, match="is not empty|pip install"):
            export_model(finished, tmp_path, to=to)
    with pytest.raises(InteropError, match="is not empty"):
        import_published(published, tmp_path)
    assert toy.contents(tmp_path) == {"thesis.txt": b"years of work"}


def test_a_resumed_run_starts_from_its_checkpoint(corpus, published, tmp_path):
    config, _ = tune(corpus, tmp_path / "whole", published)
    half = dataclasses.replace(
        config, run=dataclasses.replace(config.run, directory=tmp_path / "half")
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "qkv_jax.training.loop._Session.ended",
            property(lambda s: s.record.step >= 1),
        )
        toy.run(half)
    (tmp_path / "half" / "result.json").unlink()
    toy.run(half)
    for a, b in zip(leaves(tmp_path / "whole"), leaves(tmp_path / "half")):
        np.testing.assert_array_equal(a, b)


def test_the_model_of_the_published_directory_is_a_marian_one(published):
    assert load(published).family in ("marian", "pegasus")
