"""The experiments on text, shrunk: three steps on one device and on eight are the same run."""

import dataclasses
import io

import numpy as np
import pytest
from rich.console import Console

from qkv_jax.data import LabelledDocuments
from qkv_jax.tasks import load_task
from qkv_jax.training import MeshConfig, read_metrics, train_task
from tests.test_experiments import ROOT, load

FILES = [
    ROOT / "experiments" / name
    for name in (
        "text_classification/plain.py",
        "text_classification/bert.py",
        "long_text/windowed.py",
    )
]


def shrink(config, directory):
    """The experiment on a few short texts, in three steps of a small model."""
    for number in range(40):
        kind = "good" if number % 2 else "bad"
        path = directory / "texts" / kind / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"the film {number % 7} is so {kind} it hurts !")
    features = dataclasses.replace(config.data.features, length=9, least=1)
    if features.buckets:
        features = dataclasses.replace(features, buckets=32, most=4)
    model = {"d_model": 16, "heads": 2, "d_ff": 24}
    window = config.model.window and 4
    return dataclasses.replace(
        config,
        data=LabelledDocuments(path=directory / "texts", features=features),
        model=dataclasses.replace(config.model, **model, window=window),
        batch_rows=8,
        eval_rows=8,
        optimizer=dataclasses.replace(config.optimizer, warmup_steps=1),
        training=dataclasses.replace(
            config.training, steps=3, evaluate_every=3, checkpoint_every=3, log_every=1
        ),
    )


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_three_steps_on_eight_devices_are_those_on_one(file, tmp_path):
    losses, results = [], []
    for devices in (1, 8):
        config = shrink(load(file).CONFIG, tmp_path)
        run = dataclasses.replace(config.run, directory=tmp_path / f"run{devices}")
        config = dataclasses.replace(config, mesh=MeshConfig(data=devices), run=run)
        results.append(train_task(config, console=Console(file=io.StringIO())))
        rows = read_metrics(run.directory)
        losses.append([row["train/loss"] for row in rows if "train/loss" in row])
    assert len(losses[0]) == 3
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert results[0]["test"] == pytest.approx(results[1]["test"], rel=1e-4)
    if file is FILES[0]:
        trained = load_task(tmp_path / "run1")
        assert trained.predict(trained.splits.test)["logits"].shape == (8, 2)
