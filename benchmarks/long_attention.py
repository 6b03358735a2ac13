"""How do time and memory of each kind of attention grow with length?

    python -m benchmarks.long_attention --output experiments/efficiency

A layer of self-attention, forward and backward, one sequence, D = 64 and one head, at each length; kinds
take turns in one process. Exponents are the slopes of log-log lines through the lengths from 2,048 on:
1 is linear, 2 quadratic. Memory is what the compiled program sets aside beside its inputs and
outputs. Causal, except for Linformer, which cannot be. `--output` writes long_attention.json and .png.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from qkv_jax.layers import AttentionKind, MultiHeadAttention
from qkv_jax.ops import masks

D = 64
FROM = 2048


def kinds(longest: int) -> dict[str, AttentionKind]:
    """What is compared; the first is what the others are compared with."""
    return {
        "softmax": AttentionKind(),
        "window 128": AttentionKind(name="window", window=128),
        "blocks of 128": AttentionKind(name="block_sparse", block=128, longest=longest),
        "span 128": AttentionKind(name="adaptive_span", longest=256, ramp=32.0),
        "linear": AttentionKind(name="linear"),
        "performer 64": AttentionKind(name="performer", features=64),
        "linformer 64": AttentionKind(name="linformer", rank=64, longest=longest),
        "entmax": AttentionKind(name="entmax"),
    }


def program(kind: AttentionKind, length: int) -> tuple[Any, tuple]:
    """Loss and gradients of a layer, compiled, and what to call it with."""
    layer = MultiHeadAttention(D, 1, kind=kind, rngs=nnx.Rngs(0))
    definition, params = nnx.split(layer)
    x = np.random.default_rng(0).normal(size=(1, length, D)).astype(np.float32)
    mask = None if kind.name == "linformer" else masks.causal()

    def step(params: Any, x: Any) -> Any:
        def loss(params: Any, x: Any) -> jax.Array:
            return jnp.square(nnx.merge(definition, params)(x, mask=mask)).sum()

        return jax.grad(loss, argnums=(0, 1))(params, x)

    return jax.jit(step).lower(params, x).compile(), (params, x)


def measure(
    lengths: tuple[int, ...], rounds: int, budget: float, memory: float
) -> dict[str, Any]:
    """Median seconds and MiB of each kind at each length.

    A kind whose next length may take more than `budget` seconds or `memory` MiB a call is not run there.
    """
    found: dict[str, Any] = {name: {} for name in kinds(max(lengths))}
    for length in lengths:
        programs = {}
        for name, kind in kinds(max(lengths)).items():
            last = list(found[name].values())[-1:]
            if last and (
                last[0]["seconds"] * 4 > budget or last[0]["MiB"] * 4 > memory
            ):
                continue
            programs[name] = program(kind, length)
        times: dict[str, list[float]] = {name: [] for name in programs}
        for turn in range(rounds + 1):  # The first is not counted.
            for name, (run, given) in programs.items():
                start = time.perf_counter()
                jax.block_until_ready(run(*given))
                if turn:
                    times[name].append(time.perf_counter() - start)
        for name, (run, _) in programs.items():
            memory = run.memory_analysis().temp_size_in_bytes / 2**20
            seconds = float(np.median(times[name]))
            found[name][length] = {"seconds": seconds, "MiB": memory}
            print(
                f"{length:>7,} {name:<16} {seconds * 1e3:10.2f} ms {memory:10.2f} MiB",
                flush=True,
            )
    return found


def exponents(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Slopes of log time and log memory against log length, from `FROM` on."""
    slopes: dict[str, dict[str, float]] = {}
    for name, rows in found.items():
        lengths = [length for length in rows if length >= FROM]
        if len(lengths) < 2:
            continue
        slopes[name] = {
            what: float(
                np.polyfit(
                    np.log(lengths), np.log([rows[x][what] for x in lengths]), 1
                )[0]
            )
            for what in ("seconds", "MiB")
        }
    return slopes


def draw(found: dict[str, Any], slopes: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    for axes, what, title in zip(
        figure.subplots(1, 2), ("seconds", "MiB"), ("time, s", "memory, MiB")
    ):
        for name, rows in found.items():
            slope = slopes.get(name, {}).get(what)
            label = name if slope is None else f"{name}: {slope:.2f}"
            axes.loglog(
                list(rows), [row[what] for row in rows.values()], "o-", label=label
            )
        axes.set(xlabel="length, tokens", title=f"{title}, forward and backward")
        axes.legend(fontsize=8, title=f"exponent from {FROM:,} on", title_fontsize=8)
        axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=150)


def main(
    *,
    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768),
    rounds: int = 5,
    budget: float = 60.0,
    memory: float = 8192.0,
    output: Path | None = None,
) -> None:
    """Kinds of attention against length.

    Args:
        lengths: tokens of the sequence.
        rounds: turns of each kind.
        budget: seconds that a call may take.
        memory: MiB that it may set aside.
        output: directory for the numbers and the picture.
    """
    print(f"jax {jax.__version__}, {len(os.sched_getaffinity(0))} cores, D = {D}")
    found = measure(lengths, rounds, budget, memory)
    slopes = exponents(found)
    for name, slope in slopes.items():
        print(
            f"{name:<16} time ~ length ** {slope['seconds']:.2f}, memory ~ length ** {slope['MiB']:.2f}"
        )
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        content = {"lengths": found, "exponents": slopes}
        (output / "long_attention.json").write_text(json.dumps(content, indent=1))
        draw(found, slopes, output / "long_attention.png")


if __name__ == "__main__":
    tyro.cli(main)
