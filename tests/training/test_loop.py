import itertools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax.training import (
    RunError,
    TrainingConfig,
    checkpoint_steps,
    make_mesh,
    read_metrics,
    restore_params,
)
from qkv_jax.training.checkpoint import CheckpointStore
from tests import compiling
from tests.training import toy

ROOT = Path(__file__).parents[2]


def progress(directory, state):
    """The bookkeeping of the latest checkpoint, without the wall time."""
    with CheckpointStore(directory, keep=9) as store:
        found = store.restore(state)[1]
    return {name: value for name, value in found.items() if name != "seconds"}


def squared(params):
    return {"loss": float(jnp.sum(params["embed"] ** 2))}


class Stop(Exception):
    pass


def stop_at(step):
    def callback(done, state, metrics):
        if done == step:
            raise Stop

    return callback


def test_two_steps_then_two_more_equal_four_bit_for_bit(tmp_path):
    all_devices = {"mesh": make_mesh(), "evaluate": squared}
    straight = toy.run(tmp_path / "a", **all_devices)
    with pytest.raises(Stop):
        toy.run(tmp_path / "b", **all_devices, callbacks=[stop_at(2)])
    assert checkpoint_steps(tmp_path / "b") == [1, 2]
    iterator = toy.Batches()
    resumed = toy.run(tmp_path / "b", **all_devices, iterator=iterator)
    toy.assert_same_bits(resumed.state, straight.state)
    assert progress(tmp_path / "b", resumed.state) == progress(
        tmp_path / "a", straight.state
    )
    assert iterator.position == 4
    assert resumed.all_seconds > resumed.seconds > 0
    assert resumed.tokens == straight.tokens > 0
    steps = [row["step"] for row in resumed.history if "train/loss" in row]
    assert steps == [1, 2, 3, 4]


SCRIPT = """
import os, signal, sys
from tests.training import toy
from tests.training.test_loop import squared
def kill(step, state, metrics):
    if step == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
toy.run(sys.argv[1], evaluate=squared, callbacks=[kill])
"""


def test_a_killed_run_goes_on_as_if_nothing_had_been(tmp_path):
    environment = compiling.environment(8)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "killed")]
    for step in (2, 3):  # right after the save of that step was started
        ended = subprocess.run(
            [*command, str(step)],
            check=False,
            env=environment,
            cwd=ROOT,
            capture_output=True,
        )
        assert ended.returncode == -9, ended.stderr.decode()
        assert set(checkpoint_steps(tmp_path / "killed")) & {step - 1, step}
    resumed = toy.run(tmp_path / "killed", evaluate=squared)
    straight = toy.run(tmp_path / "straight", evaluate=squared)
    toy.assert_same_bits(resumed.state, straight.state)
    killed = progress(tmp_path / "killed", resumed.state)
    assert killed == progress(tmp_path / "straight", straight.state)
    assert killed["data"] == {"position": 4}
    losses = [
        [row.get("train/loss") for row in run.history] for run in (resumed, straight)
    ]
    assert losses[0] == losses[1]


def test_training_lowers_the_loss_and_reports_itself(tmp_path):
    batches = toy.Batches()
    result = toy.run(
        tmp_path, steps=30, iterator=batches, log_every=10, checkpoint_every=20
    )
    rows = [row for row in result.history if "train/loss" in row]
    assert [row["step"] for row in rows] == [10, 20, 30]
    assert rows[-1]["train/loss"] < 0.9 * rows[0]["train/loss"]
    assert checkpoint_steps(tmp_path) == [20, 30]
    assert (result.step, result.compilations, result.best_step) == (30, 2, None)
    assert result.steady_tokens_per_second > result.tokens_per_second > 0
    assert 0 < result.compile_seconds < result.seconds
    assert result.history == read_metrics(tmp_path)


def scores(values):
    values = iter(values)
    return lambda params: {"bleu": next(values)}


def test_patience_ends_the_run_and_the_best_stays(tmp_path):
    options = {"metric": "bleu", "mode": "max", "patience": 2, "keep": 1, "steps": 9}
    result = toy.run(tmp_path, evaluate=scores([1.0, 3.0, 2.0, 3.0, 9.0]), **options)
    assert (result.step, result.stopped_early) == (4, True)
    assert (result.best_step, result.best_value) == (2, 3.0)
    assert checkpoint_steps(tmp_path) == [2, 4]
    best = restore_params(tmp_path, toy.params())
    assert not jnp.array_equal(best["embed"], result.state.ema["embed"])
    again = toy.run(tmp_path, evaluate=scores([]), **options)  # ended is ended
    assert (again.step, again.stopped_early) == (4, True)


def test_patience_is_remembered_over_a_resume(tmp_path):
    options = {"patience": 3, "steps": 9, "metric": "bleu", "mode": "max"}
    with pytest.raises(Stop):
        toy.run(
            tmp_path,
            evaluate=scores([5.0, 1.0, 1.0]),
            callbacks=[stop_at(3)],
            **options,
        )
    result = toy.run(tmp_path, evaluate=scores([1.0]), **options)
    assert (result.step, result.stopped_early, result.best_step) == (4, True, 1)


def test_evaluation_sees_the_moving_average(tmp_path):
    seen = []
    evaluate = lambda params: seen.append(params["embed"] + 0) or {"loss": 0.0}
    result = toy.run(tmp_path, steps=2, evaluate=evaluate)
    assert jnp.array_equal(seen[-1], result.state.ema["embed"])
    assert not jnp.array_equal(seen[-1], result.state.params["embed"])


def poisoned(steps):
    """A loss function and an iterator; the loss of these steps is NaN."""
    numbers = itertools.count(1)

    class Poisoned(toy.Batches):
        def __next__(self):
            batch = super().__next__()
            return batch | {
                "scale": np.full(16, np.nan if next(numbers) in steps else 1.0)
            }

    def loss_fn(params, batch, rng):
        loss, sums = toy.loss_fn(params, batch, rng)
        loss = loss * batch["scale"][0]
        return loss, sums | {"loss_sum": loss}

    return {"loss_fn": loss_fn, "iterator": Poisoned()}


def test_an_update_that_is_not_finite_is_skipped_and_counted(tmp_path):
    result = toy.run(tmp_path, steps=4, **poisoned([3]))
    assert sum(row.get("train/skipped", 0) for row in result.history) == 1
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(result.state.params))
    assert int(result.state.step) == 4


def test_many_in_a_row_end_the_run_and_keep_the_batch(tmp_path):
    with pytest.raises(RunError, match="10 steps in a row .* up to step 12"):
        toy.run(tmp_path, steps=20, **poisoned(range(3, 20)))
    with np.load(tmp_path / "not_finite.npz") as kept:
        assert kept["step"] == 12 and np.isnan(kept["scale"]).all()
    assert max(checkpoint_steps(tmp_path)) < 12


def test_callbacks_see_every_step(tmp_path):
    seen = []
    callback = lambda step, state, metrics: seen.append((step, int(state.step)))
    toy.run(tmp_path, steps=3, callbacks=[callback])
    assert seen == [(1, 1), (2, 2), (3, 3)]


def test_an_iterator_that_ends_is_an_error(tmp_path):
    class Short(toy.Batches):
        def __next__(self):
            if self.position == 2:
                raise StopIteration
            return super().__next__()

    with pytest.raises(ValueError, match="iterator must be endless"):
        toy.run(tmp_path, iterator=Short())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps": 1, "keep": 2, "average": 3}, "average must not exceed keep"),
        ({"steps": 900, "average": 2}, "average must not exceed the checkpoints"),
        ({"steps": 1, "mode": "best"}, "mode must be"),
        ({"steps": 1, "patience": 0}, "patience must be"),
        ({"steps": 1, "ema_decay": 1.0}, "ema_decay must be"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**options)


def test_misuse_of_evaluate_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="patience needs evaluate"):
        toy.run(tmp_path, patience=1)
    with pytest.raises(ValueError, match="must return the metric 'loss'; got bleu"):
        toy.run(tmp_path, evaluate=scores([1.0]))
