"""Weights that are 0 and stay so, chosen by size as training goes on, or of a lottery ticket.

Why no library. jaxpruner, the one for optax, keeps its masks in the optimizer's state and hands the
step back parameters that are not masked yet; it knows no axes' names, so that masks would lie whole
on each device; and its authors publish no package of it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qkv_jax.training.adapters import (
    FinetuneConfig,
    check_patterns,
    map_params,
    matching_names,
    param_names,
    split_params,
)

Array = jax.Array
# A mask, as the parameter that it is of, by the parameter's dotted name.
Masks = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparsityConfig:
    """Which weights are 0. The default is none.

    Each chosen matrix has the same share of zeros, its smallest weights, and what is 0 stays 0:
    the loss sees masked weights, and neither updates nor averages bring them back. The share is
    `final` (1 - (1 - (n - start) / (end - start)) ** 3) after n updates.

    Attributes:
        final: the share at the end; None: none.
        start, end: updates made when the first weights go, and when the last do.
        every: updates from one choice to the next; divides end - start.
        parameters: patterns of the dotted names of the matrices, see `FinetuneConfig`; norms,
            biases and embeddings are left out unless they are asked for: "*embedding.table".
        rewind: a lottery ticket: the model that the run starts from is that of a sparse run after
            so many updates, as a checkpoint or, of 0, its start has it; and the mask is that run's
            last one, from the first update to the last. None: no ticket.

    Source: Zhu and Gupta 2017, arXiv 1710.01878, equation 1, with no zeros at first. Difference:
    there, a weight that is 0 keeps the value it had, and may come back. Tickets: Frankle and
    Carbin 2019, arXiv 1803.03635; from an early update: Frankle et al. 2019, arXiv 1912.05671.
    """

    final: float | None = None
    start: int = 0
    end: int = 1000
    every: int = 50
    parameters: tuple[str, ...] = ("*.kernel",)
    rewind: int | None = None

    def __post_init__(self):
        check_patterns("parameters", self.parameters)
        if self.final is None or self.rewind is not None:
            self._check_unused()
        if self.rewind is not None and self.rewind < 0:
            raise ValueError(
                f"rewind must not be negative, or None; got {self.rewind}."
            )
        if self.final is not None and not 0.0 < self.final < 1.0:
            raise ValueError(f"final must be in (0, 1), or None; got {self.final}.")
        if not self.parameters:
            raise ValueError("parameters must have at least one pattern; got none.")
        if not 0 <= self.start < self.end:
            raise ValueError(
                f"start must be in 0 .. end - 1; got start = {self.start}, end = {self.end}."
            )
        if self.every < 1 or (self.end - self.start) % self.every:
            raise ValueError(
                "every must divide end - start, so that the last choice is at end; got "
                f"every = {self.every}, start = {self.start}, end = {self.end}."
            )

    def _check_unused(self) -> None:
        ticket = self.rewind is not None
        reason = (
            "a ticket's mask is that of the run it comes from: leave out rewind, or this"
            if ticket
            else "it is of final, which is not given"
        )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "rewind" and value != field.default:
                raise ValueError(
                    f"{field.name} must be {field.default}: {reason}; got {value}."
                )

    @property
    def on(self) -> bool:
        """Whether there are masks."""
        return self.final is not None or self.rewind is not None

    def share(self, updates: Array) -> Array:
        """The share of zeros after so many updates: () int -> () float32."""
        done = (jnp.asarray(updates, jnp.float32) - self.start) / (
            self.end - self.start
        )
        return (self.final or 0.0) * (1.0 - (1.0 - jnp.clip(done, 0.0, 1.0)) ** 3)


NO_SPARSITY = SparsityConfig()


def check_sparsity(
    sparsity: SparsityConfig, training: Any, finetune: FinetuneConfig
) -> None:
    """Raises ValueError where masks do not fit how a run trains, a TrainingConfig."""
    if not sparsity.on:
        return
    if finetune.lora.rank is not None:
        raise ValueError(
            "sparsity is of the weights that are trained, and lora adds a change to them that has "
            "no zeros: give one of them."
        )
    if sparsity.final is None:
        return
    if sparsity.end >= training.steps:
        raise ValueError(
            "sparsity.end must be less than training.steps, so that what is left is trained; got "
            f"{sparsity.end} of {training.steps}."
        )
    if training.average > 1:
        raise ValueError(
            "training.average must be 1 with sparsity.final: a mean of checkpoints has only the "
            f"zeros that all of them have; got {training.average}."
        )
    if training.patience is not None:
        raise ValueError(
            "training.patience must be None with sparsity.final: evaluations get worse as weights "
            f"go, and would end the run; got {training.patience}."
        )


def new_masks(params: Any, sparsity: SparsityConfig) -> Masks:
    """Masks that leave out nothing yet, of the matrices of `sparsity.parameters`.

    Args:
        params: pytree of arrays or of `nnx.Variable`s, None where a parameter is not trained.
        sparsity: its `final` is given.

    Raises:
        ValueError: a pattern matches no parameter, or one that is no matrix.
    """
    chosen = matching_names("parameters", sparsity.parameters, param_names(params))
    return masks_like(params, chosen)


def check_masks(
    params: Any, finetune: FinetuneConfig | None, sparsity: SparsityConfig
) -> None:
    """Raises ValueError where new_masks would, of arrays or ShapeDtypeStructs; makes nothing."""
    if sparsity.final is not None:
        jax.eval_shape(
            lambda x: new_masks(split_params(x, finetune)[0], sparsity), params
        )


def masks_like(params: Any, names: Any) -> Masks:
    """Masks of ones of the named parameters."""
    masks: Masks = {}

    def add(name: str, param: Any) -> None:
        if param is None or name not in names:
            return
        if any(x.ndim < 2 for x in jax.tree.leaves(param)):
            raise ValueError(
                f"parameters matches {name!r}, which is no matrix: name kernels or tables only, "
                "such as '*.kernel'."
            )
        masks[name] = jax.tree.map(lambda x: jnp.ones(x.shape, bool), param)

    map_params(add, params)
    return masks


def apply_masks(params: Any, masks: Masks | None) -> Any:
    """Parameters, or their average, with 0 where a mask is False; no masks, or no params: as is."""
    if not masks or params is None:
        return params

    def mask(name: str, param: Any) -> Any:
        if param is None or name not in masks:
            return param
        return jax.tree.map(lambda x, m: jnp.where(m, x, 0), param, masks[name])

    return map_params(mask, params)


def next_masks(
    masks: Masks, params: Any, updates: Array, sparsity: SparsityConfig
) -> Masks:
    """The masks for the update that follows `updates` others: chosen anew where it is time."""
    if sparsity.final is None:
        return masks
    since = updates - sparsity.start
    due = (since >= 0) & (updates <= sparsity.end) & (since % sparsity.every == 0)

    def choose() -> Masks:
        chosen = dict(masks)

        def of(name: str, param: Any) -> None:
            if param is not None and name in masks:
                share = sparsity.share(updates)
                chosen[name] = jax.tree.map(
                    lambda x, m: _largest(x, m, share), param, masks[name]
                )

        map_params(of, params)
        return chosen

    return jax.lax.cond(due, choose, lambda: masks)


def zeros_share(masks: Masks) -> Array:
    """The share of what is masked away: () float32."""
    leaves = jax.tree.leaves(masks)
    ones = sum(jnp.sum(m, dtype=jnp.float32) for m in leaves)
    return 1.0 - ones / sum(m.size for m in leaves)


def _largest(x: Array, mask: Array, share: Array) -> Array:
    """Where x is not among the smallest `share`; what was masked before is the smallest."""
    sizes = jnp.where(mask, jnp.abs(x), -1.0).reshape(-1)
    ranks = jnp.argsort(jnp.argsort(sizes))
    return (ranks >= jnp.round(share * sizes.size)).reshape(x.shape)
