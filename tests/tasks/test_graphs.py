"""The experiments on graphs, shrunk: on eight devices, which share out the heads, as on one."""

import dataclasses

import pytest

from qkv_jax.data.citations import CitationGraph
from qkv_jax.training import MeshConfig, RunConfig
from tests.data.test_citations import write_graph
from tests.tasks.toy import run
from tests.test_experiments import ROOT, load


def train(name, directory, **changes):
    config = load(ROOT / f"experiments/graphs/{name}.py").CONFIG
    config = dataclasses.replace(
        config,
        data=CitationGraph(directory=write_graph(directory / "data")),
        model=dataclasses.replace(config.model, head_size=2),
        # A large eps: Adam's first steps are the gradients' signs else, which rounding can turn.
        optimizer=dataclasses.replace(config.optimizer, eps=1e-3),
        training=dataclasses.replace(config.training, steps=3),
        run=RunConfig(directory=directory / "run"),
    )
    assert config.mesh == MeshConfig(data=1, tensor=-1)
    return run(dataclasses.replace(config, **changes))


def test_heads_over_eight_devices_train_as_on_one(tmp_path):
    many = train("gat", tmp_path / "many")
    one = train("gat", tmp_path / "one", mesh=MeshConfig(data=1))
    assert many["steps"] == 3
    assert many["test"] == pytest.approx(one["test"], rel=1e-5)


def test_gatv2_trains_over_eight_devices(tmp_path):
    assert 0.0 <= train("gatv2", tmp_path)["test"]["accuracy"] <= 1.0
