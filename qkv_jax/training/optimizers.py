"""Learning-rate schedules and optimizers, from one config to one optax transformation."""

import dataclasses
import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from optax import contrib

from qkv_jax.ops.axes import input_axes

Name = Literal["adam", "adamw", "muon", "adafactor", "lion", "schedule_free"]
# Which optimizers a field is of.
MEANT_FOR: dict[str, tuple[Name, ...]] = {
    "b1": ("adam", "adamw", "muon", "lion", "schedule_free"),
    "b2": ("adam", "adamw", "muon", "lion", "schedule_free"),
    "eps": ("adam", "adamw", "muon", "schedule_free"),
    "momentum": ("muon",),
    "each_head": ("muon",),
    "weight_decay": ("adamw", "muon", "adafactor", "lion", "schedule_free"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """An optimizer with a warmed-up learning rate.

    The defaults are those of Vaswani et al. 2017 (arXiv 1706.03762, section 5.3).

    Attributes:
        name: "adam"; "adamw" for decoupled weight decay; "muon" for orthogonalised momentum on
            the matrices within the layers, and Adam on all else (embeddings, biases, scales):
            fewer updates to the same loss, each about a quarter dearer for a small model on a CPU;
            "adafactor" for second moments of rows and columns alone, where a matrix has at least
            128 of both: its rates are relative to each parameter's root mean square; "lion" for
            the sign of a momentum: a third to a tenth of Adam's rate; "schedule_free" for
            AdamW whose average of all its iterates is what is evaluated, with no decay of the rate.
        peak_lr: learning rate at the end of the warm-up.
        warmup_steps: updates of linear warm-up, from peak_lr / warmup_steps.
        schedule: what follows the warm-up: "inverse_sqrt" (peak * sqrt(warmup / step)),
            "cosine" or "linear" (down to final_fraction * peak at the last step), "constant".
        final_fraction: end of "cosine" and "linear", as a fraction of peak_lr.
        b1: decay of Adam's first moment; of Lion, its share in the update; of "schedule_free", the
            average's share in where gradients are taken.
        b2: decay of Adam's second moment; of Lion's momentum.
        eps: added to the root of the second moment.
        momentum: decay of Muon's momentum.
        each_head: whether Muon orthogonalises each head's part of a projection by itself: cheaper
            for small models, and about as good an update.
        weight_decay: decoupled decay, times the learning rate; Adam has none. Not applied to
            parameters of fewer than two axes (biases, normalisation scales), nor to those that
            Muon leaves to Adam.
        clip_norm: largest global norm of the gradient; None: no clipping.
    """

    name: Name = "adam"
    peak_lr: float = 1e-3
    warmup_steps: int = 1000
    schedule: Literal["inverse_sqrt", "cosine", "linear", "constant"] = "inverse_sqrt"
    final_fraction: float = 0.0
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-9
    momentum: float = 0.95
    each_head: bool = False
    weight_decay: float = 0.0
    clip_norm: float | None = None

    def __post_init__(self):
        if self.name not in get_args(Name):
            names = ", ".join(map(repr, get_args(Name)))
            raise ValueError(f"name must be one of {names}; got {self.name!r}.")
        if self.schedule not in ("inverse_sqrt", "cosine", "linear", "constant"):
            raise ValueError(
                "schedule must be 'inverse_sqrt', 'cosine', 'linear' or 'constant'; "
                f"got {self.schedule!r}."
            )
        if self.peak_lr <= 0:
            raise ValueError(f"peak_lr must be positive; got {self.peak_lr}.")
        if self.warmup_steps < 0:
            raise ValueError(
                f"warmup_steps must not be negative; got {self.warmup_steps}."
            )
        if self.schedule == "inverse_sqrt" and self.warmup_steps < 1:
            raise ValueError(
                "warmup_steps must be at least 1 for the schedule 'inverse_sqrt'."
            )
        if not 0 <= self.final_fraction <= 1:
            raise ValueError(
                f"final_fraction must be in [0, 1]; got {self.final_fraction}."
            )
        if self.final_fraction and self.schedule in ("inverse_sqrt", "constant"):
            raise ValueError(
                f"final_fraction has no meaning for the schedule {self.schedule!r}: leave it at 0."
            )
        for name in ("b1", "b2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be in [0, 1); got {getattr(self, name)}."
                )
        if self.eps <= 0:
            raise ValueError(f"eps must be positive; got {self.eps}.")
        if self.weight_decay < 0:
            raise ValueError(
                f"weight_decay must not be negative; got {self.weight_decay}."
            )
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(
                f"clip_norm must be positive, or None; got {self.clip_norm}."
            )
        self._check_meant()

    def _check_meant(self) -> None:
        for field in dataclasses.fields(self):
            names = MEANT_FOR.get(field.name, (self.name,))
            value = getattr(self, field.name)
            if self.name not in names and value != field.default:
                shown = " or ".join(map(repr, names))
                raise ValueError(
                    f"{field.name} needs name={shown}; got {self.name!r}: leave it at "
                    f"{field.default}."
                )
        if self.name == "schedule_free":
            if self.schedule != "constant":
                raise ValueError(
                    "name='schedule_free' needs schedule='constant': its average takes the place "
                    f"of a decay; got {self.schedule!r}."
                )
            if not self.b1:
                raise ValueError("b1 must be positive for name='schedule_free'; got 0.")

    @property
    def averages(self) -> bool:
        """Whether the optimizer has an average of its own, see `averaged_params`."""
        return self.name == "schedule_free"


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate as a function of the number of updates already made.

    The first update (count 0) is step 1 and has the rate peak_lr / warmup_steps, so that
    none is spent on a rate of zero; step warmup_steps has peak_lr; step `steps` has the end.

    Args:
        config: which schedule.
        steps: updates of the whole run.

    Returns:
        count () int32 -> () float32.

    Raises:
        ValueError: the warm-up is longer than a run whose rate must decay by its end.
    """
    peak, warmup = config.peak_lr, config.warmup_steps
    if config.schedule in ("cosine", "linear") and warmup >= steps:
        raise ValueError(
            f"warmup_steps must be less than the {steps} steps of the run "
            f"for the schedule {config.schedule!r}; got {warmup}."
        )

    def decay(step: jax.Array) -> jax.Array:
        if config.schedule == "constant":
            return jnp.ones_like(step)
        if config.schedule == "inverse_sqrt":
            return jnp.sqrt(warmup / step)
        done = jnp.clip((step - warmup) / (steps - warmup), 0.0, 1.0)
        left = (
            1.0 - done
            if config.schedule == "linear"
            else 0.5 * (1.0 + jnp.cos(jnp.pi * done))
        )
        return config.final_fraction + (1.0 - config.final_fraction) * left

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(count, jnp.float32) + 1.0
        rising = step / max(warmup, 1)
        return peak * jnp.where(step < warmup, rising, decay(jnp.maximum(step, warmup)))

    return schedule


def make_optimizer(
    config: OptimizerConfig, steps: int, *, schedule: optax.Schedule | None = None
) -> optax.GradientTransformation:
    """Clipping, the optimizer, and the schedule, as one optax transformation.

    Args:
        config: see OptimizerConfig.
        steps: updates of the whole run.
        schedule: in the place of the configured one.

    Raises:
        ValueError: see make_schedule.

    Source of Muon: Jordan 2024 (https://kellerjordan.github.io/posts/muon); its updates are scaled
    to Adam's root mean square, so that rates carry over: Liu et al. 2025, arXiv 2502.16982.
    Adafactor: Shazeer and Stern 2018, arXiv 1804.04235, without momentum; Lion: Chen et al. 2023,
    arXiv 2302.06675; schedule-free: Defazio et al. 2024, arXiv 2405.15682.
    """
    schedule = schedule or make_schedule(config, steps)
    clipping = []
    if config.clip_norm is not None:
        clipping.append(optax.clip_by_global_norm(config.clip_norm))
    return optax.chain(*clipping, *_after_clipping(config, schedule))


def _after_clipping(
    config: OptimizerConfig, schedule: optax.Schedule
) -> list[optax.GradientTransformation]:
    if config.name == "muon":
        muon = contrib.muon(
            schedule,
            beta=config.momentum,
            eps=config.eps,
            weight_decay=config.weight_decay,
            adam_b1=config.b1,
            adam_b2=config.b2,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=functools.partial(
                _matrices, each_head=config.each_head
            ),
        )
        return [muon]
    parts = _scaling(config)
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=_has_two_axes))
    parts.append(optax.scale_by_learning_rate(schedule))
    if config.name == "schedule_free":
        return [contrib.schedule_free(optax.chain(*parts), schedule, b1=config.b1)]
    return parts


def _scaling(config: OptimizerConfig) -> list[optax.GradientTransformation]:
    """From gradients to updates, before decay and rate."""
    if config.name == "adafactor":
        return [
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.scale_by_param_block_rms(),
        ]
    if config.name == "lion":
        return [optax.scale_by_lion(b1=config.b1, b2=config.b2)]
    if config.name == "schedule_free":  # Adam without its first moment.
        return [
            optax.scale_by_rms(
                decay=config.b2, eps=config.eps, eps_in_sqrt=False, bias_correction=True
            )
        ]
    return [optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)]


def averaged_params(opt_state: Any, params: Any) -> Any:
    """The average that a schedule-free optimizer keeps, x of equation 5: what is to be evaluated.

    Args:
        opt_state: of `make_optimizer`, whose config `averages`.
        params: y, where gradients are taken.
    """
    return contrib.schedule_free_eval_params(opt_state[-1], params)


def _has_two_axes(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)


def _matrices(params: Any, *, each_head: bool = False) -> Any:
    """Which axes of each parameter a matrix product sums over; None: it is no such matrix.

    By the names of a parameter's axes: the model's width "embed" comes first in what a layer
    reads with, and last in what it writes with; and so does the "rank" of an adapter's factors.
    A plain array is a matrix if it has two axes.
    """

    def numbers(param: Any) -> contrib.MuonDimensionNumbers | None:
        if not isinstance(param, nnx.Variable):
            return contrib.MuonDimensionNumbers() if param.ndim == 2 else None
        axes = param.get_metadata().get("axes", ())
        within = "embed" in axes or "rank" in axes
        if len(axes) < 2 or not within or "vocab" in axes:
            return None
        split = input_axes(axes)
        apart = ("heads", "kv_heads") if each_head else ()
        reads, writes = (
            tuple(i for i in part if axes[i] not in apart)
            for part in (range(split), range(split, len(axes)))
        )
        return contrib.MuonDimensionNumbers(reads, writes)

    return jax.tree.map(numbers, params, is_leaf=lambda x: isinstance(x, nnx.Variable))
