"""A run of two processes: the same losses as one with as many devices."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qkv_jax.cli import main
from qkv_jax.training import DistributedConfig
from qkv_jax.translation.run import read_result

ROOT = Path(__file__).parents[2]
MESH = ["--mesh.data", "2", "--mesh.fsdp", "2"]


@pytest.fixture(scope="module")
def experiment(corpus, tmp_path_factory):
    file = tmp_path_factory.mktemp("experiment") / "tiny.py"
    file.write_text(
        "from pathlib import Path\n"
        "from tests.translation import toy\n"
        f"CONFIG = toy.make_config(Path({str(corpus)!r}), None, steps=3)\n"
    )
    return file


def start(experiment, directory, index, port):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "qkv_jax", "train", str(experiment), *MESH]
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


def two_processes(experiment, directory):
    """Exit codes and output of both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start(experiment, directory, index, port) for index in range(2)]
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


def test_two_processes_of_two_devices_equal_one_of_four(experiment, tmp_path):
    codes, printed = two_processes(experiment, tmp_path / "two")
    assert codes == [0, 0], printed
    arguments = [str(experiment), *MESH, "--run.directory", str(tmp_path / "one")]
    assert main(["train", *arguments]) == 0
    two, one = rows_of(tmp_path / "two"), rows_of(tmp_path / "one")
    assert [row.keys() for row in two] == [row.keys() for row in one]
    for here, there in zip(two, one):
        for name in here:
            np.testing.assert_allclose(here[name], there[name], rtol=1e-5)
    assert "parameters" in printed[0] and "parameters;" not in printed[1]
    first, second = read_result(tmp_path / "two"), read_result(tmp_path / "one")
    assert first["test"] == second["test"]
    # A finished run is refused in one line by both, and nothing hangs.
    codes, printed = two_processes(experiment, tmp_path / "two")
    assert codes == [2, 2] and all("is a finished run" in text for text in printed)


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
