"""Lottery tickets: the mask of a sparse run, on the parameters that it had early on."""

from typing import Any

from qkv_jax import training
from qkv_jax.training.sparsity import Masks
from qkv_jax.translation.config import TranslationConfig
from qkv_jax.translation.models import init_params
from qkv_jax.translation.start import (
    Start,
    is_compressed,
    is_run,
    load_start,
    read_run,
    started,
)


def begun(config: TranslationConfig) -> tuple[Start | None, Masks | None]:
    """What a run starts from, see `started`, and of a ticket its mask.

    Raises:
        RunError: `sparsity.rewind` is of no sparse run, or of a step whose checkpoint it has not
            kept; or as `started`.
    """
    start, step = started(config), config.sparsity.rewind
    if step is None or start is None:
        return start, None
    run = str(config.init_from)
    if not is_run(run) or is_compressed(run) or not read_run(run).sparsity.on:
        raise training.RunError(
            f"sparsity.rewind takes the mask of a sparse run, and {run} is none: train it with "
            "--sparsity.final first."
        )
    steps = training.checkpoint_steps(run)
    if step and step not in steps:
        raise training.RunError(
            f"{run} has kept no checkpoint of step {step}, only of {', '.join(map(str, steps))}: "
            "rewind to one of these or to 0, or train it again with such --training.checkpoint-every "
            "and --training.keep that it keeps it."
        )
    masks = training.restore_masks(run, start.params)
    if masks is None:
        raise training.RunError(
            f"the latest checkpoint of {run} has no masks: bring it back from a copy."
        )
    params = load_start(run, checkpoint=step).params if step else _first(run, start)
    return start._replace(params=training.apply_masks(params, masks)), masks


def _first(run: str, start: Start) -> Any:
    """The parameters that a run began with."""
    config = read_run(run)
    before, _ = begun(config)
    if before is not None:
        return before.params
    return init_params(start.model, seed=config.training.seed)
