"""Learning-rate schedules, Adam and Muon, from one config to one optax transformation."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from optax import contrib

from qkv_jax.ops.axes import input_axes


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Adam, AdamW or Muon with a warmed-up learning rate.

    The defaults are those of Vaswani et al. 2017 (arXiv 1706.03762, section 5.3).

    Attributes:
        name: "adam"; "adamw" for decoupled weight decay; "muon" for orthogonalised momentum on
            the matrices within the layers, and Adam on all else (embeddings, biases, scales):
            fewer updates to the same loss, each about a quarter dearer for a small model on a CPU.
        peak_lr: learning rate at the end of the warm-up.
        warmup_steps: updates of linear warm-up, from peak_lr / warmup_steps.
        schedule: what follows the warm-up: "inverse_sqrt" (peak * sqrt(warmup / step)),
            "cosine" or "linear" (down to final_fraction * peak at the last step), "constant".
        final_fraction: end of "cosine" and "linear", as a fraction of peak_lr.
        b1: decay of Adam's first moment.
        b2: decay of Adam's second moment.
        eps: added to the root of the second moment.
        momentum: decay of Muon's momentum.
        each_head: whether Muon orthogonalises each head's part of a projection by itself: cheaper
            for small models, and about as good an update.
        weight_decay: decoupled decay of AdamW and Muon, times the learning rate. Not applied to
            parameters of fewer than two axes (biases, normalisation scales), nor to those that
            Muon leaves to Adam.
        clip_norm: largest global norm of the gradient; None: no clipping.
    """

    name: Literal["adam", "adamw", "muon"] = "adam"
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
        if self.name not in ("adam", "adamw", "muon"):
            raise ValueError(
                f"name must be 'adam', 'adamw' or 'muon'; got {self.name!r}."
            )
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
        if self.weight_decay and self.name == "adam":
            raise ValueError(
                "weight_decay needs name='adamw' or 'muon'; 'adam' has none."
            )
        if self.each_head and self.name != "muon":
            raise ValueError(f"each_head needs name='muon'; got {self.name!r}.")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(
                f"clip_norm must be positive, or None; got {self.clip_norm}."
            )


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


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping, Adam, AdamW or Muon, and the schedule, as one optax transformation.

    Args:
        config: see OptimizerConfig.
        steps: updates of the whole run.

    Raises:
        ValueError: see make_schedule.

    Source of Muon: Jordan 2024 (https://kellerjordan.github.io/posts/muon); its updates are scaled
    to Adam's root mean square, so that rates carry over: Liu et al. 2025, arXiv 2502.16982.
    """
    schedule, parts = make_schedule(config, steps), []
    if config.clip_norm is not None:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
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
        return optax.chain(*parts, muon)
    parts.append(optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps))
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=_has_two_axes))
    parts.append(optax.scale_by_learning_rate(schedule))
    return optax.chain(*parts)


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
