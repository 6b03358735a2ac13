"""One configuration trained from several seeds: the mean of what it gives, and how far it varies."""

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from qkv_jax.training.distributed import on_first
from qkv_jax.training.runs import RESULT_FILE, check_config, finish_run, is_finished
from qkv_jax.training.task import Trainable, in_directory, train_task


def train_seeds(config: Trainable, *, console: Console | None = None) -> dict[str, Any]:
    """Trains a run for each of `run.seeds` seeds, training.seed and those after it.

    Each lies in run.directory/seed-<seed>. One that is finished is not trained again, and one that
    was begun is gone on with; so more seeds can be added to those that are there.

    Args:
        config: of the runs; `run.directory` is set.
        console: for progress; None: standard error.

    Returns:
        What run.directory/result.json then holds: "seeds", and of each number of the runs' results
        its "mean" and "deviation" (of a sample: n - 1).

    Raises:
        ValueError, RunError, Interrupted: see train_task.
    """
    directory = Path(config.run.directory or "")
    console = console or Console(stderr=True)
    first = config.training.seed
    seeds = range(first, first + config.run.seeds)
    results = [_one(config, seed, directory, console) for seed in seeds]
    summary = {"seeds": list(seeds)} | _spread(results)
    on_first(lambda: finish_run(directory, summary))
    return summary


def _one(config: Any, seed: int, directory: Path, console: Console) -> dict[str, Any]:
    config = in_directory(config, directory / f"seed-{seed}")
    config = dataclasses.replace(
        config, training=dataclasses.replace(config.training, seed=seed)
    )
    place = config.run.directory
    if is_finished(place):
        check_config(place, config.to_json())
        return json.loads((place / RESULT_FILE).read_text("utf-8"))
    console.print(f"seed {seed}", highlight=False)
    return train_task(config, console=console)


def _spread(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The results' mean and deviation, for each number that all of them have."""
    found: dict[str, Any] = {}
    for name in results[0]:
        values = [result.get(name) for result in results]
        if all(isinstance(value, Mapping) for value in values):
            found[name] = _spread(values)  # type: ignore[arg-type]
        elif all(type(value) in (int, float) for value in values):
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0  # type: ignore[type-var]
            found[name] = {"mean": statistics.fmean(values), "deviation": deviation}  # type: ignore[arg-type]
    return found
