"""Every experiment: its command, its shapes, and two steps of it on a toy corpus."""

import functools
import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from qkv_jax.tasks import TaskConfig
from qkv_jax.training import read_metrics
from qkv_jax.translation import TranslationConfig
from qkv_jax.translation.loss import make_loss
from qkv_jax.translation.models import init_params
from tests.translation import toy

ROOT = Path(__file__).parents[1]
LESSON = ROOT / "experiments" / "walkthrough"
FILES = [
    file
    for file in sorted((ROOT / "experiments").rglob("*.py"))
    if file.parent != LESSON
]


def load(file):
    spec = importlib.util.spec_from_file_location(f"experiment_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def of(files):
    return pytest.mark.parametrize("file", files, ids=lambda file: file.stem)


each = of(FILES)
TRANSLATION = [
    file for file in FILES if isinstance(load(file).CONFIG, TranslationConfig)
]
OTHERS = [file for file in FILES if file not in TRANSLATION]


@each
def test_its_docstring_gives_a_command_that_names_it(file):
    (path,) = re.findall(r"^ {4}qkv-jax train (\S+)", load(file).__doc__, re.MULTILINE)
    assert ROOT / path == file


@of(OTHERS)
def test_a_run_of_it_can_be_read_back(file):
    """What it trains is tested with its task, in tests/tasks."""
    content = json.loads(json.dumps(load(file).CONFIG.to_json()))
    assert TaskConfig.from_json(content).to_json() == content


@of(TRANSLATION)
def test_its_model_and_loss_have_shapes(file):
    config = load(file).CONFIG
    vocabulary = config.text.vocabulary
    model = config.model.__class__(**(vars(config.model) | {"vocabulary": vocabulary}))
    params = jax.eval_shape(functools.partial(init_params, model, seed=0))
    shapes = [leaf.shape for leaf in jax.tree.leaves(params)]
    assert (vocabulary, model.d_model) in shapes
    row = {
        "source": jax.ShapeDtypeStruct((2, config.text.max_source), "int32"),
        "target": jax.ShapeDtypeStruct((2, config.text.max_target), "int32"),
    }
    loss = make_loss(model, config.label_smoothing)
    total, sums = jax.eval_shape(functools.partial(loss, rng=None), params, row)
    assert total.shape == sums["tokens"].shape == ()


@of(TRANSLATION)
def test_it_trains_two_steps_shrunk(file, tmp_path, monkeypatch):
    monkeypatch.setenv("QKV_JAX_CACHE", str(tmp_path / "cache"))
    corpus = toy.write_corpus(tmp_path / "corpus")
    config = toy.shrink(
        load(file).CONFIG, corpus=corpus, directory=tmp_path / "run", steps=2
    )
    result = toy.run(config)
    assert result["steps"] == 2
    assert 0 <= result["test"]["bleu"] <= 100
    losses = [row["train/loss"] for row in read_metrics(tmp_path / "run")[:2]]
    assert all(loss > 0 for loss in losses)


def test_the_lesson_runs_as_a_notebook(monkeypatch, tmp_path):
    """Its cells hold what they say by assertions of their own."""
    script = (LESSON / "walkthrough.py").read_text(encoding="utf-8")
    text = (LESSON / "walkthrough.ipynb").read_text(encoding="utf-8")
    assert text == load(LESSON / "notebook.py").notebook(script)
    monkeypatch.setattr("sys.argv", ["notebook", "-f", "kernel.json"])
    cells = json.loads(text)["cells"]
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    (tmp_path / "cells.py").write_text("\n".join(code), encoding="utf-8")
    assert runpy.run_path(str(tmp_path / "cells.py"))["right"] > 0.95


def test_the_lesson_runs_as_a_script(tmp_path):
    environment = os.environ | {"XLA_FLAGS": ""}
    command = [sys.executable, str(LESSON / "walkthrough.py"), str(tmp_path)]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    assert len(list(tmp_path.glob("*.png"))) == 5
