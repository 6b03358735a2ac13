"""How fast, how large and how quick to compile is attention, against its peers?

    python -m benchmarks.attention
    python -m benchmarks.attention --sweep-blocks

Needs the extra `peers` (`make test-peers` sets up `.venv-peers` with it). All sides run in one
process and take turns, one call at a time, on the same float32 arrays; a ratio is the median of
the turns' own ratios, so that a machine whose speed drifts blurs it less. torch's worker threads
spin for a while after a call: each of its turns ends in a short sleep.

`--sweep-blocks` asks another question: how close are the block sizes that the cost model chooses to the
best of those it chooses from?
"""

import itertools
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from qkv_jax.ops import blockwise, dot_product_attention, masks

Shape = tuple[int, int, int, int]
Call = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Attributes:
    name: what is attended to.
    shape: (B, T, N, H), for query, key and value.
    backward: whether the gradients are taken, too.
    left: keys a query sees before itself; None: all. Only "causal" and "window" have any.
    aims: times that ours must be faster than each peer; "dense" is the better of the two ways
        that make the whole matrix.
    """

    name: str
    shape: Shape
    backward: bool
    aims: dict[str, float]
    left: int | None = None

    @property
    def mask(self) -> masks.Mask | None:
        if self.name == "short":
            return None
        return masks.causal() if self.left is None else masks.window(self.left, 0)


CASES = [
    *(
        Case(
            name="causal", shape=shape, backward=True, aims={"jax.nn": 4, "tokamax": 3}
        )
        for shape in ((1, 2048, 4, 64), (1, 4096, 8, 64))
    ),
    Case(
        name="window",
        shape=(1, 2048, 4, 64),
        backward=True,
        left=127,
        aims={"jax.nn": 8, "tokamax": 8},
    ),
    *(
        Case(name="causal", shape=shape, backward=backward, aims={"torch": 1 / limit})
        for shape in ((8, 512, 8, 64), (1, 2048, 8, 64))
        for backward, limit in ((False, 1.2), (True, 1.4))
    ),
    *(
        Case(name="short", shape=shape, backward=backward, aims={"jax.nn": 1 / 1.05})
        for shape in ((32, 64, 8, 64), (64, 32, 4, 64))
        for backward in (False, True)
    ),
]


def arrays(shape: Shape) -> list[np.ndarray]:
    """query, key, value and the output's cotangent."""
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(np.float32) for _ in range(4)]


def compiled(attend: Callable, case: Case) -> Call:
    """A call of a JAX side, compiled and warmed up."""
    *inputs, d_out = map(jnp.asarray, arrays(case.shape))
    run = jax.jit(_with_gradients(attend) if case.backward else attend)
    given = (*inputs, d_out) if case.backward else inputs
    jax.block_until_ready(run(*given))
    return lambda: jax.block_until_ready(run(*given))


def _with_gradients(attend: Callable) -> Callable:
    def run(query, key, value, d_out):
        out, back = jax.vjp(attend, query, key, value)
        return out, back(d_out)

    return run


def ours(case: Case) -> Call:
    return compiled(lambda *x: dot_product_attention(*x, mask=case.mask), case)


def jax_nn(case: Case) -> Call:
    def attend(query, key, value):
        window = None if case.left is None else (case.left, 0)
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            is_causal=case.mask is not None and window is None,
            local_window_size=window,
        )

    return compiled(attend, case)


def tokamax(implementation: str) -> Callable[[Case], Call]:
    def side(case: Case) -> Call:
        from tokamax import dot_product_attention as attend

        options = {"is_causal": case.mask is not None, "implementation": implementation}
        if case.left is not None:
            options["local_window_size"] = (case.left, 0)
        return compiled(lambda *x: attend(*x, **options), case)

    return side


def torch(case: Case) -> Call:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    *inputs, d_out = (
        torch.from_numpy(x).transpose(1, 2).contiguous() for x in arrays(case.shape)
    )
    options = {"is_causal": case.mask is not None}
    if case.left is not None:
        ahead = torch.arange(case.shape[1])[:, None] - torch.arange(case.shape[1])
        options = {"attn_mask": (ahead >= 0) & (ahead <= case.left)}

    def run():
        if not case.backward:
            with torch.no_grad():
                return scaled_dot_product_attention(*inputs, **options)
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = scaled_dot_product_attention(*leaves, **options)
        return torch.autograd.grad(out, leaves, d_out)

    return run


SIDES: dict[str, Callable[[Case], Call]] = {
    "ours": ours,
    "jax.nn": jax_nn,
    "tokamax xla": tokamax("xla"),
    "tokamax xla_chunked": tokamax("xla_chunked"),
    "torch": torch,
}


def alternate(calls: dict[str, Call], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each call, one a round; the calls take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _, (name, call) in itertools.product(range(rounds), calls.items()):
        start = time.perf_counter()
        call()
        seconds[name].append(time.perf_counter() - start)
        if name == "torch":
            time.sleep(0.05)
    return {name: np.array(times) for name, times in seconds.items()}


def compare(case: Case, rounds: int) -> None:
    """Prints one case's times, and the ratios that it has aims for."""
    names = [name for name in SIDES if name == "ours" or name.split()[0] in case.aims]
    times = alternate({name: SIDES[name](case) for name in names}, rounds)
    passes = "forward + backward" if case.backward else "forward"
    print(f"\n{case.name} {case.shape}, {passes}")
    for name, seconds in times.items():
        print(
            f"  {name:<20} median {np.median(seconds) * 1e3:8.1f} ms"
            f"   best {seconds.min() * 1e3:8.1f} ms"
        )
    for peer, aim in case.aims.items():
        sides = [x for name, x in times.items() if name.split()[0] == peer]
        best = min(sides, key=np.median)
        turns = best / times["ours"]
        ratio = np.median(turns)
        verdict = "met" if ratio >= aim else "missed"
        print(
            f"  {peer} / ours = {ratio:.2f} (turns {turns.min():.2f} to {turns.max():.2f}); "
            f"aim at least {aim:.2f}: {verdict}",
            flush=True,
        )


def measure_memory(side: Callable, shape: Shape) -> float:
    """MiB of temporaries of a causal forward and backward pass, as XLA's compiler states them."""
    array = jax.ShapeDtypeStruct(shape, jnp.float32)
    program = jax.jit(_with_gradients(side)).lower(*4 * (array,)).compile()
    analysis: Any = program.memory_analysis()
    return analysis.temp_size_in_bytes / 2**20


def measure_compilation(shape: Shape) -> float:
    """Seconds to trace and compile a causal forward and backward pass."""
    array = jax.ShapeDtypeStruct(shape, jnp.float32)
    start = time.perf_counter()
    jax.jit(_with_gradients(_causal)).lower(*4 * (array,)).compile()
    return time.perf_counter() - start


def _causal(*inputs):
    return dot_product_attention(*inputs, mask=masks.causal())


def sizes() -> None:
    """Prints memory and compilation, beside their aims."""
    from tokamax import dot_product_attention as theirs

    shape = (1, 8192, 4, 64)
    peers = {
        "ours": _causal,
        "jax.nn": lambda *x: jax.nn.dot_product_attention(*x, is_causal=True),
        "tokamax xla_chunked": lambda *x: theirs(
            *x, is_causal=True, implementation="xla_chunked"
        ),
    }
    print(f"\ntemporary memory, causal {shape}, forward + backward; aim at most 16 MiB")
    for name, side in peers.items():
        print(f"  {name:<20} {measure_memory(side, shape):8.1f} MiB", flush=True)
    shape = (1, 16384, 8, 64)
    print(f"compilation, causal {shape}, forward + backward; aim under 10 s")
    print(f"  {'ours':<20} {measure_compilation(shape):8.1f} s", flush=True)


SWEPT = [
    (mask, shape)
    for mask, shapes in (
        (None, ((1, 1024, 4, 64), (2, 600, 4, 32), (1, 2048, 4, 128))),
        (
            masks.causal(),
            ((8, 512, 8, 64), (1, 1024, 8, 64), (1, 2048, 8, 64), (1, 4096, 4, 64)),
        ),
        (masks.window(127, 0), ((1, 2048, 4, 64), (1, 4096, 4, 64))),
        (masks.window(512, 512), ((1, 2048, 4, 64), (1, 4096, 2, 32))),
        (masks.causal() | masks.prefix(700), ((1, 2048, 4, 64),)),
    )
    for shape in shapes
]


def sweep(rounds: int) -> None:
    """Prints how the chosen block sizes compare with the best, forward and backward."""
    losses = []
    for mask, shape in SWEPT:
        B, T, N, _ = shape
        chosen = blockwise.choose_blocks(mask, (B, N, T, T))

        def attend(*x, size, mask=mask):
            return blockwise.blockwise_attention(
                *x,
                mask=mask,
                score=None,
                scale=x[0].shape[-1] ** -0.5,
                dropout_rate=0.0,
                dropout_rng=None,
                block_size=size,
            )[0]

        case = Case(name="sweep", shape=shape, backward=True, aims={})
        options = {
            tuple(blockwise.even_block(n, limit) for n, limit in zip((T, T), pair))
            for pair in blockwise.LIMITS
        }
        calls = {
            str(size): compiled(lambda *x, size=size: attend(*x, size=size), case)
            for size in sorted(options | {chosen})
        }
        times = {name: np.median(x) for name, x in alternate(calls, rounds).items()}
        best = min(times, key=times.__getitem__)
        losses.append(times[str(chosen)] / times[best])
        print(
            f"{shape} {mask}\n  chosen {chosen} {times[str(chosen)] * 1e3:.1f} ms, best {best} "
            f"{times[best] * 1e3:.1f} ms: {losses[-1]:.2f}; "
            + ", ".join(f"{name} {t * 1e3:.1f}" for name, t in times.items()),
            flush=True,
        )
    mean = math.exp(np.mean(np.log(losses)))
    print(f"chosen / best: largest {max(losses):.2f}, geometric mean {mean:.2f}")


def main(*, rounds: int = 9, only: str = "", sweep_blocks: bool = False) -> None:
    """Attention, ours against jax.nn, tokamax and torch.

    Args:
        rounds: turns of each side.
        only: just the cases whose name and shape contain this text.
        sweep_blocks: measure the choice of block sizes instead.
    """
    del sys.argv[1:]  # tokamax reads the command line, too
    packages = ("jax", "tokamax", "torch")
    print(", ".join(f"{name} {version(name)}" for name in packages))
    print(
        f"{len(os.sched_getaffinity(0))} cores, load average {os.getloadavg()[0]:.1f}"
    )
    if sweep_blocks:
        return sweep(rounds)
    for case in CASES:
        if only in f"{case.name} {case.shape}":
            compare(case, rounds)
    if not only:
        sizes()


if __name__ == "__main__":
    tyro.cli(main)
