"""A learning rate, found by trying all of them in one short run.

The rate rises by the same factor at every update, from one that changes nothing to one that no
loss survives. Source: Smith 2017, arXiv 1506.01186, section 3.3 (there the rate rises by the same
amount; a factor is the usual form since).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from qkv_jax.training.distributed import initialize
from qkv_jax.training.errors import RunError
from qkv_jax.training.optimizers import make_optimizer
from qkv_jax.training.sharding import auto_mesh, place_batch
from qkv_jax.training.state import create_state
from qkv_jax.training.step import make_train_step
from qkv_jax.training.task import Trainable, task_mesh

# The run ends where the loss is so much larger than its lowest.
DIVERGED = 1.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class RateRange:
    """Which rates are tried.

    Attributes:
        low, high: the first and the last.
        steps: updates from one to the other.
    """

    low: float = 1e-5
    high: float = 1.0
    steps: int = 100

    def __post_init__(self):
        if not 0 < self.low < self.high < math.inf:
            raise ValueError(
                f"low must be positive and less than high; got {self.low} and {self.high}."
            )
        if self.steps < 10:
            raise ValueError(f"steps must be at least 10; got {self.steps}.")

    @property
    def factor(self) -> float:
        """What a rate is of the one before."""
        return (self.high / self.low) ** (1 / (self.steps - 1))

    @property
    def window(self) -> int:
        """Losses around one that its smoothed value is the mean of; odd."""
        return self.steps // 20 // 2 * 2 + 1


@dataclasses.dataclass(frozen=True)
class RateCurve:
    """The loss of each update, and its rate.

    Attributes:
        range: which rates were to be tried.
        losses: (n,) float64, a batch's loss before its update; n is less than `range.steps` where
            the loss diverged.
    """

    range: RateRange
    losses: np.ndarray

    @property
    def rates(self) -> np.ndarray:
        """(n,): of the update before each loss; the first loss has the lowest."""
        updates = np.maximum(np.arange(len(self.losses)) - 1, 0)
        return self.range.low * self.range.factor**updates

    @property
    def smoothed(self) -> np.ndarray:
        """(n,): means of `range.window` losses around each."""
        return _smoothed(self.losses, self.range.window)

    @property
    def lowest(self) -> float:
        """The rate where the smoothed loss is lowest."""
        return float(self.rates[self.smoothed.argmin()])

    @property
    def steepest(self) -> float:
        """The rate, up to `lowest`, where the smoothed loss falls fastest."""
        falling = np.diff(self.smoothed[: self.smoothed.argmin() + 1])
        return float(self.rates[1 + falling.argmin()]) if falling.size else self.lowest

    @property
    def suggested(self) -> float:
        """A tenth of `lowest`: what a whole run bears; where the loss is lowest is its edge."""
        return self.lowest / 10

    @property
    def diverged(self) -> bool:
        """Whether the loss rose far above its lowest, or was not finite: `lowest` is then known."""
        return bool(self.smoothed[-1] > DIVERGED * self.smoothed.min()) or (
            len(self.losses) < self.range.steps
        )


def find_rate(
    config: Trainable,
    rates: RateRange,
    *,
    say: Callable[[str], None] = lambda text: None,
) -> RateCurve:
    """Tries rates on a configuration's own data, model, optimizer, batches and mesh.

    Its warm-up and schedule are left out. Nothing is written.

    Args:
        config: what would be trained.
        rates: see RateRange.
        say: is told what happens.

    Raises:
        RunError: the mesh does not fit; or the loss is not finite before anything is learned.
        ValueError: the data cannot be used.
    """
    initialize(config.distributed)
    mesh = auto_mesh(task_mesh(config))
    task = config.task(mesh)
    for line in task.report:
        say(line)
    training = config.training
    optimizer = make_optimizer(
        config.optimizer,
        rates.steps,
        schedule=lambda count: rates.low * rates.factor**count,
    )
    options: dict[str, Any] = {
        "rng_impl": training.rng_impl,
        "finetune": task.finetune,
        "sparsity": task.sparsity,
        "precision": config.precision,
    }
    state = create_state(
        task.params,
        optimizer,
        seed=training.seed,
        mesh=mesh,
        masks=task.masks,
        **options,
    )
    step = make_train_step(
        task.loss_fn, optimizer, mesh=mesh, accumulate=training.accumulate, **options
    )
    losses: list[float] = []
    for _ in range(rates.steps):
        batch = place_batch(
            next(task.iterator), mesh, accumulate=training.accumulate, share=task.share
        )
        state, metrics = step(state, batch)
        loss = float(metrics["loss"])
        if metrics["skipped"] or _diverged([*losses, loss], rates.window):
            if not losses:
                raise RunError("the first loss is not finite, whatever the rate")
            break
        losses.append(loss)
    return RateCurve(rates, np.array(losses))


def _diverged(losses: list[float], window: int) -> bool:
    means = np.convolve(losses, np.full(window, 1 / window), mode="valid")
    return bool(means.size and means[-1] > DIVERGED * means.min())


def _smoothed(losses: np.ndarray, window: int) -> np.ndarray:
    padded = np.pad(losses, window // 2, mode="edge")
    return np.convolve(padded, np.full(window, 1 / window), mode="valid")
