"""The mean of models that went on from the same weights."""

import json
import shutil

import jax
import numpy as np
import pytest

from qkv_jax.compression import Pruning, Quantisation
from qkv_jax.interop import InteropError
from qkv_jax.training import RunError, flatten
from qkv_jax.translation import load_run, load_translator
from qkv_jax.translation.average import AVERAGED, average_models
from qkv_jax.translation.compress import compress_model, prune_model
from qkv_jax.translation.exchange import export_model
from qkv_jax.translation.run import prepare
from qkv_jax.translation.start import load_start
from tests.translation import toy

PAIRS = [("one two three", "three two one"), ("nine", "nine")]


@pytest.fixture(scope="module")
def tuned(finished, corpus, tmp_path_factory):
    """A run that went on from the finished one."""
    directory = tmp_path_factory.mktemp("average") / "tuned"
    config = toy.make_config(corpus, directory, steps=2, init_from=str(finished))
    toy.run(config)
    return directory


def arrays(directory):
    return flatten(load_start(directory).params)


@pytest.mark.parametrize(
    ("weights", "share"), [(None, 0.5), ((3.0, 1.0), 0.75), ((0.2, 0.2), 0.5)]
)
def test_it_is_the_mean_of_every_weight(finished, tuned, tmp_path, weights, share):
    average_models([finished, tuned], tmp_path / "out", weights=weights)
    found, first, second = map(arrays, (tmp_path / "out", finished, tuned))
    assert found.keys() == first.keys()
    moved = 0.0
    for name, array in found.items():
        mean = share * np.float64(first[name]) + (1 - share) * np.float64(second[name])
        np.testing.assert_array_equal(array, np.float32(mean))
        moved = max(moved, float(abs(first[name] - second[name]).max()))
    assert moved > 1e-3
    assert json.loads((tmp_path / "out" / AVERAGED).read_text()) == {
        "models": [finished.name, "tuned"],
        "weights": [pytest.approx(share), pytest.approx(1 - share)],
    }


def test_all_the_weight_on_one_gives_it_back_to_the_bit(finished, tuned, tmp_path):
    for name, weights in (("first", (5.0, 0.0)), ("second", (0.0, 5.0))):
        average_models([finished, tuned], tmp_path / name, weights=weights)
    for made, whole in (("first", finished), ("second", tuned)):
        scores = [x.score for x in load_translator(tmp_path / made).score(PAIRS)]
        assert scores == [x.score for x in load_translator(whole).score(PAIRS)]
    found = load_translator(tmp_path / "second")
    assert found.decoding == load_run(finished).decoding


def test_the_mean_of_published_models_is_published(finished, tuned, tmp_path):
    for name, model in (("a", finished), ("b", tuned)):
        export_model(model, tmp_path / name, to="hf")
    average_models([tmp_path / "a", tmp_path / "b"], tmp_path / "mean")
    export_model(tmp_path / "mean", tmp_path / "back", to="hf")
    back, first, second = (arrays(tmp_path / x) for x in ("back", "a", "b"))
    for name, array in back.items():
        mean = (np.float64(first[name]) + np.float64(second[name])) / 2
        np.testing.assert_allclose(array, mean, rtol=1e-6, atol=1e-8)
    assert any((first[name] != back[name]).any() for name in back)


def test_names_of_axes_stay(finished, tuned):
    mean = average_models([finished, tuned], tuned.parent / "named")
    whole = load_start(finished)
    assert jax.tree.structure(mean.params) == jax.tree.structure(whole.params)


@pytest.mark.parametrize(
    ("count", "weights", "expected"),
    [
        (1, None, "models must be two or more; got 1."),
        (2, (1.0,), "one for each of the 2 models; got 1"),
        (2, (1.0, -0.5), "must not be negative"),
        (2, (0.0, 0.0), "nor all 0"),
        (2, (float("nan"), 1.0), "must not be negative"),
    ],
)
def test_weights_that_are_none_are_refused(
    finished, tuned, tmp_path, count, weights, expected
):
    with pytest.raises(ValueError, match=expected):
        average_models([finished, tuned][:count], tmp_path / "out", weights=weights)
    assert not (tmp_path / "out").exists()


def test_models_that_have_no_mean_are_refused(finished, tuned, tmp_path):
    def refused(other, expected):
        with pytest.raises(RunError, match=expected):
            average_models([finished, other], tmp_path / "out")
        assert not (tmp_path / "out").exists()

    compress_model(tuned, tmp_path / "int8", Quantisation(weights="int8"))
    refused(tmp_path / "int8", "int8 is quantised")
    prune_model(tuned, tmp_path / "pruned", Pruning(feed_forward=0.5), pairs=PAIRS)
    refused(tmp_path / "pruned", r"another shape than .* \(d_ff\).*--ensemble")
    # Of as many subwords, in another order.
    text = toy.write_corpus(tmp_path / "text")
    for file in (text / "train.en", text / "train.de"):
        file.write_text(file.read_text().replace("n", "q").replace("e", "n"))
    other = shutil.copytree(finished, tmp_path / "other")
    tokenizer = prepare(toy.make_config(text, other)).tokenizer
    tokenizer.save(other / "tokenizer")
    config = json.loads((other / "config.json").read_text("utf-8"))
    config["tokenizer"] = tokenizer.digest
    (other / "config.json").write_text(json.dumps(config), "utf-8")
    refused(other, "another tokeniser")


def test_a_directory_in_use_is_not_written_to(finished, tuned):
    before = toy.contents(tuned)
    with pytest.raises(InteropError):
        average_models([finished, tuned], tuned)
    assert toy.contents(tuned) == before
