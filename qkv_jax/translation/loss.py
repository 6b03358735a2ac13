"""What a translation model is trained to make small."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.tree_util import Partial

from qkv_jax import training
from qkv_jax.compression import GateConfig, Quantisation, apply_gates, imitate
from qkv_jax.data import BOS, EOS
from qkv_jax.models import seq2seq
from qkv_jax.training.losses import Taught, projected_cross_entropy
from qkv_jax.translation.models import FLOAT, UNGATED, ModelConfig, model_graph
from qkv_jax.translation.teacher import Teacher, decoder_inputs

LOSS_CHUNKS = 4


def make_loss(
    config: ModelConfig,
    label_smoothing: float,
    *,
    r_drop: float = 0.0,
    start: int = BOS,
    eos: int = EOS,
    quantise: Quantisation = FLOAT,
    teacher: Teacher | None = None,
    gates: GateConfig = UNGATED,
) -> training.step.LossFn:
    """The loss of `training.train` for this model: sums over the real target tokens.

    Args:
        config: of the model.
        label_smoothing: share of the target distribution spread over all subwords.
        r_drop: alpha of R-Drop; not 0: where there is dropout, each row goes through the model
            twice, and sums are means of both.
        start, eos: ids that targets start from and end with.
        quantise: what the model is rounded to.
        teacher: whose predictions count where there is dropout, that is in training; its params
            are arguments of the program, and nothing changes them.
        gates: of its heads, whose parameters are then among those of the loss; its sums have
            "gates_sum", the number of open gates a token, and in training loss their penalty.
    """
    graph, ids = model_graph(config, gates=gates), {"start": start, "eos": eos}

    def loss_fn(known, params, batch, rng):
        taught = None
        if teacher is not None and rng is not None:
            taught = teacher.taught(known, batch, **ids)
        twice = rng is not None and r_drop > 0.0
        if twice:
            batch = {name: _twice(array) for name, array in batch.items()}
            if taught is not None:
                states = _twice(taught.states)
                taught = dataclasses.replace(taught, states=states)
        model = nnx.merge(graph, params)
        if quantise.weights is not None:
            imitate(model, quantise)
        opened = None
        if gates.on:
            opened = apply_gates(model, gates, len(batch["source"]), rng)
        loss, sums = module_loss(
            model,
            batch,
            rng,
            label_smoothing,
            r_drop=r_drop if twice else 0.0,
            taught=taught,
            **ids,
        )
        if opened is None:
            return loss, sums
        opened = sums["tokens"] * opened
        if rng is not None and gates.penalty:
            loss = loss + gates.penalty * opened
        return loss, sums | {"loss_sum": loss, "gates_sum": opened}

    if teacher is None:
        return functools.partial(loss_fn, None)
    return Partial(loss_fn, teacher.params)


def _twice(array: jax.Array) -> jax.Array:
    """(B, ...) -> (2 B, ...), each row and its copy side by side, on the devices it is on."""
    pairs = jnp.broadcast_to(array[:, None], (len(array), 2, *array.shape[1:]))
    return pairs.reshape(-1, *array.shape[1:])


def module_loss(
    model: Any,
    batch: dict[str, jax.Array],
    rng: jax.Array | None,
    label_smoothing: float,
    *,
    r_drop: float = 0.0,
    taught: Taught | None = None,
    start: int,
    eos: int,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What `make_loss` makes, of a module; with r_drop, of rows and their copies in turn."""
    target = batch["target"]
    shifted, segments = decoder_inputs(batch, start=start, eos=eos)
    states = model.states(batch["source"], shifted, segments=segments, rng=rng)
    weights = (target != model.config.pad).astype(jnp.float32)
    if r_drop:
        weights = 0.5 * weights
    loss, nll, correct = projected_cross_entropy(
        *model.projection(states),
        target,
        weights,
        label_smoothing,
        2 * LOSS_CHUNKS if r_drop else LOSS_CHUNKS,
        r_drop,
        taught,
    )
    penalty = model.penalty() if isinstance(model, seq2seq.Model) else None
    if penalty is not None and rng is not None:
        loss = loss + weights.sum() * penalty
    sums = {"loss_sum": loss, "nll_sum": nll, "correct_sum": correct}
    return loss, sums | {"tokens": weights.sum()}
