"""Learning-rate schedules and Adam, from one config to one optax transformation."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Adam or AdamW with a warmed-up learning rate.

    The defaults are those of Vaswani et al. 2017 (arXiv 1706.03762, section 5.3).

    Attributes:
        name: "adam", or "adamw" for decoupled weight decay.
        peak_lr: learning rate at the end of the warm-up.
        warmup_steps: updates of linear warm-up, from peak_lr / warmup_steps.
        schedule: what follows the warm-up: "inverse_sqrt" (peak * sqrt(warmup / step)),
            "cosine" or "linear" (down to final_fraction * peak at the last step), "constant".
        final_fraction: end of "cosine" and "linear", as a fraction of peak_lr.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: AdamW's decay, times the learning rate. Not applied to parameters
            of fewer than two axes (biases, normalisation scales).
        clip_norm: largest global norm of the gradient; None: no clipping.
    """

    name: Literal["adam", "adamw"] = "adam"
    peak_lr: float = 1e-3
    warmup_steps: int = 1000
    schedule: Literal["inverse_sqrt", "cosine", "linear", "constant"] = "inverse_sqrt"
    final_fraction: float = 0.0
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-9
    weight_decay: float = 0.0
    clip_norm: float | None = None

    def __post_init__(self):
        if self.name not in ("adam", "adamw"):
            raise ValueError(f"name must be 'adam' or 'adamw'; got {self.name!r}.")
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
        if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1):
            raise ValueError(
                f"b1 and b2 must be in [0, 1); got {self.b1} and {self.b2}."
            )
        if self.eps <= 0:
            raise ValueError(f"eps must be positive; got {self.eps}.")
        if self.weight_decay < 0:
            raise ValueError(
                f"weight_decay must not be negative; got {self.weight_decay}."
            )
        if self.weight_decay and self.name == "adam":
            raise ValueError("weight_decay needs name='adamw'; 'adam' has none.")
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
    """Clipping, Adam or AdamW, and the schedule, as one optax transformation.

    Args:
        config: see OptimizerConfig.
        steps: updates of the whole run.

    Raises:
        ValueError: see make_schedule.
    """
    parts = []
    if config.clip_norm is not None:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    parts.append(optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps))
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=_has_two_axes))
    parts.append(optax.scale_by_learning_rate(make_schedule(config, steps)))
    return optax.chain(*parts)


def _has_two_axes(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)
