import io
import json

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from qkv_jax.training import MetricsWriter, RateMeter, RunError, read_metrics
from qkv_jax.training.metrics import ProgressLine, TrainLog


def write(directory, steps, *, step=0):
    with MetricsWriter(directory, step=step) as writer:
        for n in steps:
            writer.write(n, {"train/loss": 1.0 / n})


def device(loss, tokens, rate=0.5):
    values = {"loss": loss, "tokens": tokens, "learning_rate": rate}
    return {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}


def test_rows_go_to_json_lines_and_tensorboard(tmp_path):
    write(tmp_path, [1, 2])
    expected = [{"step": 1, "train/loss": 1.0}, {"step": 2, "train/loss": 0.5}]
    assert read_metrics(tmp_path) == expected
    (events,) = tmp_path.glob("events.*")
    assert events.stat().st_size > 0


def test_a_resumed_run_has_no_row_twice(tmp_path):
    write(tmp_path, [1, 2, 3, 4])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "trai')  # killed while it wrote
    write(tmp_path, [3, 4], step=2)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_a_value_that_is_not_finite_leaves_valid_json(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": float("nan")})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 1,
        "loss": None,
    }


def test_log_averages_windows_by_tokens_one_step_late(tmp_path):
    with MetricsWriter(tmp_path) as writer, quiet(4) as line:
        log = TrainLog(writer, line, every=2)
        log.push(1, device(2.0, 1), compiled=True)
        log.push(2, device(8.0, 3, rate=0.25), compiled=False)
        assert read_metrics(tmp_path) == []  # step 2 may still run
        log.push(3, device(1.0, 5), compiled=False)
        (row,) = read_metrics(tmp_path)
        log.finish()
    assert row["step"] == 2
    assert row["train/loss"] == (2.0 * 1 + 8.0 * 3) / 4
    assert row["train/tokens"] == 4
    assert row["train/learning_rate"] == 0.25
    assert [row["step"] for row in read_metrics(tmp_path)] == [2, 3]
    assert log.meter.tokens == 9
    assert log.meter.steady_tokens == 8  # step 1 was compiled


def test_a_loss_that_is_not_finite_names_run_and_step(tmp_path):
    with MetricsWriter(tmp_path) as writer, quiet(4) as line:
        log = TrainLog(writer, line, every=1)
        bad = {"skipped": np.float32(1), "grad_norm": np.float32(2)}
        log.push(1, device(float("nan"), 1) | bad, compiled=False)
        with pytest.raises(
            RunError, match=f"{tmp_path}: 1 steps in a row .*up to step 1 .loss nan"
        ):
            log.flush()


def test_rate_leaves_out_pauses_and_steady_rate_compilation(monkeypatch):
    clock = iter([10.0, 14.0, 24.0, 26.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    meter = RateMeter()
    meter.restart()
    meter.record(8, compiled=True)  # 4 s
    meter.restart()  # 10 s of evaluation
    meter.record(8, compiled=False)  # 2 s
    assert meter.rate == 16 / 6
    assert meter.steady_rate == 4


def quiet(steps, *, file=None, terminal=False, **options):
    console = Console(file=file or io.StringIO(), force_terminal=terminal, width=120)
    return ProgressLine(steps, console=console, **options)


def test_plain_lines_where_there_is_no_terminal():
    file = io.StringIO()
    with quiet(3, file=file, seconds=0.0) as line:
        line.update(1, loss=2.5, rate=1234.0)
    assert file.getvalue().startswith("step 1/3  loss 2.500  1,234 tokens/s  0:00 left")


def test_plain_lines_are_few():
    file = io.StringIO()
    with quiet(9, file=file, seconds=1000.0) as line:
        for step in range(1, 10):
            line.update(step, loss=1.0, rate=1.0)
    assert [text.split()[1] for text in file.getvalue().splitlines()] == ["9/9"]


def test_one_live_line_on_a_terminal():
    file = io.StringIO()
    with quiet(3, file=file, terminal=True) as line:
        line.update(2, loss=2.5, rate=1234.0)
    assert "step 2/3" in file.getvalue()
    assert "1,234 tokens/s" in file.getvalue()
