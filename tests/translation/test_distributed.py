"""A run of two processes: the same losses as one with as many devices, also if it is stopped."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qkv_jax.cli import main
from qkv_jax.training import DistributedConfig
from qkv_jax.training.stopping import Signals
from qkv_jax.translation.run import read_result
from tests import compiling

ROOT = Path(__file__).parents[2]
MESH = ["--mesh.data", "2", "--mesh.fsdp", "2"]
STEPS = 12
# The command line, in the second of two processes: it is sent SIGTERM at its second stop point. The
# notice takes a second or so to get around, so that both go slowly from there on.
STOPPED = """
import os, signal, sys, time
import jax
from qkv_jax import cli
from qkv_jax.data import BatchStream
from qkv_jax.training.stopping import Signals

make = BatchStream.__getitem__

def told(stream, index):
    batch = make(stream, index)
    print(f"made {len(batch['target'])} rows", flush=True)
    return batch

BatchStream.__getitem__ = told
due, asked = Signals.due, []

def slow(signals):
    asked.append(signals)
    if len(asked) == 2 and jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    if len(asked) > 1:
        time.sleep(0.5)
    return due(signals)

Signals.due = slow
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def experiment(corpus, tmp_path_factory):
    file = tmp_path_factory.mktemp("experiment") / "tiny.py"
    file.write_text(
        "from pathlib import Path\n"
        "from tests.translation import toy\n"
        f"CONFIG = toy.make_config(Path({str(corpus)!r}), None, steps={STEPS})\n"
    )
    return file


def start(experiment, directory, index, port, program):
    environment = compiling.environment(2)
    command = [sys.executable, *program, "train", str(experiment), *MESH]
    command += ["--run.directory", str(directory)]
    command += ["--distributed.coordinator", f"127.0.0.1:{port}"]
    command += ["--distributed.processes", "2", "--distributed.index", str(index)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def two_processes(experiment, directory, program=("-m", "qkv_jax")):
    """Exit codes and output of both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        start(experiment, directory, index, port, program) for index in range(2)
    ]
    try:
        printed = [process.communicate(timeout=400)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], printed


def rows_of(directory):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    kept = ("step", "train/loss", "validation/loss", "validation/bleu")
    return [
        {name: row[name] for name in kept if name in row}
        for row in map(json.loads, lines)
    ]


def one_process(experiment, directory):
    arguments = [str(experiment), *MESH, "--run.directory", str(directory)]
    return main(["train", *arguments])


@pytest.fixture(scope="module")
def straight(experiment, tmp_path_factory):
    """A run of one process with four devices that nothing stopped."""
    directory = tmp_path_factory.mktemp("straight") / "run"
    assert one_process(experiment, directory) == 0
    return directory


def alike(found, wanted):
    """The losses and scores of all steps, and of the test part."""
    rows = [rows_of(directory) for directory in (found, wanted)]
    assert [row.keys() for row in rows[0]] == [row.keys() for row in rows[1]]
    for here, there in zip(*rows):
        for name in here:
            np.testing.assert_allclose(here[name], there[name], rtol=1e-5)
    assert read_result(found)["test"] == read_result(wanted)["test"]
    card, other = ((x / "model_card.md").read_text("utf-8") for x in (found, wanted))
    titles = [re.findall(r"\n## (.*)", text) for text in (card, other)]
    assert titles[0] == titles[1]
    assert "Metrics" in titles[0]


def test_two_processes_go_on_with_what_one_began(
    experiment, straight, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        patch.setattr(Signals, "due", lambda signals: True)
        assert one_process(experiment, tmp_path / "run") == 143
    assert "step 1 is saved" in capsys.readouterr().err
    codes, printed = two_processes(experiment, tmp_path / "run")
    assert codes == [0, 0], printed
    alike(tmp_path / "run", straight)
    assert "parameters" in printed[0] and "parameters;" not in printed[1]
    # A finished run is refused in one line by both, and nothing hangs.
    codes, printed = two_processes(experiment, tmp_path / "run")
    assert codes == [2, 2] and all("is a finished run" in text for text in printed)


def test_one_process_goes_on_with_what_two_left_as_one_was_told_to_stop(
    experiment, straight, tmp_path
):
    codes, printed = two_processes(experiment, tmp_path / "run", ("-c", STOPPED))
    assert codes == [143, 143], printed
    said = [re.findall(r"interrupted: step (\d+) is saved", text) for text in printed]
    assert said[0] == said[1] and 1 < int(said[0][0]) < STEPS
    # Each made its half of the rows of every batch.
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    for text in printed:
        made = {int(rows) for rows in re.findall(r"made (\d+) rows", text)}
        assert made == {rows // 2 for rows in config["batch_rows"]}
    assert one_process(experiment, tmp_path / "run") == 0
    alike(tmp_path / "run", straight)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"coordinator": "a:1"}, "go together"),
        ({"coordinator": "a", "processes": 2, "index": 0}, "host:port"),
        ({"coordinator": "a:1", "processes": 2, "index": 2}, "must be in 0"),
        (
            {"coordinator": "a:1", "processes": 2, "index": 0, "detect": True},
            "give one",
        ),
    ],
)
def test_what_does_not_fit_together_is_an_error(fields, message):
    with pytest.raises(ValueError, match=message):
        DistributedConfig(**fields)


def test_a_mesh_that_does_not_divide_the_model_leaves_no_directory(
    experiment, tmp_path, capsys
):
    arguments = ["--mesh.tensor", "8", "--run.directory", str(tmp_path / "run")]
    assert main(["train", str(experiment), *arguments]) == 2
    assert "error: mesh: " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
