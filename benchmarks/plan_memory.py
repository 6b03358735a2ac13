"""Does a device hold what `qkv-jax plan` says it will?

    python -m benchmarks.plan_memory

For each mesh of eight simulated devices, in a process of its own: what the plan says one device
holds of parameters and optimizer, beside the bytes of the shards that it is really given; and the
plan's peak beside two others: XLA's own account of the compiled step (arguments, results that are not
written over them, and temporaries), and what the process's resident memory rises by from before the
state is made to the end of the second step, an eighth of it. Gradients are temporaries of the step:
the plan counts them as lying where the parameters do, and the rest of the temporaries as activations.
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import tyro

DEVICES = 8
MESHES: dict[str, dict[str, int]] = {
    "data 8": {"data": 8},
    "fsdp 8": {"data": 1, "fsdp": 8},
    "tensor 8": {"data": 1, "tensor": 8},
    "context 8": {"data": 1, "context": 8},
    "data 2, fsdp 2, tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp 2, context 2, tensor 2": {"data": 1, "fsdp": 2, "context": 2, "tensor": 2},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """The model and the batch, the same on every mesh."""

    d_model: int = 512
    d_ff: int = 2048
    heads: int = 8
    layers: int = 2
    """In the encoder, and again in the decoder."""
    vocabulary: int = 16_000
    rows: int = 64
    length: int = 128
    """Tokens of each source and of each target."""


def measured(setup: Setup, sizes: dict[str, int]) -> dict[str, float]:
    """Bytes a device by the plan ("plan ...") and found ("held ...", "compiled", "resident")."""
    import jax
    import numpy as np

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
    )
    mesh = training.make_mesh(training.MeshConfig(**sizes))
    optimizer = training.make_optimizer(
        training.OptimizerConfig(peak_lr=1e-3, warmup_steps=0, schedule="constant"), 1
    )
    loss = make_loss(config, 0.1)
    make_params = functools.partial(init_params, config, seed=0)
    step: Any = training.make_train_step(loss, optimizer, mesh=mesh)
    shape = (setup.rows, setup.length)
    tokens = np.random.default_rng(0).integers(4, setup.vocabulary, (2, *shape))
    rows = {name: x.astype(np.int32) for name, x in zip(("source", "target"), tokens)}
    batch = training.place_batch(rows, mesh)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), batch
    )
    like = training.abstract_state(make_params, optimizer, mesh=mesh)
    plan = plan_step(step, like, shapes, tokens=0, flops=0.0, dtype=config.dtype)
    compiled = step.lower(like, shapes).compile()
    memory = compiled.memory_analysis()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # The high-water mark starts anew.
    state = training.create_state(make_params, optimizer, seed=0, mesh=mesh)
    found = {
        "held parameters": held(state.params),
        "held optimizer": held(state.opt_state),
    }
    for _ in range(2):
        state, metrics = compiled(state, batch)
        jax.block_until_ready((state, metrics))
    found["resident"] = (resident("VmHWM") - before) / DEVICES
    found["compiled"] = float(
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    return found | {f"plan {k}": v for k, v in plan.held.items()} | {"plan": plan.bytes}


def held(tree: Any) -> float:
    """Bytes of the shards on the device that has most of them."""
    import collections

    import jax

    bytes_of: dict[int, int] = collections.Counter()
    for array in jax.tree.leaves(tree):
        for shard in array.addressable_shards:
            bytes_of[shard.device.id] += shard.data.nbytes
    return float(max(bytes_of.values()))


def resident(name: str) -> float:
    """Bytes of this process in physical memory: now ("VmRSS"), or at most so far ("VmHWM")."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024.0 * next(int(x.split()[1]) for x in lines if x.startswith(name + ":"))


def main(setup: Setup, *, only: tuple[str, ...] = (), child: str | None = None) -> None:
    """Prints a row for each mesh: MB a device by the plan, and found.

    Args:
        setup: model and batch.
        only: names of meshes; none: all.
        child: the mesh that this process measures; None: it starts one for each.
    """
    if child is not None:
        print(json.dumps(measured(setup, MESHES[child])))
        return
    flag = f"--xla_force_host_platform_device_count={DEVICES}"
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}",
        "JAX_PLATFORMS": "cpu",
    }
    names = ("mesh", "parameters", "optimizer", "peak: plan")
    print(f"| {' | '.join((*names, 'compiled', 'resident'))} |\n{'|---' * 6}|")
    for name in only or MESHES:
        command = [sys.executable, "-m", "benchmarks.plan_memory", *sys.argv[1:]]
        done = subprocess.run(
            [*command, "--child", name],
            env=environment,
            stdout=subprocess.PIPE,
            check=True,
        )
        found = {k: v / 1e6 for k, v in json.loads(done.stdout).items()}
        pairs = [
            f"{found[f'plan {part}']:.1f} / {found[f'held {part}']:.1f}"
            for part in ("parameters", "optimizer")
        ]
        peaks = [f"{found[peak]:.0f}" for peak in ("plan", "compiled", "resident")]
        print(f"| {' | '.join((name, *pairs, *peaks))} |", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
