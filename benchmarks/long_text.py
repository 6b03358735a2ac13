"""What does a window of attention save on long text, and how far do its costs grow with length?

    python -m benchmarks.long_text

A train step (loss and gradients) of the classifier of movie reviews, its words seeing a window and
a class token, against the same model whose words see all; texts are full, so that skipped padding
helps neither. Below them, attention alone, forward and backward, with the whole matrix too. Sides
take turns in one process; memory is what the compiled program sets aside beside its inputs and
outputs.
"""

import dataclasses
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from qkv_jax.models import text_classifier
from qkv_jax.ops import dot_product_attention

ROWS = 4
VOCABULARY = 8000


def model_step(config: text_classifier.Config, length: int) -> tuple[Callable, tuple]:
    """Loss and gradients of a batch of full texts, and what to call it with."""
    definition, params = nnx.split(text_classifier.Model(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    batch = {
        "tokens": rng.integers(4, VOCABULARY, (ROWS, length, 1), np.int32),
        "labels": np.arange(ROWS, dtype=np.int32) % 2,
        "weight": np.ones(ROWS, np.float32),
    }

    def step(params: Any, batch: Any, rng: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            return nnx.merge(definition, params).loss(batch, rng=rng)[0]

        return jax.value_and_grad(loss)(params)

    return step, (params, batch, jax.random.key(0))


def attention(
    config: text_classifier.Config, length: int, implementation: Any
) -> tuple[Callable, tuple]:
    """Attention alone, forward and backward, of the model's heads."""
    shape = (ROWS, length, config.heads, config.d_model // config.heads)
    rng = np.random.default_rng(0)
    arrays = tuple(rng.normal(size=shape).astype(np.float32) for _ in range(4))
    there = jnp.ones((ROWS, length), bool)

    def run(query: Any, key: Any, value: Any, d_out: Any) -> Any:
        mask = text_classifier.who_sees_whom(there, config.window)

        def attend(*x: Any) -> jax.Array:
            return dot_product_attention(*x, mask=mask, implementation=implementation)

        out, back = jax.vjp(attend, query, key, value)
        return out, back(d_out)

    return run, arrays


def compare(title: str, sides: dict[str, tuple[Callable, tuple]], rounds: int) -> None:
    """Prints each side's median time and its memory, and how they compare with the first's."""
    programs: dict[str, Any] = {}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for name, (run, given) in sides.items():
        programs[name] = jax.jit(run).lower(*given).compile()
        jax.block_until_ready(programs[name](*given))
    for _ in range(rounds):
        for name, (_, given) in sides.items():
            start = time.perf_counter()
            jax.block_until_ready(programs[name](*given))
            times[name].append(time.perf_counter() - start)
    print(f"\n{title}")
    first = next(iter(sides))
    for name, program in programs.items():
        memory = program.memory_analysis().temp_size_in_bytes
        ratio = np.median(np.divide(times[name], times[first]))
        print(
            f"  {name:<34} {np.median(times[name]) * 1e3:8.1f} ms {ratio:6.2f}x "
            f"{memory / 2**20:9.1f} MiB",
            flush=True,
        )


def main(
    *, lengths: tuple[int, ...] = (512, 1024, 2048, 4096), rounds: int = 7
) -> None:
    """Windowed against full attention.

    Args:
        lengths: words of a text.
        rounds: turns of each side.
    """
    print(f"jax {jax.__version__}, {len(os.sched_getaffinity(0))} cores, {ROWS} texts")
    local = text_classifier.long(classes=2, vocabulary=VOCABULARY)
    full = dataclasses.replace(local, window=None)
    names = {f"window {local.window} + class token": local, "full": full}
    for length in lengths:
        steps = {name: model_step(config, length) for name, config in names.items()}
        compare(f"a step of the model, {length:,} words", steps, rounds)
        sides = {
            name: attention(config, length, "blockwise")
            for name, config in names.items()
        }
        if length <= 2048:
            sides["full, the whole matrix"] = attention(full, length, "reference")
        compare(f"attention alone, {length:,} words", sides, rounds)


if __name__ == "__main__":
    tyro.cli(main)
