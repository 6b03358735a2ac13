import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

import qkv_jax.data
from qkv_jax.data import DataError, ParallelData
from qkv_jax.training import (
    MeshConfig,
    Outcome,
    RunConfig,
    RunError,
    TrainingConfig,
    read_metrics,
)
from qkv_jax.translation import evaluate_run, load_run
from qkv_jax.translation.run import prepare, read_result, read_run
from tests.translation import toy

PNG = b"\x89PNG\r\n"


class Interrupted:
    """The iterator of a run that is interrupted before its n-th batch."""

    def __init__(self, iterator, batches):
        self.iterator, self.left = iterator, batches
        self.get_state, self.set_state = iterator.get_state, iterator.set_state

    def __next__(self):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return next(self.iterator)


def test_a_run_leaves_all_it_promises(finished):
    names = {path.name for path in finished.iterdir()}
    events = {name for name in names if name.startswith("events.")}
    files = {"config.json", "metrics.jsonl", "curves.png", "attention.png"}
    files.add("model_card.md")
    assert (
        names == files | {"tokenizer", "checkpoints", "result.json", ".lock"} | events
    )
    assert events
    for name in ("curves.png", "attention.png"):
        assert (finished / name).read_bytes().startswith(PNG)
    assert {path.name for path in (finished / "checkpoints").iterdir()} == {"2", "4"}


def test_metrics_tell_of_training_and_validation(finished):
    rows = read_metrics(finished)
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "validation/loss" in row] == [2, 4]
    assert all(np.isfinite(row.get("train/loss", 0.0)) for row in rows)


def test_a_result_is_that_of_the_best_checkpoint_on_the_test_part(finished):
    result = read_result(finished)
    assert (result["steps"], result["stopped_early"], result["best_step"]) == (
        4,
        False,
        4,
    )
    assert result["seconds"] > result["training_seconds"] > 0
    pairs = read_run(finished).data.load().test
    scores, translations = evaluate_run(load_run(finished), pairs)
    assert scores.to_json() == result["test"]
    assert len(translations) == len(pairs) == toy.PARTS["test"]


def test_a_run_knows_its_configuration(finished, corpus):
    config = toy.make_config(corpus, finished)
    assert read_run(finished) == dataclasses.replace(config, run=RunConfig())


def run_interrupted(config, monkeypatch):
    """Ends before its fourth step."""
    start = qkv_jax.data.train_iterator
    with monkeypatch.context() as patch:
        patch.setattr(
            qkv_jax.data, "train_iterator", lambda s: Interrupted(start(s), 3)
        )
        with pytest.raises(KeyboardInterrupt):
            toy.run(config)
    assert read_result(config.run.directory) is None


def test_an_interrupted_run_ends_as_a_straight_one(
    finished, corpus, tmp_path, monkeypatch
):
    directory = tmp_path / "again"
    config = toy.make_config(corpus, directory)
    run_interrupted(config, monkeypatch)
    # As a version wrote it that knew fewer fields.
    file = directory / "config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    del content["precision"], content["model"]["remat"]
    file.write_text(json.dumps(content), encoding="utf-8")
    result = toy.run(config)
    assert result["test"] == read_result(finished)["test"]
    assert result == read_result(directory)
    resumed, straight = load_run(directory).params, load_run(finished).params
    jax.tree.map(np.testing.assert_array_equal, resumed, straight)


def test_subwords_of_every_epoch_are_drawn_alike_by_a_run_that_goes_on(
    corpus, tmp_path, monkeypatch
):
    def config(name):
        made = toy.make_config(corpus, tmp_path / name, mesh=MeshConfig(data=1))
        changes = {"sampling": 0.2, "packing": True, "batch_tokens": 1536}
        text = dataclasses.replace(made.text, **changes)
        data = ParallelData(directory=corpus, valid=(), test=())
        return dataclasses.replace(made, text=text, data=data)

    monkeypatch.setattr("qkv_jax.translation.run._finish", lambda *_: Outcome())
    straight, again = config("straight"), config("again")
    assert prepare(straight).stream.batches(0) <= 2  # it is stopped in a later epoch
    toy.run(straight)
    run_interrupted(again, monkeypatch)
    toy.run(again)
    params = (load_run(run.run.directory).params for run in (straight, again))
    jax.tree.map(np.testing.assert_array_equal, *params)


def test_a_run_goes_on_on_another_mesh_with_the_same_batches(
    finished, corpus, tmp_path
):
    directory = tmp_path / "moved"
    shutil.copytree(finished, directory)  # made on data 8
    shutil.rmtree(directory / "checkpoints" / "4")
    (directory / "result.json").unlink()
    result = toy.run(
        toy.make_config(corpus, directory, mesh=MeshConfig(data=2, fsdp=4))
    )
    assert result["steps"] == 4

    def curve(run):
        rows = [row for row in read_metrics(run) if "train/loss" in row]
        return [(row["step"], row["train/tokens"], row["train/loss"]) for row in rows]

    np.testing.assert_allclose(curve(directory), curve(finished), rtol=1e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
        *(jax.device_get(load_run(run).params) for run in (directory, finished)),
    )


def test_a_finished_run_is_refused_and_untouched(finished, corpus):
    before = toy.contents(finished)
    with pytest.raises(RunError, match="is a finished run"):
        toy.run(toy.make_config(corpus, finished))
    assert toy.contents(finished) == before


@pytest.mark.parametrize("done", [True, False])
def test_another_configurations_run_is_refused_and_untouched(
    finished, corpus, tmp_path, done
):
    directory = shutil.copytree(finished, tmp_path / "run")
    if not done:
        (directory / "result.json").unlink()
    before = toy.contents(directory)
    config = toy.make_config(corpus, directory, label_smoothing=0.2)
    with pytest.raises(RunError, match="label_smoothing: 0.1 there, 0.2 here"):
        toy.run(config)
    assert toy.contents(directory) == before


def test_other_text_is_another_run(finished, corpus, tmp_path):
    other = shutil.copytree(corpus, tmp_path / "corpus")
    for language in ("en", "de"):
        with (other / f"train.{language}").open("a", encoding="utf-8") as file:
            file.write("a new and longer sentence\n")
    content = json.loads((finished / "config.json").read_text("utf-8"))
    tokenizers = [
        prepare(toy.make_config(place, tmp_path / "run")).tokenizer.digest
        for place in (corpus, other)
    ]
    assert tokenizers[0] == content["tokenizer"] != tokenizers[1]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mesh": MeshConfig(data=99)}, RunError, "mesh: the mesh asks for 99 devices"),
        (
            {"training": TrainingConfig(steps=4, patience=1)},
            DataError,
            "training.patience needs validation text",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(
    corpus, tmp_path, change, error, message
):
    data = ParallelData(directory=corpus, valid=(), test=())
    config = toy.make_config(corpus, tmp_path / "run", **change)
    with pytest.raises(error, match=message):
        toy.run(dataclasses.replace(config, data=data))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("checkpoint", ["latest", "best", 4])
def test_a_checkpoint_is_chosen_by_name_or_step(finished, translator, checkpoint):
    chosen = load_run(finished, checkpoint=checkpoint)
    jax.tree.map(np.testing.assert_array_equal, chosen.params, translator.params)


def test_a_run_that_averages_is_used_with_the_mean_of_its_last_checkpoints(
    finished, tmp_path
):
    directory = shutil.copytree(finished, tmp_path / "run")
    content = json.loads((directory / "config.json").read_text("utf-8"))
    content["training"]["average"] = 2
    (directory / "config.json").write_text(json.dumps(content), encoding="utf-8")
    parts = (load_run(directory, checkpoint=step).params for step in (2, 4))
    jax.tree.map(
        lambda mean, x, y: np.testing.assert_allclose(mean, (x + y) / 2, atol=1e-6),
        load_run(directory).params,
        *parts,
    )


def test_an_earlier_checkpoint_is_another_model(finished, translator):
    early = load_run(finished, checkpoint=2)
    leaves = zip(jax.tree.leaves(early.params), jax.tree.leaves(translator.params))
    assert any(np.any(one != other) for one, other in leaves)


def test_a_checkpoint_that_is_not_there_is_refused(finished):
    with pytest.raises(RunError, match="no checkpoint of step 3: choose one of 2, 4"):
        load_run(finished, checkpoint=3)
    with pytest.raises(RunError, match="training.average 1, so there is no average"):
        load_run(finished, checkpoint="average")


def test_a_run_of_another_task_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"task": "vision"}', encoding="utf-8")
    with pytest.raises(RunError, match="is not a run of this version's translation"):
        read_run(tmp_path)
