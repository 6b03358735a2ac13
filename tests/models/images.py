"""Toy batches of images, and training of toy classifiers on meshes."""

import jax
import numpy as np
from flax import nnx

from qkv_jax.training import (
    MeshConfig,
    OptimizerConfig,
    create_state,
    make_mesh,
    make_optimizer,
    make_train_step,
    place_batch,
)


def make_batch(config, rows):
    rng = np.random.default_rng(0)
    size = (rows, config.height, config.width, config.channels)
    return {
        "image": rng.integers(0, 256, size).astype(np.uint8),
        "label": rng.integers(0, config.classes, rows).astype(np.int32),
        "weight": np.ones(rows, np.float32),
    }


def means(model, batch):
    sums = jax.device_get(model.loss(batch, rng=None)[1])
    return {
        name.removesuffix("_sum"): float(value / sums["tokens"])
        for name, value in sums.items()
    }


def trained_on_a_mesh(module, config, batch, *, devices, steps):
    """Parameters and losses after a few steps of Muon, with all randomness, on 1 or 8 devices."""
    shape = MeshConfig(data=2, fsdp=2, tensor=2) if devices == 8 else MeshConfig()
    mesh = make_mesh(shape, devices=jax.devices()[:devices])
    graph, params = nnx.split(module.Model(config, rngs=nnx.Rngs(0)), nnx.Param)
    optimizer = make_optimizer(
        OptimizerConfig(name="muon", peak_lr=0.02, warmup_steps=1), steps
    )
    state = create_state(params, optimizer, seed=0, mesh=mesh)

    def loss(params, batch, rng):
        return nnx.merge(graph, params).loss(batch, rng=rng)

    step = make_train_step(loss, optimizer, mesh=mesh)
    placed, losses = place_batch(batch, mesh), []
    for _ in range(steps):
        state, metrics = step(state, placed)
        losses.append(float(metrics["loss"]))
    return jax.device_get(nnx.to_pure_dict(state.params)), losses
