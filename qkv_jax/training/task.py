"""A whole run of any task: opened or resumed, trained, tested, finished."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
from jax.sharding import Mesh
from rich.console import Console

from qkv_jax.training.adapters import FinetuneConfig, count_params
from qkv_jax.training.checkpoint import checkpoint_steps
from qkv_jax.training.distributed import (
    DistributedConfig,
    check_same,
    initialize,
    is_first,
    on_first,
)
from qkv_jax.training.errors import RunError
from qkv_jax.training.loop import BatchIterator, TrainingConfig, train
from qkv_jax.training.optimizers import OptimizerConfig
from qkv_jax.training.runs import RunConfig, finish_run, locked, open_run
from qkv_jax.training.sharding import MeshConfig, make_mesh, state_shardings
from qkv_jax.training.step import LossFn
from qkv_jax.training.stopping import saved_at

Evaluate = Callable[[Any], dict[str, float]]


def _nothing(directory: Path) -> None:
    del directory


def _no_results(directory: Path) -> dict[str, Any]:
    del directory
    return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What a configuration trains, made ready on a mesh.

    Attributes:
        params: see `train`.
        loss_fn: see `make_train_step`.
        iterator, share: see `train`.
        evaluate: see `train`.
        finetune: see `train`.
        report: lines about the data.
        identity: JSON-able: what makes the run what it is besides its configuration. A mesh must
            not change it, so that another one may resume the run.
        data: what all processes must have read alike, and hexadecimal digits that tell it.
        unit: what the loss is a mean over, for messages.
        score_first: whether to evaluate before the first step.
        save: writes what it takes to use the model, besides its configuration and weights, into
            the new run's directory.
        finish: tests the trained model, and draws; returns its part of result.json. Called in
            all processes.
    """

    params: Any | Callable[[], Any]
    loss_fn: LossFn
    iterator: BatchIterator
    share: tuple[int, int] = (0, 1)
    evaluate: Evaluate | None = None
    finetune: FinetuneConfig | None = None
    report: Sequence[str] = ()
    identity: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    data: tuple[str, str] | None = None
    unit: str = "tokens"
    score_first: bool = False
    save: Callable[[Path], None] = _nothing
    finish: Callable[[Path], dict[str, Any]] = _no_results


class Trainable(Protocol):
    """A configuration that can be trained; every field of it is an option of `qkv-jax train`."""

    @property
    def optimizer(self) -> OptimizerConfig: ...
    @property
    def training(self) -> TrainingConfig: ...
    @property
    def mesh(self) -> MeshConfig: ...
    @property
    def run(self) -> RunConfig: ...
    @property
    def distributed(self) -> DistributedConfig: ...

    def task(self, mesh: Mesh) -> Task:
        """Reads the data and makes the model ready.

        Raises:
            ValueError: the mesh does not fit the model or the batch.
        """
        ...

    def to_json(self) -> dict[str, Any]:
        """What makes the run what it is."""
        ...


Config = TypeVar("Config", bound=Trainable)


def in_directory(config: Config, directory: Path) -> Config:
    """The same configuration, to run in a directory."""
    run = dataclasses.replace(config.run, directory=directory)
    return dataclasses.replace(config, run=run)  # type: ignore[type-var]


def train_task(config: Trainable, *, console: Console | None = None) -> dict[str, Any]:
    """Trains, evaluates and draws; or resumes what was begun in the same directory.

    Args:
        config: of the run; `run.directory` is set.
        console: for progress; None: standard error.

    Returns:
        What result.json holds.

    Raises:
        ValueError: the data cannot be used; the message says why.
        RunError: the directory is another run's, a finished one, in use, or damaged; or the mesh
            does not fit.
        Interrupted: SIGTERM or SIGINT came, in training or after it; see `train`.
    """
    with contextlib.ExitStack() as held:
        return _train_task(config, console, held)


def _train_task(
    config: Trainable, console: Console | None, held: contextlib.ExitStack
) -> dict[str, Any]:
    began = time.perf_counter()
    console = console or Console(stderr=True)
    directory = Path(config.run.directory or "")
    initialize(config.distributed)
    if not is_first():
        console = Console(quiet=True)
    mesh = task_mesh(config)
    task = config.task(mesh)
    shapes = jax.eval_shape(task.params) if callable(task.params) else task.params
    try:
        state_shardings(shapes, mesh)
    except ValueError as error:
        raise RunError(f"mesh: {error}") from error
    try:
        counts = count_params(shapes, task.finetune)
    except ValueError as error:
        raise RunError(f"finetune: {error}") from error
    if task.data is not None:
        check_same(*task.data)

    def open_directory() -> None:
        open_run(directory, config.to_json() | dict(task.identity))
        held.enter_context(locked(directory))
        task.save(directory)

    on_first(open_directory)

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    for line in task.report:
        say(line)
    say(f"model: {counts.all:,} parameters; run: {directory}")
    if (
        task.score_first
        and task.evaluate is not None
        and not checkpoint_steps(directory)
    ):
        values = task.evaluate(task.params)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        say(f"before the first step  validation  {shown}")
    result = train(
        params=task.params,
        loss_fn=task.loss_fn,
        optimizer=config.optimizer,
        config=config.training,
        finetune=task.finetune,
        iterator=task.iterator,
        share=task.share,
        directory=directory,
        evaluate=task.evaluate,
        mesh=mesh,
        unit=task.unit,
        console=console,
    )
    trained = time.perf_counter() - began
    summary: dict[str, Any] = {
        "steps": result.step,
        "stopped_early": result.stopped_early,
        "best_step": result.best_step,
        "parameters": counts.all,
        "trained_parameters": counts.trained,
        "training_seconds": trained,
        "tokens_per_second": result.tokens_per_second,
        "steady_tokens_per_second": result.steady_tokens_per_second,
        "compilations": result.compilations,
        "compile_seconds": result.compile_seconds,
    }
    with saved_at(result.step, directory):
        summary |= task.finish(directory)
    summary["seconds"] = time.perf_counter() - began
    on_first(lambda: finish_run(directory, summary))
    return summary


def task_mesh(config: Trainable) -> Mesh:
    """The mesh of a configuration.

    Raises:
        RunError: it does not fit the devices.
    """
    try:
        return make_mesh(config.mesh)
    except ValueError as error:
        raise RunError(f"mesh: {error}") from error
