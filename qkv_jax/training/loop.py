"""The training loop: one library function, which experiments never copy."""

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from qkv_jax.training.adapters import FinetuneConfig, count_params, merge_params
from qkv_jax.training.checkpoint import CheckpointStore
from qkv_jax.training.config import TrainingConfig, check_optimizer
from qkv_jax.training.errors import Interrupted, NotFinite
from qkv_jax.training.metrics import MetricsWriter, ProgressLine, TrainLog, read_metrics
from qkv_jax.training.optimizers import (
    OptimizerConfig,
    averaged_params,
    make_optimizer,
    make_schedule,
)
from qkv_jax.training.precision import DEFAULT, PrecisionConfig, widen
from qkv_jax.training.sharding import auto_mesh, make_mesh, place_batch
from qkv_jax.training.sparsity import NO_SPARSITY, Masks, SparsityConfig
from qkv_jax.training.state import TrainState, create_state
from qkv_jax.training.step import LossFn, make_train_step
from qkv_jax.training.stopping import Signals, Stopped, stop_point

Callback = Callable[[int, TrainState, dict[str, jax.Array]], None]


class BatchIterator(Protocol):
    """Endless batches whose position can be saved and set."""

    def __next__(self) -> dict[str, Any]: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


@dataclasses.dataclass
class Record:
    """What a run remembers besides its arrays; in every checkpoint, as JSON.

    Attributes:
        step: updates made.
        best_step: of the best evaluation, or None.
        best_value: its metric, or None.
        stale: evaluations in a row since.
        tokens: real target tokens trained on.
        seconds: wall time of the loop with its evaluations, all parts of the run together.
        pending: the evaluation of this step was stopped, and is made when the run goes on.
    """

    step: int = 0
    best_step: int | None = None
    best_value: float | None = None
    stale: int = 0
    tokens: int = 0
    seconds: float = 0.0
    pending: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What train() hands back.

    Attributes:
        state: after the last step.
        step: the last step; less than asked for where the run was stopped early.
        stopped_early: patience ran out.
        best_step: of the best evaluation, or None.
        best_value: its metric, or None.
        history: the rows of metrics.jsonl, of resumed parts too.
        tokens_per_second: real target tokens over training time, evaluation left out.
        steady_tokens_per_second: the same without the steps that waited for a compilation.
        seconds: wall time of this call.
        all_seconds: with that of the calls before it in the same directory, up to their last
            checkpoints.
        tokens: real target tokens trained on, by all of these calls.
        compilations: distinct batch shapes.
        compile_seconds: tracing and compiling them.
    """

    state: TrainState
    step: int
    stopped_early: bool
    best_step: int | None
    best_value: float | None
    history: list[dict[str, Any]]
    tokens_per_second: float
    steady_tokens_per_second: float
    seconds: float
    all_seconds: float
    tokens: int
    compilations: int
    compile_seconds: float


def train(
    *,
    params: Any | Callable[[], Any],
    loss_fn: LossFn,
    optimizer: OptimizerConfig,
    config: TrainingConfig,
    iterator: BatchIterator,
    share: tuple[int, int] = (0, 1),
    directory: str | os.PathLike,
    evaluate: Callable[[Any], dict[str, float]] | None = None,
    callbacks: Sequence[Callback] = (),
    mesh: Mesh | None = None,
    finetune: FinetuneConfig | None = None,
    sparsity: SparsityConfig = NO_SPARSITY,
    masks: Masks | None = None,
    precision: PrecisionConfig = DEFAULT,
    unit: str = "tokens",
    console: Console | None = None,
) -> TrainResult:
    """Trains to the end, or goes on to it from the latest checkpoint in the directory.

    On CPU an interrupted run ends with the same bits as one that was not.

    Args:
        params: pytree of float32 arrays, or a function that makes it; see create_state.
        loss_fn: (params, batch, rng) -> (loss_sum, aux); see make_train_step.
        optimizer: see OptimizerConfig.
        config: see TrainingConfig.
        iterator: endless batches, dicts of numpy arrays (B, ...). Only its position is changed.
        share: (i, n): its arrays are block i of n equal ones of each batch's rows, see row_share;
            (0, 1): all, the same in all processes.
        directory: of the run: checkpoints/, metrics.jsonl and event files go there. Open it with
            open_run first, so that no other run's is gone on with.
        evaluate: parameters (or their average) -> metrics, with the key config.metric.
        callbacks: called after each step as callback(step, state, metrics). Arrays are on the
            devices, and the state is donated to the next step: to read is to wait, to keep is
            to copy.
        mesh: see make_mesh; None: all devices.
        finetune: which part of params is trained; None: all. evaluate gets all of them, merged;
            the states that callbacks and the result have are parted, see merge_params.
        sparsity, masks: which weights are 0, see create_state; evaluate gets them so.
        precision: what is kept of params and of the optimizer's state, in which dtype; evaluate
            gets float32. The precision that loss_fn computes in is its own.
        unit: what the loss is a mean over, for messages.
        console: for progress; None: standard error.

    Returns:
        See TrainResult. The last checkpoint is complete.

    Raises:
        ValueError: patience without evaluate; finetune that does not fit params; a batch that the mesh does not divide; an iterator
            that ends; an evaluation without config.metric.
        RunError: losses or gradients that are not finite, config.max_skipped in a row; a checkpoint
            that does not fit, or is damaged and the only one; one that cannot be written.
        Interrupted: SIGTERM or SIGINT came; the step it was at is saved. An evaluation is left at
            its next `stop_point`, and made anew when the run goes on. A second signal ends the
            process at once.
    """
    if config.patience is not None and evaluate is None:
        raise ValueError("patience needs evaluate; pass a function, or patience=None.")
    began = time.perf_counter()
    mesh = auto_mesh(mesh or make_mesh())
    kept = {"sparsity": sparsity, "masks": masks, "precision": precision}
    step_fn, state = _build(params, loss_fn, optimizer, config, mesh, finetune, kept)
    with CheckpointStore(directory, keep=config.keep) as store:
        state, record = _resume(store, state, iterator)
        with (
            MetricsWriter(directory, step=record.step) as writer,
            ProgressLine(
                config.steps, start=record.step, unit=unit, console=console
            ) as line,
            Signals() as signals,
        ):
            if finetune is not None:
                shapes = jax.eval_shape(params) if callable(params) else params
                counts = count_params(shapes, finetune)
                line.say(f"parameters trained: {counts}")
            for name in store.set_aside:
                line.say(f"damaged, and set aside: {name}")
            if record.step:
                line.say(f"resuming {directory} at step {record.step}")
            session = _Session(
                config, store, writer, line, record, evaluate, iterator, finetune, began
            )
            try:
                session.evaluate_if_pending(state)
                while not session.ended:
                    rows = _next(iterator)
                    batch = place_batch(
                        rows, mesh, accumulate=config.accumulate, share=share
                    )
                    state, metrics, compiled = step_fn(state, batch)
                    session.after_step(state, metrics, rows, compiled=compiled)
                    for callback in callbacks:
                        callback(record.step, state, metrics)
                    stop_point()
            except Stopped:
                session.save(state)
                store.wait()
                raise Interrupted(signals.received, directory, record.step) from None
            session.finish(step_fn)
    return _result(state, session, step_fn, directory, time.perf_counter() - began)


def _build(
    params,
    loss_fn: LossFn,
    optimizer: OptimizerConfig,
    config: TrainingConfig,
    mesh: Mesh,
    finetune: FinetuneConfig | None,
    kept: dict[str, Any],
) -> tuple["_CountedStep", TrainState]:
    """The compiled step of this configuration, and its first state."""
    check_optimizer(optimizer, config, kept["precision"])
    transformation = make_optimizer(optimizer, config.steps)
    step = make_train_step(
        loss_fn,
        transformation,
        mesh=mesh,
        schedule=make_schedule(optimizer, config.steps),
        accumulate=config.accumulate,
        ema_decay=config.ema_decay,
        averaged=averaged_params if optimizer.averages else None,
        rng_impl=config.rng_impl,
        finetune=finetune,
        sparsity=kept["sparsity"],
        precision=kept["precision"],
    )
    state = create_state(
        params,
        transformation,
        seed=config.seed,
        mesh=mesh,
        rng_impl=config.rng_impl,
        ema=config.ema_decay is not None or optimizer.averages,
        finetune=finetune,
        **kept,
    )
    return _CountedStep(step), state


class _CountedStep:
    """Calls the jitted step, and counts the batch shapes it had to compile for."""

    def __init__(self, step):
        self._step = step
        self._shapes: set[tuple] = set()
        self.seconds = 0.0

    @property
    def compilations(self) -> int:
        return len(self._shapes)

    def __call__(self, state: TrainState, batch: dict[str, jax.Array]):
        shapes = tuple(sorted((name, array.shape) for name, array in batch.items()))
        if shapes in self._shapes:
            # Whatever a step still moves between host and device, it would move in each step.
            # To find a NaN, JAX runs the step again, an operation at a time.
            debugged = jax.config.values["jax_debug_nans"]
            with jax.transfer_guard("allow" if debugged else "disallow"):
                return *self._step(state, batch), False
        began = time.perf_counter()
        result = self._step(state, batch)
        self.seconds += time.perf_counter() - began
        self._shapes.add(shapes)
        return *result, True


class _Session:
    """What happens between two steps: metrics, evaluation, checkpoints, the end."""

    def __init__(
        self, config, store, writer, line, record, evaluate, iterator, finetune, began
    ):
        self.config, self.store, self.writer, self.line = config, store, writer, line
        self.record, self.evaluate, self.iterator = record, evaluate, iterator
        self.finetune = finetune
        self.log = TrainLog(
            writer, line, every=config.log_every, max_skipped=config.max_skipped
        )
        self._tokens, self.began = record.tokens, began - record.seconds
        self._saved = record.step
        self._rows: list[dict[str, np.ndarray]] = []

    @property
    def stopped_early(self) -> bool:
        patience = self.config.patience
        return patience is not None and self.record.stale >= patience

    @property
    def ended(self) -> bool:
        return self.record.step >= self.config.steps or self.stopped_early

    def after_step(
        self,
        state: TrainState,
        metrics: dict[str, jax.Array],
        rows: dict[str, np.ndarray],
        *,
        compiled: bool,
    ):
        self.record.step += 1
        self._rows = [*self._rows[-1:], rows]
        try:
            self.log.push(self.record.step, metrics, compiled=compiled)
            self._save_if_due(state)
        except NotFinite as error:
            raise self._keep_rows(error) from None

    def _keep_rows(self, error: NotFinite) -> NotFinite:
        """Saves the batch of the step that failed: that of the last push, or the one before."""
        # Each process has its own rows.
        part = f".{jax.process_index()}" if jax.process_count() > 1 else ""
        file = Path(self.store.directory) / f"not_finite{part}.npz"
        rows = self._rows[-1 if self.log.step == self.record.step else 0]
        content: dict[str, Any] = {"step": self.log.step, **rows}
        np.savez(file, **content)
        return NotFinite(f"{error}. Its batch is in {file}")

    def _save_if_due(self, state: TrainState) -> None:
        improved = self._evaluate_if_due(state)
        if (
            self.ended
            or improved
            or self.record.step % self.config.checkpoint_every == 0
        ):
            self.save(state)

    def finish(self, step_fn: _CountedStep) -> None:
        self.log.finish()
        self.store.wait()
        if self.stopped_early:
            self.line.say(
                f"stopped at step {self.record.step}: {self.record.stale} evaluations without a "
                f"better {self.config.metric} than {self.record.best_value:.4g} "
                f"of step {self.record.best_step}"
            )
        if step_fn.compilations:
            self.line.say(
                f"batch shapes compiled: {step_fn.compilations}, in {step_fn.seconds:.1f} s; "
                f"then {self.log.meter.steady_rate:,.0f} {self.line.unit}/s"
            )

    def _evaluate_if_due(self, state: TrainState) -> bool:
        """Evaluates where it is time; whether it is the best so far."""
        record, config = self.record, self.config
        due = record.step == config.steps or record.step % config.evaluate_every == 0
        if self.evaluate is None or not due:
            return False
        self.log.flush()
        trained = widen(state.params if state.ema is None else state.ema)
        record.pending = True
        values = self.evaluate(merge_params(trained, state.constant, self.finetune))
        record.pending = False
        self.log.restart()
        if config.metric not in values:
            raise ValueError(
                f"evaluate must return the metric {config.metric!r}; got {', '.join(values)}."
            )
        self.writer.write(
            record.step, {f"validation/{k}": float(v) for k, v in values.items()}
        )
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.line.say(f"step {record.step}  validation  {shown}")
        return _note_evaluation(record, float(values[config.metric]), config.mode)

    def evaluate_if_pending(self, state: TrainState) -> None:
        """What was stopped when the step was saved; its checkpoint is told of the outcome."""
        if self.record.pending:
            self._evaluate_if_due(state)
            self.store.tell(self.record.step, self._progress())

    def save(self, state: TrainState) -> None:
        """Starts a checkpoint of this step, where there is none yet."""
        if self._saved == self.record.step:
            return
        self._saved = self.record.step
        self.log.flush()
        self.record.tokens = self._tokens + round(self.log.meter.tokens)
        self.record.seconds = time.perf_counter() - self.began
        self.store.save(self.record.step, state, self._progress())

    def _progress(self) -> dict[str, Any]:
        return dataclasses.asdict(self.record) | {"data": self.iterator.get_state()}


def _note_evaluation(record: Record, value: float, mode: str) -> bool:
    """Whether the value is the best so far; the record is brought up to date."""
    best = record.best_value
    improved = best is None or (value < best if mode == "min" else value > best)
    if improved:
        record.best_step, record.best_value, record.stale = record.step, value, 0
    else:
        record.stale += 1
    return improved


def _resume(
    store: CheckpointStore, state: TrainState, iterator
) -> tuple[TrainState, Record]:
    restored = store.restore(state)
    if restored is None:
        return state, Record()
    state, progress = restored
    iterator.set_state(progress.pop("data"))
    return state, Record(**progress)


def _next(iterator: BatchIterator) -> dict[str, Any]:
    try:
        return next(iterator)
    except StopIteration:
        raise ValueError(
            "iterator must be endless: it ended before the last step."
        ) from None


def _result(state, session: _Session, step_fn: _CountedStep, directory, seconds: float):
    record, meter = session.record, session.log.meter
    return TrainResult(
        state=state,
        step=record.step,
        stopped_early=session.stopped_early,
        best_step=record.best_step,
        best_value=record.best_value,
        history=read_metrics(directory),
        tokens_per_second=meter.rate,
        steady_tokens_per_second=meter.steady_rate,
        seconds=seconds,
        all_seconds=time.perf_counter() - session.began,
        tokens=record.tokens,
        compilations=step_fn.compilations,
        compile_seconds=step_fn.seconds,
    )
