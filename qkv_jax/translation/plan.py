"""What a step of a translation run will cost on a mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from rich.table import Table

from qkv_jax import training
from qkv_jax.data import PAD
from qkv_jax.models import seq2seq
from qkv_jax.training.plan import (
    HARDWARE,
    Hardware,
    Plan,
    device_bytes,
    plan_step,
)
from qkv_jax.translation.config import TranslationConfig
from qkv_jax.translation.loss import make_loss
from qkv_jax.translation.models import ModelConfig, init_params
from qkv_jax.translation.start import started
from qkv_jax.translation.teacher import load_teacher, make_teacher


def plan_run(config: TranslationConfig) -> Plan:
    """The cost of an update with the longest rows, on simulated devices of the config's mesh.

    Reads no text: the vocabulary is taken to be as large as asked for, or as that of the model it
    starts from, or of its teacher, whose weights and forward pass count.

    Args:
        config: of the run.

    Raises:
        RunError: the mesh does not fit the devices or the model; the teacher does not fit the model.
    """
    text = config.text
    start, tutor = started(config), load_teacher(config)
    given = start or tutor
    vocabulary = text.vocabulary if given is None else given.model.vocabulary
    new = dataclasses.replace(config.computed_model, vocabulary=vocabulary, pad=PAD)
    model = _check_known(new if start is None else start.model)
    try:
        mesh = training.make_mesh(config.mesh)
        seq2seq.check_mesh(model, mesh.shape)
        optimizer = training.make_optimizer(config.optimizer, config.training.steps)
        state = training.abstract_state(
            functools.partial(init_params, model, seed=0),
            optimizer,
            mesh=mesh,
            rng_impl=config.training.rng_impl,
            ema=config.training.ema_decay is not None or config.optimizer.averages,
            finetune=config.finetune,
            sparsity=config.sparsity,
            precision=config.precision,
        )
    except ValueError as error:
        raise training.RunError(f"mesh: {error}") from error
    teacher = None
    if given is not None:
        teacher = make_teacher(
            config, tutor, model=model, tokenizer=given.tokenizer, mesh=mesh
        )
    step = training.make_train_step(
        make_loss(model, config.label_smoothing, r_drop=config.r_drop, teacher=teacher),
        optimizer,
        mesh=mesh,
        accumulate=config.training.accumulate,
        ema_decay=config.training.ema_decay,
        averaged=training.averaged_params if config.optimizer.averages else None,
        rng_impl=config.training.rng_impl,
        finetune=config.finetune,
        sparsity=config.sparsity,
        precision=config.precision,
    )
    multiple = training.batch_shares(mesh) * config.training.accumulate
    rows = max(multiple, text.batch_tokens // text.max_target // multiple * multiple)
    lengths = {"source": text.max_source, "target": text.max_target}
    names = dict(lengths)
    if text.packing:
        names |= {f"{name}_segments": length for name, length in lengths.items()}
    place = training.logical_sharding(mesh, "batch")
    batch = {
        name: jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=place)
        for name, length in names.items()
    }
    seen = 2 * rows if config.r_drop else rows
    plan = plan_step(
        step,
        state,
        batch,
        tokens=rows * text.max_target,
        flops=seq2seq.train_flops(model, rows=seen, **lengths),
        dtype=model.dtype,
    )
    if teacher is None:
        return plan
    forward = seq2seq.train_flops(_check_known(teacher.model), rows=rows, **lengths) / 3
    held = plan.held | {"teacher": device_bytes(teacher.params)}
    return dataclasses.replace(plan, held=held, flops=plan.flops + forward)


def _check_known(model: ModelConfig) -> seq2seq.Config:
    if not isinstance(model, seq2seq.Config):
        raise training.RunError("plan knows what a Transformer costs, not this model")
    return model


def show_plan(plan: Plan, *more: Hardware) -> list[Table]:
    """Tables of memory, of collectives, and of estimates on HARDWARE and on more."""
    held = Table(title=f"one of {plan.devices} devices holds, at the step's peak")
    for name in (*plan.held, "all"):
        held.add_column(name, justify="right")
    held.add_row(*(_bytes(size) for size in (*plan.held.values(), plan.bytes)))
    moved = Table("collective", title="a device sends in a step")
    for name in ("count", "bytes"):
        moved.add_column(name, justify="right")
    for kind, found in plan.collectives.items():
        moved.add_row(kind, str(found.count), _bytes(found.bytes))
    times = Table(
        "device",
        title=f"a step: {plan.flops:.3g} FLOP, {plan.tokens:,} target tokens; ms at peak rates",
    )
    for name in ("compute", "memory", "network", "step", "tokens/s"):
        times.add_column(name, justify="right", no_wrap=True)
    times.add_column("bound by", no_wrap=True)
    times.add_column("fits", no_wrap=True)
    for hardware in (*HARDWARE, *more):
        cost = plan.estimate(hardware)
        parts = (cost.compute, cost.memory, cost.network, cost.seconds)
        times.add_row(
            hardware.name,
            *(f"{part * 1e3:.3g}" for part in parts),
            f"{plan.tokens / cost.seconds:.3g}",
            cost.bound,
            "yes" if plan.bytes <= hardware.bytes else "no",
        )
    return [held, moved, times] if plan.collectives else [held, times]


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"
