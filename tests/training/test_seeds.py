"""Several seeds of one configuration: where they lie, what is trained again, and their mean."""

import dataclasses
import io
import json

import pytest
from rich.console import Console

from qkv_jax.training import MeshConfig, RunConfig, RunError, train_seeds
from tests.tasks import toy


def run(directory, *, seeds, rows=16):
    config = toy.make_config(directory, steps=2, mesh=MeshConfig(data=1))
    run = RunConfig(directory=directory, seeds=seeds)
    config = dataclasses.replace(config, run=run, batch_rows=rows)
    said = io.StringIO()
    return train_seeds(config, console=Console(file=said)), said.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("seeds") / "runs"
    return directory, *run(directory, seeds=2)


def test_the_result_is_the_mean_and_deviation_of_runs_that_differ(finished):
    directory, result, _ = finished
    losses = [
        json.loads((directory / f"seed-{seed}/result.json").read_text())["test"]["loss"]
        for seed in (0, 1)
    ]
    assert losses[0] != losses[1]
    assert result["seeds"] == [0, 1]
    assert result["test"]["loss"] == pytest.approx(
        {
            "mean": sum(losses) / 2,
            "deviation": abs(losses[0] - losses[1]) / 2**0.5,
        }
    )
    assert json.loads((directory / "result.json").read_text()) == result


def test_more_seeds_are_added_to_those_that_are_finished(finished):
    directory, result, said = finished
    assert "seed 0" in said and "seed 1" in said
    more, said = run(directory, seeds=3)
    assert "seed 2" in said and "seed 1" not in said
    assert more["seeds"] == [0, 1, 2] and more["test"] != result["test"]


def test_seeds_of_another_configuration_are_refused(finished):
    directory, _, _ = finished
    with pytest.raises(RunError, match="batch_rows: 16 there, 8 here"):
        run(directory, seeds=2, rows=8)


def test_their_number_must_be_positive():
    with pytest.raises(ValueError, match="seeds must be at least 1"):
        RunConfig(seeds=0)
