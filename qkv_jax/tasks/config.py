"""The configuration of a run that learns from examples."""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from qkv_jax.data.splits import Splits
from qkv_jax.layers import init_rngs
from qkv_jax.training import (
    DistributedConfig,
    MeshConfig,
    OptimizerConfig,
    PrecisionConfig,
    RunConfig,
    RunError,
    Task,
    TrainingConfig,
    apply_precision,
    check_optimizer,
    from_plain,
    to_plain,
)


class Reader(Protocol):
    """Where examples come from; a frozen dataclass."""

    def load(self) -> Splits: ...


class ExampleModel(Protocol):
    """What a model file's `Model(config, *, rngs)` has, an `nnx.Module`.

    Its state is nnx.Param alone, with logical axes. It may have predict(batch) -> arrays by name,
    rows first, for a scorer; and `unit`, what its loss is a mean over, for messages: "examples".
    """

    def loss(
        self, batch: Mapping[str, jax.Array], *, rng: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss's sum over a batch, and sums to report.

        Args:
            batch: the reader's arrays for some rows, and "weight" (B,) float32: 1, or 0 for a row
                that only fills up.
            rng: draws dropout and augmentation; None: there is none.

        Returns:
            The sum, and float32 sums, weighted alike: "tokens", the number of units the loss is a
            mean over, and any such as "accuracy_sum", of which means are reported.
        """
        ...


class Scorer(Protocol):
    """Metrics that no mean of sums gives; a frozen dataclass. May have `draw`: see `make_task`."""

    def __call__(
        self,
        outputs: Mapping[str, np.ndarray],
        arrays: Mapping[str, np.ndarray],
        names: tuple[str, ...],
    ) -> dict[str, float]:
        """Metrics of a part of the data.

        Args:
            outputs: the model's predictions for all of its examples.
            arrays: its examples.
            names: of the classes.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """A run that learns from examples.

    Attributes:
        data: the `Reader`.
        model: the `Config` of a model file. Its fields that are 0 and are named by the data's
            sizes are set to these.
        batch_rows: examples of an update.
        eval_rows: examples evaluated at once; None: batch_rows.
        lengths: to how few lengths batches of padded examples are cut, see `Cut`; each costs a
            compilation. 1: none is cut.
        score: the `Scorer`; None: means of the model's sums are all that is reported.
        optimizer, training, precision, mesh: how it is trained, kept in which dtypes, and on which
            devices.
        run: where the run lies.
        distributed: how its processes find each other.
    """

    data: Any
    model: Any
    batch_rows: int = 64
    eval_rows: int | None = None
    lengths: int = 1
    score: Any = None
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    training: TrainingConfig
    precision: PrecisionConfig = dataclasses.field(default_factory=PrecisionConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)
    distributed: DistributedConfig = dataclasses.field(
        default_factory=DistributedConfig
    )

    def __post_init__(self):
        for name in ("batch_rows", "eval_rows"):
            rows = getattr(self, name)
            if rows is not None and rows < 1:
                raise ValueError(f"{name} must be positive; got {rows}.")
        if self.lengths < 1:
            raise ValueError(f"lengths must be positive; got {self.lengths}.")
        # A warm-up that does not fit into the steps is an error before anything is written.
        check_optimizer(self.optimizer, self.training, self.precision)
        apply_precision(self.model, self.precision)

    @property
    def computed_model(self) -> Any:
        """The model's Config, as it computes by `precision`."""
        return apply_precision(self.model, self.precision)

    def task(self, mesh: Mesh) -> Task:
        """The examples, the model and its loss on a mesh: see `make_task`."""
        from qkv_jax.tasks.run import make_task

        return make_task(self, mesh)

    def to_json(self) -> dict[str, Any]:
        """What makes the run what it is: all fields but where it runs, in JSON's types."""
        content = to_plain(self)
        del content["run"], content["distributed"], content["mesh"]
        return content

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "TaskConfig":
        """The configuration that `to_json` made the content from.

        Raises:
            ValueError, TypeError, KeyError: it made no such content, or it is of classes that are
                not in this package.
        """
        return from_plain(cls, content)


def fill_sizes(model: Any, sizes: Mapping[str, int]) -> Any:
    """A model's Config with the sizes of its data where its own are 0.

    Raises:
        RunError: its own is less than the data's.
    """
    fields = {field.name for field in dataclasses.fields(model)}
    found = {name: size for name, size in sizes.items() if name in fields}
    for name, size in found.items():
        own = getattr(model, name)
        if 0 < own < size:
            raise RunError(
                f"model.{name} is {own}, and the data's is {size}: leave it 0, which takes the data's"
            )
    missing = {name: size for name, size in found.items() if not getattr(model, name)}
    return dataclasses.replace(model, **missing)


def model_class(config: Any) -> Any:
    """The Model of a Config's file."""
    return sys.modules[type(config).__module__].Model


def new_model(config: Any, *, seed: int) -> Any:
    """A model of its Config's file, with new parameters."""
    return model_class(config)(config, rngs=init_rngs(seed))
