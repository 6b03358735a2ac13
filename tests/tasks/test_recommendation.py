"""The experiments on recommendation, shrunk: on eight devices as on one, and scored."""

import dataclasses

import pytest

from qkv_jax.data.ratings import Ratings
from qkv_jax.training import MeshConfig, RunConfig
from tests.data.test_ratings import write_ratings
from tests.tasks.toy import run
from tests.test_experiments import ROOT, load


def train(name, directory, mesh):
    config = load(ROOT / f"experiments/recommendation/{name}.py").CONFIG
    assert config.data.longest == config.model.longest
    config = dataclasses.replace(
        config,
        data=Ratings(directory=write_ratings(directory / "data"), longest=7),
        model=dataclasses.replace(
            config.model, longest=7, d_model=8, d_ff=16, heads=2, layers=1
        ),
        # A large eps: Adam's first steps are the gradients' signs else, which rounding can turn.
        optimizer=dataclasses.replace(config.optimizer, warmup_steps=1, eps=1e-3),
        training=dataclasses.replace(config.training, steps=3),
        batch_rows=16,
        eval_rows=None,
        mesh=mesh,
        run=RunConfig(directory=directory / "run"),
    )
    return run(config)


def test_sasrec_trains_on_eight_devices_as_on_one(tmp_path):
    many = train("sasrec", tmp_path / "many", MeshConfig(data=4, tensor=2))
    one = train("sasrec", tmp_path / "one", MeshConfig(data=1))
    assert many["test"]["loss"] == pytest.approx(one["test"]["loss"], rel=1e-4)


def test_bert4rec_trains_on_eight_devices_and_is_ranked(tmp_path):
    result = train("bert4rec", tmp_path, MeshConfig(data=4, tensor=2))
    assert {"hr@10", "ndcg@10", "mrr"} <= set(result["test"])
