"""How much does a mesh cost, with the same total work on 1, 2, 4 and 8 simulated devices?

    python -m benchmarks.scaling

Simulated devices share the machine's cores, so nothing gets faster: what a mesh takes longer than
one device is its overhead, of collectives, of smaller products, and of work that every device
repeats. All meshes are timed in one process and take turns, with one device's step before each. The
first line checks `qkv-jax plan` against that step: its estimate is a floor, from this machine's own
peak rate.
"""

import functools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tyro

MOST = 8


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The model and the batch, the same on every mesh."""

    d_model: int = 256
    d_ff: int = 1024
    heads: int = 8
    layers: int = 3
    """In the encoder, and again in the decoder."""
    vocabulary: int = 8_000
    rows: int = 64
    length: int = 64
    """Tokens of each source and of each target."""


def meshes() -> dict[str, dict[str, int]]:
    """The shape of each mesh by its name."""
    found = {}
    for count in (2, 4, MOST):
        for axis in ("data", "fsdp", "tensor", "context"):
            found[f"{axis} {count}"] = {"data": 1, axis: count}
    found["data 2, fsdp 2, tensor 2"] = {"data": 2, "fsdp": 2, "tensor": 2}
    found["fsdp 2, context 2, tensor 2"] = {
        "data": 1,
        "fsdp": 2,
        "context": 2,
        "tensor": 2,
    }
    return found


def planned(setup: Setup, sizes: dict[str, int], context: str) -> tuple[Any, Callable]:
    """The plan of a step on a mesh, and the step: () -> None, which waits for its end."""
    import jax
    import jax.numpy as jnp

    from qkv_jax import training
    from qkv_jax.models import seq2seq
    from qkv_jax.training.plan import plan_step
    from qkv_jax.translation.loss import make_loss
    from qkv_jax.translation.models import init_params

    config = seq2seq.Config(
        vocabulary=setup.vocabulary,
        d_model=setup.d_model,
        d_ff=setup.d_ff,
        heads=setup.heads,
        encoder_layers=setup.layers,
        decoder_layers=setup.layers,
        context=context,  # type: ignore[arg-type]
    )
    mesh = training.make_mesh(training.MeshConfig(**sizes))
    optimizer = training.make_optimizer(
        training.OptimizerConfig(peak_lr=1e-3, warmup_steps=0, schedule="constant"), 1
    )
    make_params = functools.partial(init_params, config, seed=0)
    update = training.make_train_step(make_loss(config, 0.1), optimizer, mesh=mesh)
    state = training.create_state(make_params, optimizer, seed=0, mesh=mesh)
    shape = (setup.rows, setup.length)
    tokens = np.random.default_rng(0).integers(4, setup.vocabulary, (2, *shape))
    batch = training.place_batch(
        {name: x.astype(np.int32) for name, x in zip(("source", "target"), tokens)},
        mesh,
    )
    places = {
        name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=x.sharding)
        for name, x in batch.items()
    }
    plan = plan_step(
        update,
        training.abstract_state(make_params, optimizer, mesh=mesh),
        places,
        tokens=setup.rows * setup.length,
        flops=seq2seq.train_flops(
            config, rows=setup.rows, source=setup.length, target=setup.length
        ),
        dtype=config.dtype,
    )

    def step() -> None:
        nonlocal state
        state, metrics = update(state, batch)
        jax.block_until_ready((state, metrics))

    step()
    return plan, step


def seconds_of(step: Callable) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def main(
    setup: Setup, *, rounds: int = 9, context: str = "auto", only: tuple[str, ...] = ()
) -> None:
    """Step times on meshes of simulated devices, beside one device's.

    Args:
        setup: model and batch.
        rounds: turns of each mesh.
        context: how the axis "context" shares lengths out.
        only: names of meshes; none: all.
    """
    flag = f"--xla_force_host_platform_device_count={MOST}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    from qkv_jax.training.plan import this_machine

    plan, one = planned(setup, {"data": 1}, context)
    steps = {
        name: planned(setup, sizes, context)[1]
        for name, sizes in meshes().items()
        if not only or name in only
    }
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    machine = []
    for _ in range(rounds):
        machine.append(this_machine())
        for name, step in steps.items():
            pairs[name].append((seconds_of(one), seconds_of(step)))
    alone = [pair[0] for turns in pairs.values() for pair in turns]
    best = replace(machine[0], f32=max(x.f32 for x in machine))
    estimate = plan.estimate(best)
    print(
        f"one device: {np.median(alone) * 1e3:.0f} ms a step (median), {min(alone) * 1e3:.0f} "
        f"(best); plan: at least {estimate.compute * 1e3:.0f} ms for {plan.flops:.3g} FLOP at "
        f"{best.f32 / 1e9:.0f} GFLOP/s, {estimate.compute / np.median(alone):.0%} of the median"
    )
    print(f"{'mesh':28} {'ms':>6} {'of one device':>14} {'turns':>14}")
    for name, turns in pairs.items():
        ratios = [step / other for other, step in turns]
        print(
            f"{name:28} {np.median([step for _, step in turns]) * 1e3:6.0f} "
            f"{np.median(ratios):13.2f}x {min(ratios):6.2f} to {max(ratios):.2f}"
        )


if __name__ == "__main__":
    tyro.cli(main)
