"""Toy batches of images, and what toy classifiers make of them, on one device or many."""

import functools

import jax
import jax.numpy as jnp
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


def build(module, config):
    """A model that already tells the classes apart: new ones start with a head of zeros."""
    model = module.Model(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    model.head.kernel[...] = jnp.asarray(
        rng.normal(size=model.head.kernel.shape), jnp.float32
    )
    return model


def logits(module, config, batch):
    return _logits(*nnx.split(build(module, config)), batch)


def loss_sums(module, config, batch, *, rng=None):
    return _loss_sums(*nnx.split(build(module, config)), batch, rng)


@functools.partial(jax.jit, static_argnums=0)
def _logits(graph, params, batch):
    return nnx.merge(graph, params).predict(batch)["logits"]


@functools.partial(jax.jit, static_argnums=0)
def _loss_sums(graph, params, batch, rng):
    return nnx.merge(graph, params).loss(batch, rng=rng)[1]


def losses_on_a_mesh(module, config, batch, *, devices, steps=3):
    """The losses of a few steps, with all randomness, on 1 or on 8 devices."""
    shape = MeshConfig(data=2, fsdp=2, tensor=2) if devices == 8 else MeshConfig()
    mesh = make_mesh(shape, devices=jax.devices()[:devices])
    graph, params = nnx.split(module.Model(config, rngs=nnx.Rngs(0)), nnx.Param)
    optimizer = make_optimizer(OptimizerConfig(peak_lr=0.02, warmup_steps=1), steps)
    state = create_state(params, optimizer, seed=0, mesh=mesh)

    def loss(params, batch, rng):
        return nnx.merge(graph, params).loss(batch, rng=rng)

    step = make_train_step(loss, optimizer, mesh=mesh)
    placed, losses = place_batch(batch, mesh), []
    for _ in range(steps):
        state, metrics = step(state, placed)
        losses.append(float(metrics["loss"]))
    return losses
