"""A task on which a model of one matrix does well: which of three numbers is the largest."""

import dataclasses
import io
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console

from qkv_jax.data import Splits
from qkv_jax.ops import dropout
from qkv_jax.tasks import TaskConfig
from qkv_jax.training import (
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
    train_task,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Rows of three numbers, and the place of the largest."""

    train: int = 40
    valid: int = 10
    test: int = 11

    def load(self) -> Splits:
        rng = np.random.default_rng(0)

        def part(count: int) -> dict[str, np.ndarray]:
            if not count:
                return {}
            numbers = rng.normal(size=(count, 3)).astype(np.float32)
            return {"numbers": numbers, "label": numbers.argmax(-1).astype(np.int32)}

        return Splits(
            train=part(self.train),
            valid=part(self.valid),
            test=part(self.test),
            sizes={"classes": 3},
            names=("first", "second", "third"),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    classes: int = 0
    dropout: float = 0.1


class Model(nnx.Module):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.map = nnx.Linear(3, config.classes, rngs=rngs)
        self.config = config

    def logits(self, batch, rng=None):
        return self.map(dropout(batch["numbers"], self.config.dropout, rng))

    def loss(self, batch, *, rng):
        logits, weight = self.logits(batch, rng), batch["weight"]
        nll = -jax.nn.log_softmax(logits)[jnp.arange(len(weight)), batch["label"]]
        correct = (logits.argmax(-1) == batch["label"]).astype(jnp.float32)
        loss = (nll * weight).sum()
        sums = {"loss_sum": loss, "accuracy_sum": (correct * weight).sum()}
        return loss, sums | {"tokens": weight.sum()}

    def predict(self, batch):
        return {"logits": self.logits(batch)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recall:
    """The share of a class's examples that are found; draws a file that says it."""

    of: str = "first"

    def __call__(self, outputs, arrays, names) -> dict[str, float]:
        label = names.index(self.of)
        found = outputs["logits"].argmax(-1)[arrays["label"] == label] == label
        return {"recall": float(found.mean())}

    def draw(self, outputs, arrays, names, directory: Path) -> None:
        content = self(outputs, arrays, names)["recall"]
        (directory / "recall.txt").write_text(str(content), encoding="utf-8")


def make_config(directory: Path, *, steps: int = 4, **changes: Any) -> TaskConfig:
    training = TrainingConfig(
        steps=steps, evaluate_every=2, checkpoint_every=2, keep=2, log_every=1
    )
    config = TaskConfig(
        data=Data(),
        model=Config(),
        batch_rows=16,
        score=Recall(),
        optimizer=OptimizerConfig(peak_lr=0.1, warmup_steps=1),
        training=training,
        run=RunConfig(directory=directory),
    )
    return dataclasses.replace(config, **changes)


def run(config: TaskConfig) -> dict[str, Any]:
    """Trains quietly."""
    return train_task(config, console=Console(file=io.StringIO()))
