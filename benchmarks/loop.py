"""What does the loop cost besides the steps: checkpoints, skipped updates, host memory?

    python -m benchmarks.loop

Checkpoints: the demo's model trains in turns of as many steps, without a checkpoint and with one
in their midst; what the one takes longer, of a minute, is what a checkpoint a minute costs. Host
memory: a small model trains 2,000 steps with all that a run does (metrics, checkpoints, batches
from a file), and the process's resident memory is read on the way. Skipping: the select of all
state that keeps an update that is not finite from it, as a program of its own; in the step XLA can
fuse it, so this is a ceiling.
"""

import dataclasses
import io
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

from benchmarks.kill_resume import write_corpus
from qkv_jax import training
from qkv_jax.data import ParallelData
from qkv_jax.models import seq2seq
from qkv_jax.training import in_directory, train_task
from qkv_jax.translation import TextConfig, TranslationConfig, demo
from qkv_jax.translation.loss import make_loss
from qkv_jax.translation.models import init_params


def resident() -> float:
    """MB of memory that this process has."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1e3
    raise SystemExit("memory: /proc/self/status has no VmRSS; run it on Linux.")


def of_the_demo() -> tuple[Any, Any, Any]:
    """The demo's compiled step, its first state, and a batch of random tokens."""
    config = dataclasses.replace(demo.CONFIG.model, vocabulary=8000)
    mesh = training.make_mesh(training.MeshConfig(data=1), devices=jax.devices()[:1])
    optimizer = training.make_optimizer(demo.CONFIG.optimizer, 1600)
    update = training.make_train_step(make_loss(config, 0.1), optimizer, mesh=mesh)
    params = init_params(config, seed=0)
    state = training.create_state(params, optimizer, seed=0, mesh=mesh)
    tokens = np.random.default_rng(0).integers(4, 8000, (2, 16, 96)).astype(np.int32)
    batch = dict(zip(("source", "target"), tokens))
    return update, state, training.place_batch(batch, mesh)


def checkpoints(rounds: int, steps: int) -> None:
    """Prints what a checkpoint adds to a turn of steps."""
    update, state, batch = of_the_demo()
    state, _ = update(state, batch)
    extra, step = [], 1
    with (
        tempfile.TemporaryDirectory() as directory,
        training.CheckpointStore(directory, keep=2) as store,
    ):
        plain: list[float] = []
        for saving in [False, True] * rounds:
            start = time.perf_counter()
            for i in range(steps):
                state, metrics = update(state, batch)
                jax.block_until_ready(metrics)
                step += 1
                if saving and i == 1:
                    store.save(step, state, {"step": step})
            if saving:
                extra.append(time.perf_counter() - start - plain[-1])
            else:
                plain.append(time.perf_counter() - start)
            store.wait()
    size = sum(x.nbytes for x in jax.tree.leaves(state)) / 1e6
    cost = float(np.median(extra))
    print(
        f"checkpoint: {size:.0f} MB; {np.median(plain) / steps * 1e3:.0f} ms a step; one in {steps} "
        f"steps takes {cost * 1e3:.0f} ms (turns {min(extra) * 1e3:.0f} to {max(extra) * 1e3:.0f}): "
        f"{cost / 60:.2%} of the time at one a minute"
    )


def skipping(rounds: int) -> None:
    """Prints what the select of all state takes, beside a step."""
    update, state, batch = of_the_demo()

    @jax.jit
    def select(keep, new, old):
        return jax.tree.map(lambda x, y: jnp.where(keep, x, y), new, old)

    kept = (state.params, state.opt_state)
    other = jax.tree.map(lambda x: x + x, kept)
    keep = jnp.asarray(True)
    state = jax.tree.map(jnp.copy, state)
    pairs = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(update(state, batch))
        between = time.perf_counter()
        jax.block_until_ready(select(keep, other, kept))
        pairs.append((between - start, time.perf_counter() - between))
    step, alone = np.median(pairs[1:], axis=0)
    print(
        f"skipping: a select of all state takes {alone * 1e3:.1f} ms by itself, "
        f"{alone / step:.1%} of a step of {step * 1e3:.0f} ms"
    )


def memory(steps: int) -> None:
    """Prints the resident memory along a run of so many steps."""
    with tempfile.TemporaryDirectory() as root:
        write_corpus(Path(root))
        config = TranslationConfig(
            data=ParallelData(directory=Path(root), source="a", target="b"),
            text=TextConfig(
                vocabulary=300, batch_tokens=512, max_source=48, max_target=48
            ),
            model=seq2seq.Config(
                d_model=32, d_ff=64, heads=2, encoder_layers=1, decoder_layers=1
            ),
            optimizer=training.OptimizerConfig(peak_lr=1e-3),
            training=training.TrainingConfig(
                steps=steps,
                evaluate_every=steps // 10,
                checkpoint_every=steps // 20,
                log_every=10,
            ),
        )
        config = in_directory(config, Path(root) / "run")
        found: list[tuple[int, float]] = []
        push = training.metrics.TrainLog.push

        def watched(log, step, metrics, *, compiled):
            push(log, step, metrics, compiled=compiled)
            if step % (steps // 10) == 0:
                found.append((step, resident()))

        training.metrics.TrainLog.push = watched  # type: ignore[method-assign]
        train_task(config, console=Console(file=io.StringIO()))
    print("memory, MB: " + ", ".join(f"step {s}: {mb:.0f}" for s, mb in found))
    middle, last = found[len(found) // 2 - 1][1], found[-1][1]
    print(
        f"from step {found[len(found) // 2 - 1][0]} to {steps}: {last - middle:+.1f} MB"
    )


def main(
    *,
    only: Literal["all", "checkpoints", "skipping", "memory"] = "all",
    rounds: int = 9,
    turn: int = 20,
    steps: int = 2000,
) -> None:
    """The loop's cost besides its steps.

    Args:
        only: one of the three questions.
        rounds: turns with and without a checkpoint.
        turn: steps of a turn.
        steps: of the run whose memory is watched.
    """
    if only in ("all", "checkpoints"):
        checkpoints(rounds, turn)
    if only in ("all", "skipping"):
        skipping(rounds)
    if only in ("all", "memory"):
        memory(steps)


if __name__ == "__main__":
    tyro.cli(main)
