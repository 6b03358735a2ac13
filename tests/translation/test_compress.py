"""Models made cheaper: quantised, and trained to be."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax.compression import Pruning, Quantisation
from qkv_jax.interop import InteropError
from qkv_jax.training import RunError, flatten
from qkv_jax.translation import load_run, load_translator
from qkv_jax.translation.compress import (
    compress_model,
    disk_bytes,
    kept_heads,
    prune_model,
)
from qkv_jax.translation.exchange import export_model
from qkv_jax.translation.loss import make_loss
from qkv_jax.translation.models import param_count
from qkv_jax.translation.start import COMPRESSED, WEIGHTS, load_start
from tests.translation import toy

PAIRS = [("one two three", "three two one"), ("nine", "nine")]
INT8, INT4 = Quantisation(weights="int8"), Quantisation(weights="int4", group=8)


@pytest.fixture(scope="module")
def made(finished, tmp_path_factory):
    """The toy run with weights of 32, 8 and 4 bits."""
    folder = tmp_path_factory.mktemp("compressed")
    ways = {"float32": Quantisation(), "int8": INT8, "int4": INT4}
    for name, how in ways.items():
        compress_model(finished, folder / name, how)
    return folder


def scores(directory):
    return [x.score for x in load_translator(directory).score(PAIRS)]


def test_weights_as_they_are_translate_as_the_run(finished, made):
    assert scores(made / "float32") == scores(finished)
    assert load_translator(made / "float32").decoding == load_run(finished).decoding


def structure(start):
    """With the names of axes."""
    return jax.tree.structure(start.params)


@pytest.mark.parametrize(("name", "tolerance"), [("int8", 0.02), ("int4", 0.3)])
def test_rounded_weights_score_about_the_same(finished, made, name, tolerance):
    found, wanted = scores(made / name), scores(finished)
    np.testing.assert_allclose(found, wanted, atol=tolerance)
    assert found != wanted
    assert load_translator(made / name)(["one two"])[0][0].text is not None


def test_weights_come_back_from_disk_as_they_were(finished, made):
    again = compress_model(finished, made / "again", INT4)
    read = load_start(made / "int4")
    assert read.quantisation == INT4
    for ours, theirs in zip(*map(jax.tree.leaves, (again.params, read.params))):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def test_fewer_bits_take_fewer_bytes(finished, made, tmp_path):
    # A scale for 8 weights of 4 bits takes as much as they: 8 bits a weight, as int8 has.
    compress_model(finished, tmp_path / "int4", Quantisation(weights="int4", group=16))
    directories = (tmp_path / "int4", made / "int8", made / "float32")
    # How many files orbax's writers leave beside the merged ones is a matter of timing.
    sizes = [disk_bytes(x / WEIGHTS / "params" / "d") for x in directories]
    assert 0 < sizes[0] < sizes[1] < sizes[2]


def test_a_quantised_model_is_exported_and_trained_on_in_float(
    finished, made, corpus, tmp_path
):
    export_model(made / "int8", tmp_path / "hf", to="hf")
    there, here = load_start(tmp_path / "hf"), load_start(made / "int8").in_float()
    assert structure(here) == structure(load_start(finished))
    there = flatten(there.params)
    for name, ours in flatten(here.params).items():
        np.testing.assert_array_equal(ours, there[name])
    config = toy.make_config(
        corpus, tmp_path / "on", steps=1, init_from=str(made / "int8")
    )
    toy.run(config)
    leaves = jax.tree.leaves(load_start(tmp_path / "on").params)
    assert {x.dtype for x in leaves} == {jnp.dtype("float32")}


def test_a_run_that_is_trained_to_be_rounded_is_used_so(finished, corpus, tmp_path):
    config = toy.make_config(
        corpus, tmp_path / "run", init_from=str(finished), quantise=INT4
    )
    config = dataclasses.replace(config, validation_sentences=2)
    trained = toy.run(config)
    start = load_start(tmp_path / "run")
    assert start.quantisation == INT4
    compress_model(tmp_path / "run", tmp_path / "out", INT4)
    assert scores(tmp_path / "out") == scores(tmp_path / "run")
    assert "test" in trained
    with pytest.raises(RunError, match="trained to be, with weights int4, group 8"):
        compress_model(tmp_path / "run", tmp_path / "other", INT8)


def test_what_is_rounded_changes_the_loss(finished):
    start = load_start(finished)
    batch = {"source": jnp.array([[5, 2]]), "target": jnp.array([[7, 2]])}
    losses = [
        jax.jit(make_loss(start.model, 0.1, quantise=how))(start.params, batch, None)[0]
        for how in (Quantisation(), INT8, INT4)
    ]
    assert len({float(loss) for loss in losses}) == 3


def test_a_pruned_model_is_smaller_and_is_used_as_any_other(finished, tmp_path):
    what = Pruning(heads=0.34, feed_forward=0.5)
    pruned = prune_model(finished, tmp_path / "out", what, pairs=PAIRS)
    counts, whole = pruned.model.heads_by_layer, load_start(finished).model
    assert sum(counts) == 4 and len(counts) == 3  # Of 6.
    assert (pruned.model.d_ff, pruned.model.head_size) == (16, 8)
    assert load_start(tmp_path / "out").model == pruned.model
    kept = [found["kept"] for found in kept_heads(tmp_path / "out")[1].values()]
    assert tuple(map(len, kept)) == counts
    size = sum(x.size for x in jax.tree.leaves(pruned.params))
    assert size == param_count(pruned.model) < param_count(whole)
    found = load_translator(tmp_path / "out")
    assert len(found.score(PAIRS)) == 2
    with pytest.raises(InteropError, match="prune with --even-heads"):
        export_model(tmp_path / "out", tmp_path / "hf", to="hf")


def test_a_pruned_model_is_trained_on_and_quantised(finished, corpus, tmp_path):
    what = Pruning(heads=0.34, norm_in_layer=True)
    prune_model(finished, tmp_path / "out", what, pairs=PAIRS)
    measure, heads = kept_heads(tmp_path / "out")
    assert measure == "importance in its layer"
    norms = [np.linalg.norm(found["values"]) for found in heads.values()]
    np.testing.assert_allclose(norms, 1.0, rtol=1e-5)
    config = toy.make_config(
        corpus, tmp_path / "on", steps=1, init_from=str(tmp_path / "out")
    )
    toy.run(config)
    counts = load_start(tmp_path / "out").model.heads_by_layer
    assert load_start(tmp_path / "on").model.heads_by_layer == counts is not None
    compress_model(tmp_path / "on", tmp_path / "int8", INT8)
    np.testing.assert_allclose(
        scores(tmp_path / "int8"), scores(tmp_path / "on"), atol=0.05
    )


def test_mistakes_are_said(made, finished, tmp_path):
    with pytest.raises(RunError, match="quantised already"):
        compress_model(made / "int8", tmp_path / "out", INT4)
    with pytest.raises(InteropError, match="not empty"):
        compress_model(finished, made / "int8", INT8)
    with pytest.raises(RunError, match="leave out that option"):
        load_start(made / "int8", checkpoint="latest")
    mesh = jax.make_mesh((4, 2), ("data", "tensor"))
    with pytest.raises(RunError, match="quantised weights lie whole"):
        load_translator(made / "int8", mesh=mesh)


def test_damage_is_said(finished, tmp_path):
    compress_model(finished, tmp_path / "cut", INT8)
    file = max((tmp_path / "cut" / WEIGHTS).rglob("*"), key=lambda x: x.stat().st_size)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(RunError, match="cut short or damaged"):
        load_start(tmp_path / "cut")
    (tmp_path / "cut" / COMPRESSED).write_text("{}")
    with pytest.raises(RunError, match="compressed.json is damaged"):
        load_start(tmp_path / "cut")
