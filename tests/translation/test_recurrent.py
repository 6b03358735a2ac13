"""The recurrent model in the place of the Transformer: the same loop, search and commands."""

import dataclasses
import re

import numpy as np
import pytest

from qkv_jax.interop import InteropError
from qkv_jax.models import recurrent
from qkv_jax.training import MeshConfig, RunError
from qkv_jax.translation import draw, load_run, read_run
from qkv_jax.translation.exchange import export_model
from tests.translation import toy


@pytest.fixture(scope="module")
def config(corpus, tmp_path_factory):
    config = toy.make_config(
        corpus,
        tmp_path_factory.mktemp("runs") / "recurrent",
        model=recurrent.Config(d_model=16),
        mesh=MeshConfig(data=4, fsdp=2),
    )
    return dataclasses.replace(
        config, text=dataclasses.replace(config.text, packing=True)
    )


@pytest.fixture(scope="module")
def result(config):
    return toy.run(config, draws=True)


def test_it_is_trained_on_a_mesh_and_tested(config, result):
    assert result["steps"] == 4 and 0 <= result["test"]["bleu"] <= 100
    assert (config.run.directory / "attention.png").exists()


def test_its_run_is_read_back_and_translates(config, result):
    directory = config.run.directory
    assert read_run(directory).model == config.model
    translator = load_run(directory)
    assert translator.attention_layers == ["decoder.cross"]
    (best, *_), _ = translator(["one two three", ""], align=True, n_best=2)
    assert re.fullmatch(r"(\d+-\d+ ?)*", best.alignment.pharaoh)


def test_its_alignment_and_its_one_table_are_drawn(config, result, tmp_path):
    translator = load_run(config.run.directory)
    watched = translator.watch("one two three")
    weights = watched.weights["decoder.cross"]
    assert weights.shape == (1, len(watched.target.ids), len(watched.source.ids))
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    draw.draw_alignment(watched, tmp_path / "a.png", layer="decoder.cross")
    counts = draw.count_tokens(translator, [("one two", "two one"), ("three", "three")])
    assert counts[0].sum() == counts[1].sum() > 0
    draw.draw_embeddings(translator, counts, tmp_path / "b.png")
    assert (tmp_path / "a.png").exists() and (tmp_path / "b.png").exists()


def test_what_is_of_transformers_is_refused(config, result, tmp_path):
    with pytest.raises(InteropError, match="a recurrent model has no place"):
        export_model(config.run.directory, tmp_path / "out", to="hf")
    other = toy.make_config(
        config.data.directory, tmp_path / "run", init_from=str(config.run.directory)
    )
    with pytest.raises(RunError, match="is another kind of model"):
        toy.run(other)
