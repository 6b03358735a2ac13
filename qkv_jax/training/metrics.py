"""Metrics on their way to the user: metrics.jsonl, TensorBoard, the terminal, rates."""

import dataclasses
import json
import math
import os
import time
from pathlib import Path
from typing import Any, Self

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from qkv_jax.training.distributed import is_first
from qkv_jax.training.errors import NotFinite

METRICS_FILE = "metrics.jsonl"
# Of these a row has the last value, of others the mean.
LAST = ("learning_rate", "loss_scale")


class MetricsWriter:
    """Appends rows to metrics.jsonl and to TensorBoard event files, as a context manager.

    A row is {"step": 120, "train/loss": 3.1, ...}. Rows later than `step` are dropped when it
    opens, and so is a last line that a killed process left half written, so that the curves of
    a resumed run have no part twice.

    Of several processes only the first writes.

    Args:
        directory: of the run; made where absent.
        step: the step the run goes on from; 0 for a new run.
    """

    def __init__(self, directory: str | os.PathLike, *, step: int = 0):
        self.directory = Path(directory)
        self._first = is_first()
        if not self._first:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        _keep_until(self.directory / METRICS_FILE, step)
        self._file = (self.directory / METRICS_FILE).open("a", encoding="utf-8")
        # Imported here: whoever only translates needs none of it.
        from tensorboardX import SummaryWriter

        purge = step + 1 if step else None
        self._events = SummaryWriter(
            str(self.directory), purge_step=purge, write_to_disk=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._first:
            self._file.close()
            self._events.close()

    def write(self, step: int, values: dict[str, float]) -> None:
        """One row, flushed. A value that is not finite is null in metrics.jsonl."""
        if not self._first:
            return
        row = {
            name: value if math.isfinite(value) else None
            for name, value in values.items()
        }
        self._file.write(json.dumps({"step": step} | row) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)


def read_metrics(directory: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, in order; a half-written last line is left out."""
    file = Path(directory) / METRICS_FILE
    lines = (
        file.read_text(encoding="utf-8").splitlines(keepends=True)
        if file.exists()
        else []
    )
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _keep_until(file: Path, step: int) -> None:
    if not file.exists():
        return
    rows = [row for row in read_metrics(file.parent) if row["step"] <= step]
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    os.replace(temporary, file)


@dataclasses.dataclass
class RateMeter:
    """Tokens a second, over the time that is spent on training.

    Attributes:
        tokens: all counted.
        seconds: in which they were trained on.
        steady_tokens: of the steps in whose time nothing was compiled.
        steady_seconds: theirs.
    """

    tokens: float = 0.0
    seconds: float = 0.0
    steady_tokens: float = 0.0
    steady_seconds: float = 0.0
    _since: float = dataclasses.field(default_factory=time.perf_counter)

    def restart(self) -> None:
        """Leaves out the time since the last record."""
        self._since = time.perf_counter()

    def record(self, tokens: float, *, compiled: bool) -> None:
        """Counts the tokens of one finished step, and the time since the last record."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        self.tokens += tokens
        self.seconds += seconds
        if not compiled:
            self.steady_tokens += tokens
            self.steady_seconds += seconds

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def steady_rate(self) -> float:
        """Tokens a second, without compilation."""
        return self.steady_tokens / self.steady_seconds if self.steady_seconds else 0.0


class ProgressLine:
    """One live line on a terminal, a plain line now and then elsewhere; a context manager.

    Args:
        steps: of the whole run.
        start: the step it goes on from.
        unit: what is counted, such as tokens.
        console: where to; None: standard error.
        seconds: least time between plain lines.
    """

    def __init__(
        self,
        steps: int,
        *,
        start: int = 0,
        unit: str = "tokens",
        console: Console | None = None,
        seconds: float = 10.0,
    ):
        self._console = console or Console(stderr=True)
        self.unit = unit
        self._steps, self._start, self._seconds = steps, start, seconds
        self._began = self._printed = time.perf_counter()
        self._live = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._live.add_task("train", total=steps, completed=start, text="")

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def update(self, step: int, *, loss: float, rate: float) -> None:
        """Shows where the run is.

        Args:
            step: made.
            loss: per token, over the last window.
            rate: tokens a second.
        """
        text = f"loss {loss:.3f}  {rate:,.0f} {self.unit}/s"
        self._live.update(self._task, completed=step, text=text)
        now = time.perf_counter()
        if self._console.is_terminal or (
            now - self._printed < self._seconds and step < self._steps
        ):
            return
        self._printed = now
        left = (now - self._began) * (self._steps - step) / max(step - self._start, 1)
        minutes, seconds = divmod(round(left), 60)
        self.say(f"step {step}/{self._steps}  {text}  {minutes}:{seconds:02d} left")


class TrainLog:
    """Turns each step's device metrics into rows, without making the devices wait.

    Skipped steps count in "train/skipped" and in no mean. push() fetches the metrics of the step *before* the one it is given, which the devices have
    finished or are about to, while the given one runs.

    Args:
        writer: gets a row every `every` steps, the mean over their tokens.
        line: shown with each row.
        every: steps.
        max_skipped: skipped steps in a row that end the run.
    """

    def __init__(
        self,
        writer: MetricsWriter,
        line: ProgressLine,
        *,
        every: int,
        max_skipped: int = 1,
    ):
        self.meter = RateMeter()
        self._writer, self._line, self._every = writer, line, every
        self._max_skipped, self._in_a_row, self._skipped = max_skipped, 0, 0
        self._pending: tuple[int, Any] | None = None
        self._step = 0
        self._compiled = False
        self._window: list[dict[str, float]] = []
        self._window_rate = RateMeter()

    def push(self, step: int, metrics: dict[str, jax.Array], *, compiled: bool) -> None:
        """Takes the metrics of `step`, just dispatched; `compiled`: it was compiled first.

        Raises:
            NotFinite: see flush.
        """
        self._compiled |= compiled
        self.flush()
        self._pending = (step, metrics)

    def flush(self) -> None:
        """Waits for the step pushed last, and counts it.

        Raises:
            NotFinite: it is the last of max_skipped steps in a row that were skipped.
        """
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        for meter in (self.meter, self._window_rate):
            meter.record(values["tokens"], compiled=self._compiled)
        self._compiled = False
        self._step = step
        if values.pop("skipped", 0.0):
            self._skip(step, values)
        else:
            self._in_a_row = 0
            self._window.append(values)
        if step % self._every == 0:
            self._write(step)

    def _skip(self, step: int, values: dict[str, float]) -> None:
        self._skipped += 1
        self._in_a_row += 1
        what = f"loss {values['loss']:.4g}, gradient's norm {values['grad_norm']:.4g}"
        self._line.say(f"step {step}  skipped: {what}")
        if self._in_a_row >= self._max_skipped:
            raise NotFinite(
                f"{self._writer.directory}: {self._in_a_row} steps in a row (--training.max-skipped) were skipped, up to "
                f"step {step} ({what}); the checkpoints before them are as they were: train in "
                "another --run.directory with a lower --optimizer.peak-lr or a "
                "--optimizer.clip-norm, or find the operation with --debug-nans"
            )

    @property
    def step(self) -> int:
        """The last step that was counted."""
        return self._step

    def finish(self) -> None:
        """Writes what is left of the last window."""
        self.flush()
        if self._window or self._skipped:
            self._write(self._step)

    def restart(self) -> None:
        """Leaves out the time since the last flush, such as that of an evaluation."""
        for meter in (self.meter, self._window_rate):
            meter.restart()

    def _write(self, step: int) -> None:
        row = _window_mean(self._window) if self._window else {}
        row["skipped"], self._skipped = float(self._skipped), 0
        rate = self._window_rate.rate
        self._writer.write(
            step,
            {f"train/{name}": x for name, x in row.items()}
            | {"train/tokens_per_second": rate},
        )
        self._line.update(step, loss=row.get("loss", math.nan), rate=rate)
        self._window, self._window_rate = [], RateMeter()


def _window_mean(window: list[dict[str, float]]) -> dict[str, float]:
    """Means weighted by tokens; the sum of the tokens; what is LAST."""
    tokens = sum(values["tokens"] for values in window)
    mean = {
        name: sum(values[name] * values["tokens"] for values in window)
        / max(tokens, 1.0)
        for name in window[0]
    }
    last = {k: window[-1][k] for k in LAST if k in window[-1]}
    return mean | last | {"tokens": tokens}
