"""A few updates of a model of examples, on a mesh."""

from typing import Any

import jax
import numpy as np
from flax import nnx

from qkv_jax.data.splits import take_rows
from qkv_jax.tasks.config import new_model
from qkv_jax.tasks.run import make_loss
from qkv_jax.training import (
    MeshConfig,
    OptimizerConfig,
    create_state,
    make_mesh,
    make_optimizer,
    make_train_step,
    place_batch,
)


def step_losses(
    model: Any, arrays: dict[str, np.ndarray], *, mesh: MeshConfig, steps: int = 3
) -> list[float]:
    """The losses of updates by Adam, all on the same examples.

    Args:
        model: a model file's Config, with all sizes.
        arrays: the examples.
        mesh: its shape, on the first of all devices.
        steps: updates.
    """
    count = mesh.data * mesh.fsdp * mesh.tensor * mesh.context
    devices = make_mesh(mesh, devices=jax.devices()[:count])
    optimizer = make_optimizer(OptimizerConfig(peak_lr=1e-2, warmup_steps=1), steps)
    params = nnx.state(new_model(model, seed=0), nnx.Param)
    state = create_state(params, optimizer, seed=0, mesh=devices)
    step = make_train_step(make_loss(model), optimizer, mesh=devices)
    rows = take_rows(arrays, np.arange(len(next(iter(arrays.values())))))
    batch, losses = place_batch(rows, devices), []
    # Compiling takes nearly all of the time, and half of that goes into speed.
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        for _ in range(steps):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
    return losses
