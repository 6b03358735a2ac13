"""Runs on examples: trained, tested, resumed, read back, on any mesh; and what is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from qkv_jax import data
from qkv_jax.data.splits import Splits
from qkv_jax.tasks import is_task, load_task, read_task
from qkv_jax.training import (
    MeshConfig,
    PrecisionConfig,
    RunError,
    TrainingConfig,
    make_mesh,
    read_metrics,
)
from qkv_jax.training.model_card import array_digest
from tests.tasks import toy

ONE = MeshConfig(data=1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("task") / "run"
    config = toy.make_config(directory, mesh=ONE)
    return config, toy.run(config)


def test_a_run_is_trained_tested_and_drawn(finished):
    config, result = finished
    assert result["steps"] == 4 and result["parameters"] == 12
    assert set(result["test"]) == {"loss", "accuracy", "recall"}
    names = {path.name for path in config.run.directory.iterdir()}
    assert {"curves.png", "recall.txt", "result.json", "config.json"} <= names
    assert is_task(config.run.directory)


def test_a_run_leaves_a_model_card(finished):
    config, result = finished
    card = (config.run.directory / "model_card.md").read_text("utf-8")
    assert f"| test.accuracy | {result['test']['accuracy']:.6g} |" in card
    assert f"| test | 11 | {array_digest(config.data.load().test)} |" in card


def test_a_trained_model_gives_the_results_of_its_run(finished):
    config, result = finished
    trained = load_task(config.run.directory, config=config)
    assert trained.evaluate(trained.splits.test) == pytest.approx(result["test"])
    assert trained.predict(trained.splits.test)["logits"].shape == (11, 3)


def test_a_mesh_changes_nothing(finished, tmp_path):
    config, result = finished
    other = dataclasses.replace(
        config,
        mesh=MeshConfig(data=8),
        run=dataclasses.replace(config.run, directory=tmp_path / "run"),
    )
    assert toy.run(other)["test"] == pytest.approx(result["test"], rel=1e-5)
    rows = [read_metrics(c.run.directory) for c in (config, other)]
    losses = [
        [row["train/loss"] for row in part if "train/loss" in row] for part in rows
    ]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_an_interrupted_run_ends_with_the_same_bits(finished, tmp_path, monkeypatch):
    config, _ = finished
    run = dataclasses.replace(config.run, directory=tmp_path / "run")
    again = dataclasses.replace(config, run=run)

    class Cut:
        def __init__(self, stream):
            self.iterator, self.left = data.train_iterator(stream), 3
            self.get_state = self.iterator.get_state

        def __next__(self):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return next(self.iterator)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("qkv_jax.tasks.run.train_iterator", Cut)
        toy.run(again)
    assert toy.run(again)["steps"] == 4
    ends = [
        load_task(c.run.directory, config=c, checkpoint="latest").params
        for c in (config, again)
    ]
    jax.tree.map(np.testing.assert_array_equal, *ends)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_rows": 12}, "batch_rows is 12, which 8 groups of devices"),
        ({"model": toy.Config(classes=2)}, "model.classes is 2, and the data's is 3"),
        (
            {"training": TrainingConfig(steps=2, metric="bleu", evaluate_every=1)},
            "--training.metric must be one of accuracy, loss, recall; got 'bleu'",
        ),
        (
            {
                "data": toy.Data(valid=0),
                "training": TrainingConfig(steps=2, patience=1),
            },
            "patience needs validation examples",
        ),
    ],
)
def test_what_does_not_fit_is_one_clear_error(changes, message, tmp_path):
    with pytest.raises(RunError, match=message):
        toy.run(toy.make_config(tmp_path / "run", **changes))


def test_classes_of_other_packages_are_not_imported_for_a_file(finished, tmp_path):
    config, _ = finished
    with pytest.raises(RunError, match="which is not in qkv_jax"):
        read_task(config.run.directory)
    content = json.loads((config.run.directory / "config.json").read_text())
    content["data"]["module"] = "qkv_jax.data"
    content["data"]["kind"] = "cache_directory"
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(RunError, match="is no configuration"):
        read_task(tmp_path)


def test_a_stream_gives_each_example_once_an_epoch():
    arrays = {"x": np.arange(10)}
    stream = data.ExampleStream(arrays, rows=5, seed=3)
    epochs = [[stream[2 * e + i]["x"] for i in range(2)] for e in range(2)]
    first, second = (np.concatenate(epoch) for epoch in epochs)
    assert sorted(first) == sorted(second) == list(range(10))
    assert list(first) != list(second)
    np.testing.assert_array_equal(stream[1]["x"], epochs[0][1])


def test_too_few_examples_for_a_batch_fill_it_with_rows_of_no_weight():
    (batch,) = [data.ExampleStream({"x": np.arange(3)}, rows=5)[7]]
    assert batch["weight"].tolist() == [1, 1, 1, 0, 0]
    indices = [i for i, _ in data.example_batches({"x": np.arange(3)}, rows=2)]
    np.testing.assert_array_equal(indices, [[0, 1], [2, -1]])


def test_the_shares_of_a_batch_make_it_up():
    arrays = {"x": np.arange(10)}
    whole = data.ExampleStream(arrays, rows=6, seed=3)[4]
    parts = [
        data.ExampleStream(arrays, rows=6, seed=3, share=(i, 3))[4] for i in range(3)
    ]
    for name, array in whole.items():
        np.testing.assert_array_equal(np.concatenate([x[name] for x in parts]), array)
    with pytest.raises(ValueError, match="n must divide rows = 6"):
        data.ExampleStream(arrays, rows=6, share=(0, 4))


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(data.DataError, match="no example to train on"):
        Splits(train={}, valid={}, test={})
    with pytest.raises(ValueError, match="one number of rows"):
        Splits(train={"a": np.zeros(2), "b": np.zeros(3)}, valid={}, test={})
    kept, held = data.hold_out(10, 0.3, seed=1)
    assert len(held) == 3 and sorted([*kept, *held]) == list(range(10))


def test_a_model_says_what_is_counted(tmp_path, monkeypatch):
    config, mesh = toy.make_config(tmp_path / "run"), make_mesh(ONE)
    assert config.task(mesh).unit == "examples"
    monkeypatch.setattr(toy.Model, "unit", "rows", raising=False)
    assert config.task(mesh).unit == "rows"


def test_parameters_in_bfloat16_are_kept_and_read_back(tmp_path):
    policy = PrecisionConfig(params="bfloat16", rounding="kahan")
    config = toy.make_config(tmp_path / "run", mesh=ONE, precision=policy)
    result = toy.run(config)
    trained = load_task(config.run.directory, config=config)
    for x in map(np.asarray, jax.tree.leaves(trained.params)):
        assert x.dtype == np.float32 and not np.any(x.view(np.uint32) & 0xFFFF)
    assert trained.evaluate(trained.splits.test) == pytest.approx(result["test"])
    with pytest.raises(ValueError, match="has no dtype to choose"):
        dataclasses.replace(config, precision=PrecisionConfig(compute="bfloat16"))
