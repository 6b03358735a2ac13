"""What do local and axial attention save on an image of 512 x 512 pixels?

    python -m benchmarks.long_images

Two questions, each for patches of 16 and of 8 pixels (1,024 and 4,096 of them): one attention
layer, forward and backward; and a step of the model of experiments/long_images/sheets.py, loss and
gradients. Full attention is measured twice: "dense" makes the whole matrix of pairs, as attention is
mostly written (`jax.nn.dot_product_attention`), "full" is this package's, which never does. All sides
run in one process and take turns; a ratio is the median of the turns' own ratios. Memory is that of
the program's temporaries, as XLA's compiler states it. What would need more than `--most` of it is
compiled, and not run.
"""

import dataclasses
import os
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from qkv_jax.models import vit
from qkv_jax.ops import attention as choice
from qkv_jax.ops import dot_product_attention, patterns

PIXELS, HEADS, SIZE = 512, 4, 16
SIDES: dict[str, tuple[vit.Attention, ...]] = {
    "dense": ("full",),
    "full": ("full",),
    "local": ("local",),
    "axial": ("rows", "columns"),
    "local + axial": ("local", "rows", "local", "columns"),
}


@dataclasses.dataclass(frozen=True)
class Side:
    """Attributes:
    run: computes once, and waits for it; None: it would need too much memory.
    memory: MiB of temporaries.
    """

    run: Callable[[], object] | None
    memory: float


def compiled(function: Callable, *arrays: Any, most: float) -> Side:
    program = jax.jit(function).lower(*arrays).compile()
    analysis: Any = program.memory_analysis()
    memory = analysis.temp_size_in_bytes / 2**20
    if memory > most:
        return Side(None, memory)
    jax.block_until_ready(program(*arrays))
    return Side(lambda: jax.block_until_ready(program(*arrays)), memory)


def layers(patch: int, radius: int, most: float) -> dict[str, Side]:
    """One attention layer, (1, T, N, H) float32, forward and backward, by its pattern."""
    side = PIXELS // patch
    rng = np.random.default_rng(0)
    shape = (1, side * side, HEADS, SIZE)
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(4)]

    def both(attend: Callable) -> Side:
        def run(query, key, value, d_out):
            out, back = jax.vjp(attend, query, key, value)
            return out, back(d_out)

        return compiled(run, *arrays, most=most)

    def masked(mask) -> Side:
        return both(lambda *x: dot_product_attention(*x, mask=mask))

    return {
        "dense": both(jax.nn.dot_product_attention),
        "full": masked(None),
        "local": masked(patterns.local_2d(side, side, radius)),
        # Columns are rows of the turned image, see qkv_jax/models/vit.py.
        "axial": masked(patterns.axial(side, side, 1)),
    }


def steps(patch: int, radius: int, most: float) -> dict[str, Side]:
    """The model's loss and gradients for one sheet, by who attends to whom."""
    cells = 16
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.integers(0, 256, (cells**2, 28, 28, 1)), jnp.uint8),
        "label": jnp.asarray(rng.integers(0, 10, cells**2), jnp.int32),
        "weight": jnp.ones(cells**2, jnp.float32),
    }

    def step(name: str) -> Side:
        config = vit.Config(
            height=28,
            width=28,
            channels=1,
            classes=10,
            sheet=cells,
            cell=PIXELS // cells,
            patch=patch,
            d_model=HEADS * SIZE,
            d_ff=2 * HEADS * SIZE,
            heads=HEADS,
            layers=4,
            attention=SIDES[name],
            radius=radius,
        )
        graph, params = nnx.split(vit.Model(config, rngs=nnx.Rngs(0)), nnx.Param)

        def loss(params, batch):
            return nnx.merge(graph, params).loss(batch, rng=None)[0]

        # Nothing asks a model for the dense form: here, no sequence is too long for it.
        pairs = PIXELS**4 if name == "dense" else choice.DENSE_PAIRS
        with mock.patch.object(choice, "DENSE_PAIRS", pairs):
            return compiled(jax.value_and_grad(loss), params, batch, most=most)

    return {name: step(name) for name in SIDES}


def compare(title: str, sides: dict[str, Side], rounds: int) -> None:
    """Prints memory and time of each side, and how "full" compares with it."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            if side.run is not None:
                start = time.perf_counter()
                side.run()
                seconds[name].append(time.perf_counter() - start)
    print(f"\n{title}")
    for name, side in sides.items():
        line = f"  {name:<14} {side.memory:9.1f} MiB"
        line += f" (full / this {sides['full'].memory / side.memory:5.2f})"
        if side.run is None:
            print(f"{line}   not run: too large", flush=True)
            continue
        line += f"   median {np.median(seconds[name]) * 1e3:9.1f} ms"
        if sides["full"].run is not None:
            turns = np.array(seconds["full"]) / seconds[name]
            line += f" (full / this {np.median(turns):5.2f}, turns {turns.min():.2f} to {turns.max():.2f})"
        print(line, flush=True)


def main(
    *,
    patches: tuple[int, ...] = (16, 8),
    radius: int = 3,
    rounds: int = 5,
    most: float = 4096.0,
) -> None:
    """Local and axial attention against full attention, at 512 x 512 pixels.

    Args:
        patches: pixels a side of a patch.
        radius: rows and columns of patches that local attention sees on each side.
        rounds: turns of each side.
        most: MiB that a program may need to be run.
    """
    cores = len(os.sched_getaffinity(0))
    print(
        f"jax {jax.__version__}, {cores} cores, load average {os.getloadavg()[0]:.1f}"
    )
    for patch in patches:
        side = PIXELS // patch
        size = f"{side} x {side} patches of {patch} x {patch}"
        compare(f"one layer, {size}", layers(patch, radius, most), rounds)
        compare(f"a step of the model, {size}", steps(patch, radius, most), rounds)


if __name__ == "__main__":
    tyro.cli(main)
