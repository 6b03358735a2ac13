"""What does each optimizer give in the same number of updates, at its best rate of a few?

    python -m benchmarks.optimizers --directory ../shared/data/multi30k --updates 300

Each trains the experiment's model anew, on the same batches in the same order from the same
parameters, with a tenth of the updates for warm-up and a rate that then falls to 0 in a straight line
(schedule-free: that stays). The loss is that of the validation part; the test part is not read.
Seconds of an update are medians of a run: where they differ, the same time gives more of one.
"""

import dataclasses
import io
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro
from rich.console import Console

from benchmarks.packing import MULTI30K
from qkv_jax import training
from qkv_jax.cli.parsing import load_experiment
from qkv_jax.training import OptimizerConfig
from qkv_jax.translation import TranslationConfig

# Rates a factor of two apart, near the best of 200 updates on Multi30k (docs/convergence.md).
RATES: dict[str, tuple[float, ...]] = {
    "adam": (2e-3, 4e-3, 8e-3),
    "adamw": (2e-3, 4e-3, 8e-3),
    "adafactor": (2e-2, 4e-2, 8e-2),
    "lion": (4e-4, 8e-4, 16e-4),
    "schedule_free": (4e-3, 8e-3, 16e-3),
    "muon": (6e-3, 12e-3, 24e-3),
}


def optimizer_of(name: Any, rate: float, updates: int) -> OptimizerConfig:
    """The optimizer at a rate, with its schedule."""
    decay: dict[str, Any] = {} if name == "adam" else {"weight_decay": 0.01}
    free = name == "schedule_free"
    return OptimizerConfig(
        name=name,
        peak_lr=rate,
        warmup_steps=max(1, updates // 10),
        schedule="constant" if free else "linear",
        clip_norm=1.0,
        **decay,
    )


def trained(config: TranslationConfig, optimizer: OptimizerConfig) -> dict[str, float]:
    """Validation metrics, seconds an update, and bytes of state a parameter."""
    mesh = training.make_mesh(config.mesh)
    task = config.task(mesh)
    seen: dict[str, float] = {}
    steps: list[float] = []

    def note(step: int, state: Any, metrics: Any) -> None:
        jax.block_until_ready(metrics)
        steps.append(time.perf_counter())
        size = sum(x.nbytes for x in jax.tree.leaves((state.opt_state, state.ema)))
        seen["bytes"] = size / sum(x.size for x in jax.tree.leaves(state.params))

    with tempfile.TemporaryDirectory() as directory:
        result = training.train(
            params=task.params,
            loss_fn=task.loss_fn,
            optimizer=optimizer,
            config=config.training,
            iterator=task.iterator,
            directory=directory,
            evaluate=task.evaluate,
            callbacks=[note],
            mesh=mesh,
            console=Console(file=io.StringIO()),
        )
    last = next(row for row in reversed(result.history) if "validation/nll" in row)
    for name in ("nll", "loss", "bleu"):
        if f"validation/{name}" in last:
            seen[name] = last[f"validation/{name}"]
    return seen | {"seconds": float(np.median(np.diff(steps)))}


def main(
    *,
    experiment: Path = MULTI30K,
    directory: Path | None = None,
    updates: int = 300,
    names: Sequence[str] = tuple(RATES),
    rates: Sequence[float] = (),
    sentences: int = 0,
    compute: Literal["float32", "bfloat16"] | None = None,
) -> None:
    """Validation loss after as many updates.

    Args:
        experiment: file whose CONFIG is of translation.
        directory: of its parallel text; None: as it says.
        updates: of each run.
        names: optimizers.
        rates: to try with each; none: those of `RATES`.
        sentences: of the validation part, to be translated for BLEU; 0: none.
        compute: dtype of the products; None: as the experiment says.
    """
    config = load_experiment(experiment)
    if directory is not None:
        data = dataclasses.replace(config.data, directory=directory)
        config = dataclasses.replace(config, data=data)
    if compute is not None:
        precision = dataclasses.replace(config.precision, compute=compute)
        config = dataclasses.replace(config, precision=precision)
    once = {"steps": updates, "evaluate_every": updates, "checkpoint_every": updates}
    settings = dataclasses.replace(
        config.training, **once, metric="loss", mode="min", patience=None, log_every=1
    )
    optimizer = optimizer_of("adam", 1e-3, updates)
    config = dataclasses.replace(
        config,
        training=settings,
        optimizer=optimizer,
        validation_sentences=sentences,
    )
    columns = ["optimizer", "rate", "validation nll", "BLEU", "state, bytes/parameter"]
    print(f"| {' | '.join([*columns, 'update, s'])} |\n{'|---' * 6}|", flush=True)
    for name in names:
        for rate in rates or RATES[name]:
            found = trained(config, optimizer_of(name, rate, updates))
            bleu = f"{found['bleu']:.1f}" if "bleu" in found else ""
            print(
                f"| {name} | {rate:g} | {found['nll']:.4f} | {bleu} | {found['bytes']:.1f} | "
                f"{found['seconds']:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    tyro.cli(main)
