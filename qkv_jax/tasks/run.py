"""From a configuration of examples to what is trained, and from a run back to its model."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from qkv_jax import training
from qkv_jax.data import train_iterator
from qkv_jax.data.splits import (
    Arrays,
    Cut,
    ExampleStream,
    Splits,
    count_rows,
    example_batches,
)
from qkv_jax.tasks.config import TaskConfig, fill_sizes, model_class, new_model
from qkv_jax.training import RunError
from qkv_jax.training.model_card import array_digest, numbers, table


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A model with its weights, on a mesh.

    Attributes:
        config: of the run.
        splits: the data.
        model: the model's Config, with the data's sizes.
        params: its parameters.
        mesh: where they lie.
    """

    config: TaskConfig
    splits: Splits
    model: Any
    params: Any
    mesh: Mesh

    def evaluate(self, arrays: Arrays) -> dict[str, float]:
        """The metrics of some examples: means of the model's sums, and those of the scorer."""
        return _evaluation(self.config, self.model, self.splits, arrays, self.mesh)(
            self.params
        )

    def predict(self, arrays: Arrays) -> dict[str, np.ndarray]:
        """The model's predictions for some examples, rows first, on the host."""
        rows = _eval_rows(self.config, self.mesh)
        cut = Cut.choose(self.splits, self.config.lengths)
        return _predictions(self.model, arrays, rows, cut, self.mesh)(self.params)


def make_task(config: TaskConfig, mesh: Mesh) -> training.Task:
    """What a configuration trains, on a mesh.

    A scorer that has draw(outputs, arrays, names, directory) draws the test part's predictions
    into the run's directory.

    Raises:
        DataError: the data cannot be used.
        RunError: the mesh does not fit the batch; the metric is none of the model's.
    """
    shares = training.batch_shares(mesh) * config.training.accumulate
    if config.batch_rows % shares:
        raise RunError(
            f"batch_rows is {config.batch_rows}, which {training.batch_shares(mesh)} groups of "
            f"devices times {config.training.accumulate} accumulation steps do not divide: use a "
            f"multiple of {shares}, or another --mesh"
        )
    splits = config.data.load()
    model = fill_sizes(config.computed_model, splits.sizes)
    share = training.row_share(mesh)
    stream = ExampleStream(
        splits.train,
        rows=config.batch_rows,
        seed=config.training.seed,
        cut=Cut.choose(splits, config.lengths),
        share=share,
    )
    evaluate = None
    if len(next(iter(splits.valid.values()), ())):
        evaluate = _evaluation(config, model, splits, splits.valid, mesh)
    elif config.training.patience is not None:
        raise RunError(
            "training.patience needs validation examples: --training.patience None"
        )

    def finish(directory: Path) -> training.Outcome:
        return _finish(config, model, splits, mesh, directory)

    return training.Task(
        params=functools.partial(_params, model, seed=config.training.seed),
        loss_fn=make_loss(model),
        iterator=train_iterator(stream),
        share=share,
        evaluate=evaluate,
        report=(*splits.report, str(splits), str(stream)),
        unit=getattr(model_class(model), "unit", "examples"),
        finish=finish,
    )


def make_loss(model: Any) -> training.step.LossFn:
    """The loss of `training.train` for a model's Config."""
    graph = _halves(model)[0]
    return lambda params, batch, rng: nnx.merge(graph, params).loss(batch, rng=rng)


def is_task(directory: str | Path) -> bool:
    """Whether a directory is that of a run on examples, by its config.json."""
    return training.run_kind(directory) == TaskConfig.__name__


def read_task(directory: str | Path) -> TaskConfig:
    """The configuration of a run on disk.

    Raises:
        RunError: it is no run of a task on examples, or its classes are not in this package.
    """
    content = training.read_config(directory)
    try:
        return TaskConfig.from_json(content)
    except (KeyError, StopIteration, TypeError, ValueError) as error:
        raise RunError(
            f"{directory} is not a run of this version's tasks ({error})"
        ) from error


def load_task(
    directory: str | Path,
    *,
    checkpoint: training.Checkpoint | None = None,
    mesh: Mesh | None = None,
    config: TaskConfig | None = None,
) -> TrainedModel:
    """The model and the data of a run.

    Args:
        directory: of the run.
        checkpoint: see `training.load_params`.
        mesh: where its parameters go; None: all devices hold them whole.
        config: of the run; None: as its directory says.

    Raises:
        RunError: it is no such run, or its checkpoint is missing or damaged.
        DataError: its data are not there.
    """
    config = config or read_task(directory)
    splits = config.data.load()
    model = fill_sizes(config.computed_model, splits.sizes)
    mesh = mesh or training.make_mesh()
    params = _restore(config, model, Path(directory), checkpoint, mesh)
    return TrainedModel(config, splits, model, params, mesh)


def _finish(
    config: TaskConfig, model: Any, splits: Splits, mesh: Mesh, directory: Path
) -> training.Outcome:
    """Draws the curves, and evaluates the trained model on the test part."""
    from qkv_jax import viz  # Imported here: matplotlib takes most of a second.

    metrics = directory / training.metrics.METRICS_FILE
    training.on_first(lambda: viz.plot_curves(metrics, directory / "curves.png"))
    results: dict[str, Any] = {}
    if len(next(iter(splits.test.values()), ())):
        params = _restore(config, model, directory, None, mesh)
        evaluate = _evaluation(config, model, splits, splits.test, mesh, directory)
        results = {"test": evaluate(params)}
    return training.Outcome(
        results=results,
        summary=f"`{model_class(model).__module__}` trained by `{type(config.data).__name__}`.",
        sections=_sections(splits, results) if training.is_first() else (),
    )


def _sections(splits: Splits, results: Mapping[str, Any]) -> list[training.Section]:
    """What the model card says of a task on examples."""
    parts = {"training": splits.train, "validation": splits.valid, "test": splits.test}
    rows = [
        (name, f"{count_rows(part):,}", array_digest(part))
        for name, part in parts.items()
        if part
    ]
    said = "\n".join(f"- {line}" for line in splits.report)
    found = numbers(results)
    return [
        training.Section("Metrics", table(("metric", "value"), found))
        if found
        else training.Section("Metrics", "There is no test part: nothing was tested."),
        training.Section(
            "Known limits",
            "It was measured on the test part of its own data alone, by these numbers alone. What "
            "licence the data has, and what may be done with the model, the run does not know.",
        ),
        training.Section(
            "Data",
            table(("part", "examples", "SHA-256 of its arrays"), rows)
            + f"\n\n{said}".rstrip(),
        ),
    ]


def _evaluation(
    config: TaskConfig,
    model: Any,
    splits: Splits,
    arrays: Arrays,
    mesh: Mesh,
    directory: Path | None = None,
) -> Callable[[Any], dict[str, float]]:
    """parameters -> metrics on some examples; what the scorer draws goes into the directory."""
    rows, cut = _eval_rows(config, mesh), Cut.choose(splits, config.lengths)
    step = training.make_eval_step(make_loss(model), mesh=mesh)
    predict = _predictions(model, arrays, rows, cut, mesh) if config.score else None

    def evaluate(params: Any) -> dict[str, float]:
        batches = (batch for _, batch in example_batches(arrays, rows=rows, cut=cut))
        values = training.evaluate_loss(step, params, batches, mesh=mesh)
        del values["tokens"]
        if predict is not None:
            outputs = predict(params)
            values |= config.score(outputs, arrays, splits.names)
            draw = getattr(config.score, "draw", None)
            if draw is not None and directory is not None and training.is_first():
                draw(outputs, arrays, splits.names, directory)
        if config.training.metric not in values:
            raise RunError(
                f"--training.metric must be one of {', '.join(values)}; "
                f"got {config.training.metric!r}"
            )
        return values

    return evaluate


def _predictions(
    model: Any, arrays: Arrays, rows: int, cut: Cut, mesh: Mesh
) -> Callable[[Any], dict[str, np.ndarray]]:
    """parameters -> the model's predictions for all examples, on the host."""
    graph = _halves(model)[0]
    mesh = training.auto_mesh(mesh)

    def step(params: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return nnx.merge(graph, params).predict(batch)

    compiled = jax.jit(
        step,
        in_shardings=(None, training.logical_sharding(mesh, "batch")),
        out_shardings=training.replicated(mesh),
    )

    def predict(params: Any) -> dict[str, np.ndarray]:
        parts, order = [], []
        for indices, batch in example_batches(arrays, rows=rows, cut=cut):
            training.stop_point()
            found = jax.device_get(compiled(params, training.place_batch(batch, mesh)))
            real = indices >= 0
            parts.append({name: array[real] for name, array in found.items()})
            order.append(indices[real])
        back = np.argsort(np.concatenate(order))
        return {
            name: np.concatenate([part[name] for part in parts])[back]
            for name in parts[0]
        }

    return predict


def _eval_rows(config: TaskConfig, mesh: Mesh) -> int:
    shares = training.batch_shares(mesh)
    return -(-(config.eval_rows or config.batch_rows) // shares) * shares


def _restore(
    config: TaskConfig,
    model: Any,
    directory: Path,
    checkpoint: training.Checkpoint | None,
    mesh: Mesh,
) -> Any:
    params = training.load_params(
        directory,
        _halves(model)[1],
        checkpoint=checkpoint,
        average=config.training.average,
    )
    return training.place_state(params, mesh)


@functools.cache
def _halves(model: Any) -> tuple[nnx.GraphDef, Any]:
    """The static half of a model, and its parameters as shapes and dtypes."""
    made = nnx.eval_shape(functools.partial(new_model, model, seed=0))
    return nnx.split(made, nnx.Param)


def _params(model: Any, *, seed: int) -> Any:
    return nnx.state(new_model(model, seed=seed), nnx.Param)
