"""One update, and one evaluation, as jitted pure functions of pytrees."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.tree_util import Partial

from qkv_jax.training.adapters import FinetuneConfig, merge_params
from qkv_jax.training.precision import (
    DEFAULT,
    PrecisionConfig,
    adjust_scale,
    keep_moments,
    keep_params,
    scaled_gradient,
    widen,
)
from qkv_jax.training.sharding import (
    auto_mesh,
    logical_sharding,
    place_batch,
    replicated,
    state_shardings,
)
from qkv_jax.training.sparsity import (
    NO_SPARSITY,
    SparsityConfig,
    apply_masks,
    next_masks,
    zeros_share,
)
from qkv_jax.training.state import TrainState
from qkv_jax.training.stopping import stop_point

# (params, batch, rng) -> (loss_sum, aux): float32 sums over the batch's real target tokens;
# aux holds at least "tokens", their number. rng is a typed key, or None: deterministic.
# Large arrays that it needs besides, such as a teacher's parameters, are those of a Partial, which
# are arguments of the compiled program, where a closure's would be constants within it.
LossFn = Callable[
    [Any, dict[str, jax.Array], Any], tuple[jax.Array, dict[str, jax.Array]]
]
Batch = dict[str, Any]
Metrics = dict[str, jax.Array]


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    schedule: optax.Schedule | None = None,
    accumulate: int = 1,
    ema_decay: float | None = None,
    averaged: Callable[[Any, Any], Any] | None = None,
    rng_impl: str = "rbg",
    finetune: FinetuneConfig | None = None,
    sparsity: SparsityConfig = NO_SPARSITY,
    precision: PrecisionConfig = DEFAULT,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A jitted step that minimises the loss per real token of the whole batch.

    The gradient is that of (sum of losses over all rows, microbatches and devices) / (number of
    real tokens in them), whatever the rows' lengths. Cost of accumulation: one gradient more.
    Where it or the loss is not finite, the update is skipped: all but the step number stays.

    Args:
        loss_fn: see LossFn.
        optimizer: see make_optimizer.
        mesh: see make_mesh.
        schedule: reported as "learning_rate"; None: not reported.
        accumulate: microbatches, run one after another. Each takes every accumulate-th row, so
            that each spans all devices.
        ema_decay: of the moving average in state.ema, capped at (1 + n) / (10 + n) after n
            updates; None: none.
        averaged: (opt_state, params) -> what state.ema is after the update, in place of that.
        rng_impl: that of state.rng.
        finetune: which part of the parameters is trained, as in create_state; loss_fn gets all.
        sparsity: as in create_state: loss_fn gets masked weights, and what is made is masked.
        precision: what is kept of them, as in create_state; loss_fn gets float32. The precision
            that loss_fn computes in is its own.

    Returns:
        step(state, batch) -> (state, metrics). The given state is donated: use the returned one.
        metrics: () float32 each: "tokens", "grad_norm" before clipping, "learning_rate",
        "skipped" (1 or 0), "loss_scale" of this update where there is one, with masks "sparsity",
        the share of zeros of what they are of, and loss_fn's sums per token without their suffix
        ("loss_sum" is reported as "loss").
        batch: dict of (B, ...), B divisible by accumulate times the mesh's data and fsdp axes.
    """

    mesh = auto_mesh(mesh)

    def of_trained(constant: Any, masks: Any, loss_fn: LossFn) -> LossFn:
        return lambda trained, batch, rng: loss_fn(
            merge_params(apply_masks(trained, masks), constant, finetune, rng=rng),
            batch,
            rng,
        )

    def step(
        state: TrainState, batch: Batch, loss_fn: Partial
    ) -> tuple[TrainState, Metrics]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            new, metrics = update(masked(state), batch, loss_fn)
        places = state_shardings(new, mesh)
        return jax.lax.with_sharding_constraint(new, places), metrics

    def masked(state: TrainState) -> TrainState:
        """Before an update, so that one that is skipped leaves new masks in force."""
        if state.masks is None:
            return state
        masks = next_masks(state.masks, state.params, state.step, sparsity)
        return dataclasses.replace(
            state,
            masks=masks,
            params=apply_masks(state.params, masks),
            ema=apply_masks(state.ema, masks),
        )

    def update(
        state: TrainState, batch: Batch, loss_fn: Partial
    ) -> tuple[TrainState, Metrics]:
        rng = jax.random.wrap_key_data(state.rng, impl=rng_impl)
        rng = jax.random.fold_in(rng, state.step)
        kept = state.precision
        scale, lost = (None, None) if kept is None else (kept.loss_scale, kept.lost)
        grads, sums = _summed_gradient(
            scaled_gradient(of_trained(state.constant, state.masks, loss_fn), scale),
            widen(state.params),
            batch,
            rng,
            accumulate,
            mesh,
        )
        metrics = per_token(sums)
        mean = 1.0 / jnp.maximum(sums["tokens"], 1.0)
        grads = jax.tree.map(lambda g: g * mean, grads)
        # A clipping optimizer computes the same norm; XLA merges the two.
        metrics["grad_norm"] = optax.tree.norm(grads)
        if schedule is not None:
            metrics["learning_rate"] = schedule(state.step)
        if state.masks:
            metrics["sparsity"] = zeros_share(state.masks)
        finite = jnp.isfinite(sums["loss_sum"]) & jnp.isfinite(metrics["grad_norm"])
        metrics["skipped"] = 1.0 - finite.astype(jnp.float32)
        if scale is not None:
            metrics["loss_scale"] = scale
        made = updated(state, grads, widen(state.params, lost), rng)
        new = {
            name: jax.tree.map(
                lambda new, old: jnp.where(finite, new, old), part, getattr(state, name)
            )
            for name, part in made.items()
        }
        if kept is not None:
            new["precision"] = adjust_scale(precision, new["precision"], finite)
        return dataclasses.replace(state, step=state.step + 1, **new), metrics

    def updated(
        state: TrainState, grads: Any, params: Any, rng: jax.Array
    ) -> dict[str, Any]:
        """What an update changes in the state, whose parameters are these in float32."""
        updates, opt_state = optimizer.update(grads, widen(state.opt_state), params)
        params = apply_masks(optax.apply_updates(params, updates), state.masks)
        ema = None
        if averaged is not None:
            ema = averaged(opt_state, params)
        elif ema_decay is not None:
            ema = _average(state.ema, params, state.step, ema_decay)
        ema = apply_masks(ema, state.masks)
        params, lost = keep_params(precision, params, rng)
        kept = state.precision
        if kept is not None:
            kept = dataclasses.replace(kept, lost=lost)
        return {
            "params": params,
            "opt_state": keep_moments(precision, opt_state, rng),
            "ema": ema,
            "precision": kept,
        }

    jitted = jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(None, logical_sharding(mesh, "batch"), None),
        out_shardings=(None, replicated(mesh)),
    )
    return _WithLoss(jitted, loss_fn)


class _WithLoss:
    """A jitted function of arguments and a loss, of which it is always the same; lowered and
    compiled ones are likewise."""

    def __init__(self, program: Any, loss_fn: LossFn):
        self._program = program
        self._loss = loss_fn if isinstance(loss_fn, Partial) else Partial(loss_fn)

    def __call__(self, *arguments: Any) -> Any:
        return self._program(*arguments, self._loss)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._program, name)

    def lower(self, *arguments: Any) -> "_WithLoss":
        """As of a jitted function."""
        return _WithLoss(self._program.lower(*arguments, self._loss), self._loss)

    def compile(self) -> "_WithLoss":
        """As of a lowered one."""
        return _WithLoss(self._program.compile(), self._loss)


def make_eval_step(loss_fn: LossFn, *, mesh: Mesh) -> Callable[[Any, Batch], Metrics]:
    """A jitted step(params, batch) -> loss_fn's sums, with rng None: no dropout."""
    mesh = auto_mesh(mesh)

    def step(params: Any, batch: Batch, loss_fn: Partial) -> Metrics:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return loss_fn(params, batch, None)[1]

    jitted = jax.jit(
        step,
        in_shardings=(None, logical_sharding(mesh, "batch"), None),
        out_shardings=replicated(mesh),
    )
    return _WithLoss(jitted, loss_fn)


def evaluate_loss(
    eval_step: Callable[[Any, Batch], Metrics],
    params: Any,
    batches: Iterable[Batch],
    *,
    mesh: Mesh,
) -> dict[str, float]:
    """The means per real token over all batches, such as {"loss": 1.9, "nll": 1.7, "tokens": 812}.

    Args:
        eval_step: see make_eval_step.
        params: on the mesh.
        batches: dicts of numpy arrays (B, ...), B divisible by the mesh's data and fsdp axes.
        mesh: that of eval_step.

    Raises:
        ValueError: there is no batch.
    """
    sums: list[Metrics] = []
    for batch in batches:
        stop_point()
        sums.append(eval_step(params, place_batch(batch, mesh)))
        # No long queue of work, which a stop would have to wait for.
        jax.block_until_ready(sums[-2:][0])
    if not sums:
        raise ValueError("batches must hold at least one batch to evaluate on.")
    total = jax.tree.map(lambda *xs: sum(map(float, xs)), *jax.device_get(sums))
    return {name: float(value) for name, value in per_token(total).items()}


def per_token(sums: dict[str, Any]) -> dict[str, Any]:
    """Sums over tokens -> means, {"loss_sum": 6, "tokens": 3} -> {"loss": 2, "tokens": 3}."""
    tokens = sums["tokens"]
    counted = tokens + (tokens == 0)
    return {
        name.removesuffix("_sum"): value if name == "tokens" else value / counted
        for name, value in sums.items()
    }


def _summed_gradient(gradient, params, batch, rng, accumulate: int, mesh: Mesh):
    """Gradient of the loss sum, and the sums, over all microbatches."""
    if accumulate == 1:
        return gradient(params, batch, rng)

    def add(total, microbatch):
        index, rows = microbatch
        new = gradient(params, rows, jax.random.fold_in(rng, index))
        return jax.tree.map(jnp.add, total, new), None

    sharding = logical_sharding(mesh, None, "batch")

    def split(x):
        if x.shape[0] % accumulate:
            raise ValueError(
                f"batch has {x.shape[0]} rows, which accumulate={accumulate} does not divide."
            )
        x = jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0)
        return jax.lax.with_sharding_constraint(x, sharding)

    microbatches = (jnp.arange(accumulate), jax.tree.map(split, batch))
    rows = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), microbatches[1]
    )
    shapes = jax.eval_shape(gradient, params, rows, rng)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zeros, microbatches)[0]


def _average(ema, params, step, decay: float):
    updates = step.astype(jnp.float32)
    kept = jnp.minimum(decay, (1.0 + updates) / (10.0 + updates))
    return jax.tree.map(lambda e, p: e + (1.0 - kept) * (p - e), ema, params)
