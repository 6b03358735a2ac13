"""A whole run of any task: opened or resumed, trained, tested, finished."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
from jax.sharding import Mesh
from rich.console import Console

from qkv_jax.training.adapters import FinetuneConfig, count_params
from qkv_jax.training.checkpoint import checkpoint_steps
from qkv_jax.training.config import TrainingConfig
from qkv_jax.training.distributed import (
    DistributedConfig,
    check_same,
    initialize,
    is_first,
    on_first,
)
from qkv_jax.training.errors import RunError
from qkv_jax.training.loop import BatchIterator, TrainResult, train
from qkv_jax.training.model_card import (
    CARD_FILE,
    Section,
    assumed_power,
    code_version,
    cost,
    hardware,
    make_card,
    numbers,
    table,
)
from qkv_jax.training.optimizers import OptimizerConfig
from qkv_jax.training.plain import from_plain
from qkv_jax.training.precision import PrecisionConfig
from qkv_jax.training.runs import RunConfig, finish_run, locked, open_run, write_text
from qkv_jax.training.sharding import MeshConfig, make_mesh, state_shardings
from qkv_jax.training.sparsity import NO_SPARSITY, Masks, SparsityConfig, check_masks
from qkv_jax.training.step import LossFn
from qkv_jax.training.stopping import saved_at

Evaluate = Callable[[Any], dict[str, float]]


def _nothing(directory: Path) -> None:
    del directory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What testing a trained model gave.

    Attributes:
        results: its part of result.json.
        summary: what the model is, a sentence for the model card.
        sections: of the card; only the first process's are used.
        front: metadata of the card for the hub, in JSON's types.
    """

    results: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    summary: str = ""
    sections: Sequence[Section] = ()
    front: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _no_results(directory: Path) -> Outcome:
    del directory
    return Outcome()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What a configuration trains, made ready on a mesh.

    Attributes:
        params: see `train`.
        loss_fn: see `make_train_step`.
        iterator, share: see `train`.
        evaluate: see `train`.
        finetune, sparsity, masks: see `train`.
        report: lines about the data.
        identity: JSON-able: what makes the run what it is besides its configuration. A mesh must
            not change it, so that another one may resume the run.
        data: what all processes must have read alike, and hexadecimal digits that tell it.
        unit: what the loss is a mean over, for messages.
        score_first: whether to evaluate before the first step.
        save: writes what it takes to use the model, besides its configuration and weights, into
            the new run's directory.
        finish: tests the trained model, and draws. Called in all processes.
    """

    params: Any | Callable[[], Any]
    loss_fn: LossFn
    iterator: BatchIterator
    share: tuple[int, int] = (0, 1)
    evaluate: Evaluate | None = None
    finetune: FinetuneConfig | None = None
    sparsity: SparsityConfig = NO_SPARSITY
    masks: Masks | None = None
    report: Sequence[str] = ()
    identity: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    data: tuple[str, str] | None = None
    unit: str = "tokens"
    score_first: bool = False
    save: Callable[[Path], None] = _nothing
    finish: Callable[[Path], Outcome] = _no_results


class Trainable(Protocol):
    """A configuration that can be trained; every field of it is an option of `qkv-jax train`."""

    @property
    def optimizer(self) -> OptimizerConfig: ...
    @property
    def training(self) -> TrainingConfig: ...
    @property
    def precision(self) -> PrecisionConfig: ...
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
    began, code = time.perf_counter(), code_version()
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
    try:
        check_masks(shapes, task.finetune, task.sparsity)
    except ValueError as error:
        raise RunError(f"sparsity: {error}") from error
    if task.data is not None:
        check_same(*task.data)

    def open_directory() -> None:
        content = config.to_json() | dict(task.identity)
        restated = functools.partial(_restated, type(config))
        open_run(directory, content, restated=restated)
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
        sparsity=task.sparsity,
        masks=task.masks,
        precision=config.precision,
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
        outcome = task.finish(directory)
    summary |= outcome.results
    summary["seconds"] = time.perf_counter() - began

    def finish() -> None:
        card = _card(config, task, result, summary, outcome, code)
        write_text(directory / CARD_FILE, card)
        finish_run(directory, summary)

    on_first(finish)
    return summary


def _card(
    config: Trainable,
    task: Task,
    result: TrainResult,
    summary: Mapping[str, Any],
    outcome: Outcome,
    code: str,
) -> str:
    """The run's model card."""
    rows = [
        ("parameters", f"{summary['parameters']:,}"),
        ("of these trained", f"{summary['trained_parameters']:,}"),
        ("updates", f"{result.step:,}"),
        (
            "ended",
            "without a better evaluation" if result.stopped_early else "as planned",
        ),
        (f"{task.unit} trained on", f"{result.tokens:,}"),
    ]
    for row in result.history:
        if row["step"] == result.best_step:
            found = {k: x for k, x in row.items() if k.startswith("validation/")}
            rows += [(f"{k}, best", x) for k, x in numbers(found)]
    rows.append(
        (f"{task.unit} a second, last part", f"{result.steady_tokens_per_second:,.0f}")
    )
    return make_card(
        Path(config.run.directory or "").resolve().name,
        front=outcome.front,
        summary=f"{outcome.summary} Code: {code}.".strip(),
        sections=[
            *outcome.sections,
            Section("Training", table(("", ""), rows)),
            hardware(),
            cost(
                loop=result.all_seconds,
                rest=summary["seconds"] - result.seconds,
                power=assumed_power(config.run.watts),
            ),
        ],
        config=config.to_json() | dict(task.identity),
    )


def _restated(kind: Any, content: dict[str, Any]) -> dict[str, Any]:
    """A config.json as this version would have written it: a newer field has its default.

    What this version cannot read stays as it is.
    """
    fields = {field.name for field in dataclasses.fields(kind)} & content.keys()
    try:
        own = from_plain(kind, {name: content[name] for name in fields})
    except (KeyError, StopIteration, TypeError, ValueError):
        return content
    return content | own.to_json()


def task_mesh(config: Trainable) -> Mesh:
    """The mesh of a configuration.

    Raises:
        RunError: it does not fit the devices.
    """
    try:
        return make_mesh(config.mesh)
    except ValueError as error:
        raise RunError(f"mesh: {error}") from error
