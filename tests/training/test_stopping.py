"""Signals are heeded where a run can be left, and nothing is lost by it."""

import os
import signal

import jax.numpy as jnp
import pytest

from qkv_jax.training import (
    Interrupted,
    evaluate_loss,
    make_mesh,
    restore_params,
    saved_at,
    stop_point,
)
from qkv_jax.training.checkpoint import CheckpointStore
from qkv_jax.training.stopping import Signals, Stopped
from tests.training import toy
from tests.training.test_loop import progress, squared


def stopped_at(evaluation, number=signal.SIGTERM):
    """Evaluates like `squared`, and is sent a signal in the midst of this evaluation."""
    made = []

    def evaluate(params):
        made.append(params)
        if len(made) == evaluation:
            os.kill(os.getpid(), number)
        stop_point()
        return squared(params)

    return evaluate


def test_an_evaluation_is_left_and_made_when_the_run_goes_on(tmp_path):
    # In the evaluation of step 2, in the same when it is made up for, in that of the last step.
    for evaluation, step in ((2, 2), (1, 2), (3, 4)):
        with pytest.raises(Interrupted, match=f"step {step} is saved") as interrupted:
            toy.run(tmp_path / "stopped", evaluate=stopped_at(evaluation))
        assert interrupted.value.signal == signal.SIGTERM
    resumed = toy.run(tmp_path / "stopped", evaluate=squared)
    straight = toy.run(tmp_path / "straight", evaluate=squared)
    toy.assert_same_bits(resumed.state, straight.state)
    assert progress(tmp_path / "stopped", resumed.state) == progress(
        tmp_path / "straight", straight.state
    )
    losses = [
        [row.get("validation/loss") for row in run.history]
        for run in (resumed, straight)
    ]
    assert losses[0] == losses[1]
    best = [restore_params(tmp_path / x, toy.params()) for x in ("stopped", "straight")]
    toy.assert_same_bits(*best)


def test_loss_is_evaluated_up_to_the_batch_in_which_a_signal_came():
    seen = []

    def batches():
        for number in range(5):
            seen.append(number)
            if number == 2:
                os.kill(os.getpid(), signal.SIGINT)
            yield {}

    def step(params, batch):
        return {"loss_sum": jnp.ones(()), "tokens": jnp.ones(())}

    with Signals() as signals, pytest.raises(Stopped):
        evaluate_loss(step, None, batches(), mesh=make_mesh())
    assert seen == [0, 1, 2] and signals.received == signal.SIGINT


def test_work_after_the_last_checkpoint_says_where_it_is():
    with pytest.raises(Interrupted, match="step 7 is saved in run"), saved_at(7, "run"):
        stop_point()
        os.kill(os.getpid(), signal.SIGINT)
        stop_point()
    stop_point()  # Nobody waits any more.


def test_a_second_signal_ends_the_process_at_once(monkeypatch):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    with Signals():
        os.kill(os.getpid(), signal.SIGTERM)
        assert not codes
        os.kill(os.getpid(), signal.SIGINT)
    assert codes == [130]


def test_what_a_checkpoint_is_told_replaces_its_progress(tmp_path):
    result = toy.run(tmp_path, steps=1)
    with CheckpointStore(tmp_path, keep=1) as store:
        store.tell(1, {"best_step": 1, "data": {"position": 5}})
        assert store.restore(result.state)[1]["data"] == {"position": 5}
    (tmp_path / "checkpoints" / "1" / "progress" / "metadata").write_text('{"best')
    with (
        CheckpointStore(tmp_path, keep=1) as store,
        pytest.raises(ValueError, match="is cut short or damaged"),
    ):
        store.restore(result.state)
