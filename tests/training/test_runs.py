import json

import pytest

from qkv_jax.training import (
    RunError,
    finish_run,
    is_finished,
    locked,
    open_run,
    read_config,
)

CONFIG = {"training": {"steps": 100, "seed": 0}, "model": {"width": 64}}


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_new_then_resumed(tmp_path):
    run = tmp_path / "deep" / "run"
    assert open_run(run, CONFIG) == "new"
    assert read_config(run) == CONFIG
    assert open_run(run, CONFIG) == "resume"


def test_a_run_killed_in_its_first_write_is_new(tmp_path):
    (tmp_path / "config.json.tmp").write_text("{")
    assert open_run(tmp_path, CONFIG) == "new"
    assert read_config(tmp_path) == CONFIG


def test_a_finished_run_is_left_alone(tmp_path):
    open_run(tmp_path, CONFIG)
    assert not is_finished(tmp_path)
    finish_run(tmp_path, {"bleu": 40.0})
    before = contents(tmp_path)
    with pytest.raises(
        RunError, match=r"is a finished run: use `qkv-jax evaluate .*--run\.directory"
    ):
        open_run(tmp_path, CONFIG)
    assert contents(tmp_path) == before
    assert json.loads((tmp_path / "result.json").read_text()) == {"bleu": 40.0}


def test_a_run_of_another_configuration_names_what_differs(tmp_path):
    open_run(tmp_path, CONFIG)
    before = contents(tmp_path)
    other = {"training": {"steps": 200, "seed": 0, "new": "x"}, "model": {"width": 64}}
    with pytest.raises(RunError) as error:
        open_run(tmp_path, other)
    assert (
        '(training.new: absent there, "x" here; training.steps: 100 there, 200 here)'
        in str(error.value)
    )
    assert "--run.directory" in str(error.value)
    assert contents(tmp_path) == before


def test_few_of_many_differences_are_shown(tmp_path):
    open_run(tmp_path, {f"option{i}": i for i in range(9)})
    with pytest.raises(RunError, match="option3: 3 there, 4 here; and 5 more"):
        open_run(tmp_path, {f"option{i}": i + 1 for i in range(9)})


def test_a_directory_that_is_not_a_run_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="not empty and not a run"):
        open_run(tmp_path, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(RunError, match="cannot be a run directory"):
        open_run(tmp_path / "thesis.txt", CONFIG)
    with pytest.raises(RunError, match="is not a run"):
        read_config(tmp_path)


def test_an_unreadable_config_is_an_error(tmp_path):
    open_run(tmp_path, CONFIG)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RunError, match="cannot be read"):
        open_run(tmp_path, CONFIG)


def test_a_run_in_use_is_refused_until_it_is_left(tmp_path):
    with locked(tmp_path):
        second = locked(tmp_path)
        with pytest.raises(RunError, match="in use by another process"), second:
            pass
    with locked(tmp_path):
        pass
