"""How long a run trains, and what it does on the way."""

import dataclasses
from typing import Literal

from qkv_jax.training.optimizers import OptimizerConfig, make_schedule
from qkv_jax.training.precision import DEFAULT, PrecisionConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long to train, and what to do on the way.

    Attributes:
        steps: updates of the whole run.
        seed: of dropout and all other randomness of the steps.
        accumulate: microbatches a step splits its batch into.
        evaluate_every: steps between evaluations; the last step is always evaluated.
        checkpoint_every: steps between checkpoints. One is also made of each new best
            evaluation, and of the last step.
        keep: the latest checkpoints that stay on disk, besides the best.
        average: the latest checkpoints an evaluation of the run averages; 1: none.
        metric: the key of the evaluation that decides what is best.
        mode: "min": less is better, "max": more is better.
        patience: evaluations in a row without a new best that end the run; None: never.
        ema_decay: of a moving average of the parameters, which is what is then evaluated and
            translates; None: none.
        log_every: steps between rows of metrics.
        max_skipped: updates in a row that are skipped, as their loss or gradient is not finite,
            before the run ends.
        rng_impl: jax PRNG implementation.
    """

    steps: int
    seed: int = 0
    accumulate: int = 1
    evaluate_every: int = 1000
    checkpoint_every: int = 1000
    keep: int = 5
    average: int = 1
    metric: str = "loss"
    mode: Literal["min", "max"] = "min"
    patience: int | None = None
    ema_decay: float | None = None
    log_every: int = 50
    max_skipped: int = 10
    rng_impl: Literal["rbg", "unsafe_rbg", "threefry2x32"] = "rbg"

    def __post_init__(self):
        counts = ("steps", "accumulate", "evaluate_every", "checkpoint_every")
        for name in (*counts, "keep", "average", "log_every", "max_skipped"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1; got {getattr(self, name)}."
                )
        if self.average > self.keep:
            raise ValueError(
                f"average must not exceed keep, the checkpoints that stay; "
                f"got {self.average} > {self.keep}."
            )
        made = -(-self.steps // self.checkpoint_every)
        if self.average > made:
            raise ValueError(
                f"average must not exceed the checkpoints that are made, {made} in {self.steps} steps; "
                f"got {self.average}: checkpoint_every must be smaller, or average."
            )
        if self.mode not in ("min", "max"):
            raise ValueError(f"mode must be 'min' or 'max'; got {self.mode!r}.")
        if self.patience is not None and self.patience < 1:
            raise ValueError(
                f"patience must be at least 1, or None; got {self.patience}."
            )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(
                f"ema_decay must be in (0, 1), or None; got {self.ema_decay}."
            )


def check_optimizer(
    optimizer: OptimizerConfig,
    config: TrainingConfig,
    precision: PrecisionConfig = DEFAULT,
) -> None:
    """Raises ValueError where an optimizer does not fit how a run trains."""
    make_schedule(optimizer, config.steps)
    if optimizer.averages and config.ema_decay is not None:
        raise ValueError(
            f"ema_decay must be None for name={optimizer.name!r}, which has an average of its own; "
            f"got {config.ema_decay}."
        )
    if optimizer.averages and precision.moments != "float32":
        raise ValueError(
            f"precision.moments must be 'float32' for name={optimizer.name!r}, whose state is what "
            f"it averages, all of it to the end; got {precision.moments!r}."
        )
