"""Checkpoints of a run: everything it needs to go on, kept by orbax under run/checkpoints/<step>/.

A checkpoint has the items `params`, `ema` and `masks` (where the run has them), `training` (step,
optimizer state, rng, loss scale, what rounding lost) and `progress` (JSON: data position, best
metric, and the like). Arrays are saved under their dotted names, so that none of the pytree classes
is needed to read them, see `array_files`. Parameters that are not trained are the same in all
checkpoints, and are kept once, before the first of them is begun, as
run/checkpoints/constant/params/.
"""

import functools
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import PreservationPolicy

from qkv_jax.training.adapters import FinetuneConfig, merge_params, split_params
from qkv_jax.training.array_files import (
    check_sizes,
    cut_short,
    flatten,
    load_arrays,
    restore_arrays,
    save_arrays,
    tree_handler,
    unflatten,
    without_places,
    write_sizes,
)
from qkv_jax.training.distributed import is_first, on_first
from qkv_jax.training.errors import DamagedCheckpoint, RunError
from qkv_jax.training.sparsity import Masks, masks_like
from qkv_jax.training.state import TrainState

FOLDER = "checkpoints"
CONSTANT = "constant"
PROGRESS = "progress"
Checkpoint = int | Literal["best", "latest", "average"]


class CheckpointStore:
    """Writes and reads the checkpoints of one run, as a context manager.

    Saving is asynchronous: save() returns once the arrays are copied off the devices. A
    checkpoint appears under its step only when it is complete, so that a killed process leaves
    the earlier ones as they were.

    Args:
        directory: of the run; made where absent.
        keep: the number of latest checkpoints that stay; the best one always does.

    Attributes:
        set_aside: new names of damaged checkpoints, and what is wrong with each.
    """

    def __init__(self, directory: str | os.PathLike, *, keep: int):
        self.directory = Path(directory).absolute()
        self._policy = _KeepLatestAndBest(keep)
        self._saving = 0
        self._has_constant = False
        self.set_aside: list[str] = []
        on_commit = ocp.AsyncOptions(
            post_finalization_callback=lambda: self._write_sizes()
        )
        self._manager = ocp.CheckpointManager(
            self.directory / FOLDER,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._policy,
                cleanup_tmp_directories=True,
                async_options=on_commit,
            ),
            handler_registry=_handlers(),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def save(self, step: int, state: TrainState, progress: Mapping[str, Any]) -> None:
        """Starts to save; waits first for the save before.

        Args:
            step: names the checkpoint; there is none of that name.
            state: may be donated as soon as this returns.
            progress: JSON-able. Its "best_step" (or None) names the checkpoint never to delete.
        """
        self.wait()
        self._saving = step
        self._save_constant(state)
        self._policy.best_step = progress.get("best_step")
        items = {
            name: ocp.args.PyTreeSave(item) for name, item in _items(state).items()
        }
        items[PROGRESS] = ocp.args.JsonSave(dict(progress))
        try:
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        except Exception as error:
            raise self._unwritten(error) from error

    def _save_constant(self, state: TrainState) -> None:
        """Anew in each run that has no checkpoint to go on from: who knows whose they are."""
        if self._has_constant or state.constant is None:
            return
        try:
            save_arrays(self.directory / FOLDER / CONSTANT, flatten(state.constant))
        except Exception as error:
            raise self._unwritten(error) from error
        self._has_constant = True

    def _write_sizes(self) -> None:
        if is_first():
            write_sizes(_step_directory(self.directory, self._saving))

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The latest checkpoint, or None where there is none yet.

        One that is damaged is renamed, see `set_aside`, where an earlier one can take its place.

        Args:
            like: a state of the same structure, shapes and shardings; its values are not used.

        Returns:
            (state, progress).

        Raises:
            RunError: it is damaged and the only one, or holds other parameters than `like`.
        """
        steps = checkpoint_steps(self.directory)
        for step, earlier in zip(steps[::-1], [True] * len(steps[1:]) + [False]):
            checkpoint = _step_directory(self.directory, step)
            try:
                return self._restore(checkpoint, like)
            except DamagedCheckpoint as error:
                if not earlier:
                    raise
                self._set_aside(checkpoint, error)
        return None

    def _set_aside(self, checkpoint: Path, error: DamagedCheckpoint) -> None:
        place = checkpoint.with_name(f"damaged-{checkpoint.name}")
        on_first(lambda: os.replace(checkpoint, place))
        self._manager.reload()
        self.set_aside.append(f"{place} ({error})")

    def _restore(
        self, checkpoint: Path, like: TrainState
    ) -> tuple[TrainState, dict[str, Any]]:
        progress = _read_progress(checkpoint)
        self._policy.best_step = progress.get("best_step")
        items = {
            name: restore_arrays(checkpoint, name, item)
            for name, item in _items(like).items()
        }
        _check_dtypes(checkpoint, items, like)
        training = unflatten(_training(like), items["training"])
        parts = {
            name: unflatten(getattr(like, name), items[name])
            for name in ("params", "ema", "masks")
            if name in items
        }
        constant = _restore_constant(checkpoint, like.constant)
        self._has_constant = True
        state = TrainState(constant=constant, **parts, **training)
        return state, progress

    def tell(self, step: int, progress: Mapping[str, Any]) -> None:
        """Replaces the progress of a complete checkpoint; at any moment it is the old or the new."""
        self._policy.best_step = progress.get("best_step")
        on_first(
            lambda: _replace_progress(_step_directory(self.directory, step), progress)
        )

    def wait(self) -> None:
        """Returns when the last checkpoint is complete."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._unwritten(error) from error
        on_first(lambda: None)

    def _unwritten(self, error: Exception) -> RunError:
        what = (str(error).splitlines() or [""])[0][:200]
        return RunError(
            f"checkpoint {self._saving} of {self.directory} cannot be written "
            f"({type(error).__name__}: {what}): make space or mend the disk; the checkpoints "
            "before it are whole, and the same command goes on from them."
        )


def checkpoint_steps(directory: str | os.PathLike) -> list[int]:
    """The steps of a run's complete checkpoints, in order."""
    folder = Path(directory) / FOLDER
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def restore_params(
    directory: str | os.PathLike,
    like: Any,
    *,
    step: int | Literal["best", "latest"] = "best",
    finetune: FinetuneConfig | None = None,
) -> Any:
    """The weights of a run for evaluation: its moving average where it kept one.

    Needs neither the optimizer nor the devices of the training run, nor the weights it began
    from, and changes nothing.

    Args:
        directory: of the run.
        like: pytree of arrays or ShapeDtypeStructs with the structure and shapes of all of the
            model's parameters, of which none is an adapter.
        step: a step number, "latest", or "best": of the best evaluation (the latest where the
            run evaluated nothing).
        finetune: that of the run.

    Returns:
        Pytree of arrays like `like`, on the default device; adapters are merged into it.

    Raises:
        RunError: there is no such checkpoint, it is cut short, or it has other parameters.
    """
    chosen = _choose(directory, step)
    return jax.tree.map(jnp.asarray, _whole_params(directory, chosen, like, finetune))


def average_params(
    directory: str | os.PathLike,
    like: Any,
    *,
    count: int,
    finetune: FinetuneConfig | None = None,
) -> Any:
    """The mean of the parameters of a run's last `count` checkpoints, summed in float64.

    Args:
        directory: of the run.
        like: see restore_params.
        count: checkpoints to average.
        finetune: that of the run; what is averaged is merged before.

    Returns:
        Pytree of arrays like `like`, on the default device.

    Raises:
        ValueError: count is not positive.
        RunError: there are fewer checkpoints; or see restore_params.
    """
    if count < 1:
        raise ValueError(f"count must be positive; got {count}.")
    steps = checkpoint_steps(directory)
    if len(steps) < count:
        raise RunError(
            f"{directory} holds {len(steps)} checkpoints, {count} are to be averaged: "
            "average fewer, or train with a larger training.keep."
        )
    total = jax.tree.map(lambda x: np.zeros(x.shape), like)
    for step in steps[-count:]:
        params = _whole_params(directory, step, like, finetune)
        total = jax.tree.map(lambda t, x: t + np.asarray(x, np.float64), total, params)
    return jax.tree.map(
        lambda t, x: jnp.asarray((t / count).astype(x.dtype)), total, like
    )


def restore_masks(directory: str | os.PathLike, params: Any) -> Masks | None:
    """The masks of a run's latest checkpoint; None: it has none.

    Args:
        directory: of the run.
        params: pytree of `nnx.Variable`s, arrays or shapes: those that the masks are of.

    Raises:
        RunError: see restore_params.
    """
    checkpoint = _step_directory(directory, _choose(directory, "latest"))
    check_sizes(checkpoint)
    if not (checkpoint / "masks").is_dir():
        return None
    try:
        saved = tree_handler().metadata(checkpoint / "masks").tree
    except Exception as error:
        raise cut_short(checkpoint, error) from error
    names = {name.removesuffix(".value") for name in saved}
    like = jax.eval_shape(lambda: masks_like(params, names))
    arrays = restore_arrays(checkpoint, "masks", flatten(without_places(like)))
    return jax.tree.map(jnp.asarray, unflatten(like, arrays))


def load_params(
    directory: str | os.PathLike,
    like: Any,
    *,
    checkpoint: Checkpoint | None = None,
    average: int = 1,
    finetune: FinetuneConfig | None = None,
) -> Any:
    """The weights that a run is used with.

    Args:
        directory: of the run.
        like: see restore_params.
        checkpoint: a step, "best", "latest", or "average": see average_params; None: "average" of
            a run that averages, else "best".
        average: how many checkpoints the run averages.
        finetune: that of the run.

    Raises:
        RunError: "average" of a run that averages none; see restore_params and average_params.
    """
    if checkpoint is None:
        checkpoint = "average" if average > 1 else "best"
    if checkpoint == "average":
        if average < 2:
            raise RunError(
                f"{directory} was configured with training.average {average}, so there is no "
                'average of its checkpoints: choose "best", "latest" or a step.'
            )
        return average_params(directory, like, count=average, finetune=finetune)
    return restore_params(directory, like, step=checkpoint, finetune=finetune)


class _KeepLatestAndBest(PreservationPolicy):
    def __init__(self, keep: int):
        self.keep = keep
        self.best_step: int | None = None

    def should_preserve(self, checkpoints, *, context):
        del context
        first = len(checkpoints) - self.keep
        return [
            i >= first or c.step == self.best_step for i, c in enumerate(checkpoints)
        ]


def _handlers() -> ocp.handlers.CheckpointHandlerRegistry:
    handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
    handlers.add(None, ocp.args.PyTreeSave, tree_handler())
    return handlers


def _items(state: TrainState) -> dict[str, dict[str, Any]]:
    items = {
        "params": flatten(state.params),
        "training": flatten(_training(state)),
    }
    for name in ("ema", "masks"):
        if getattr(state, name) is not None:
            items[name] = flatten(getattr(state, name))
    return items


def _training(state: TrainState) -> dict[str, Any]:
    names = ("step", "opt_state", "rng", "precision")
    return {name: getattr(state, name) for name in names}


def _step_directory(directory: str | os.PathLike, step: int) -> Path:
    return Path(directory).absolute() / FOLDER / str(step)


def _choose(directory: str | os.PathLike, step: int | Literal["best", "latest"]) -> int:
    steps = checkpoint_steps(directory)
    if not steps:
        raise RunError(
            f"{directory} holds no checkpoint: train it first, or name another run."
        )
    if step == "best":
        best = _read_progress(_step_directory(directory, steps[-1])).get("best_step")
        step = steps[-1] if best is None else best
    if step == "latest":
        step = steps[-1]
    if step not in steps:
        raise RunError(
            f"{directory} holds no checkpoint of step {step}: choose one of "
            f"{', '.join(map(str, steps))}."
        )
    return step


def _whole_params(
    directory: str | os.PathLike,
    step: int,
    like: Any,
    finetune: FinetuneConfig | None,
) -> Any:
    """A checkpoint's parameters like `like`: numpy arrays, but for what adapters changed."""
    checkpoint = _step_directory(directory, step)
    name = "ema" if (checkpoint / "ema").is_dir() else "params"
    split = functools.partial(split_params, finetune=finetune)
    trained, constant = jax.eval_shape(split, like)
    check_sizes(checkpoint)
    saved = unflatten(
        trained, restore_arrays(checkpoint, name, flatten(without_places(trained)))
    )
    # What was kept in bfloat16 is used as all else.
    saved = jax.tree.map(lambda x, y: x.astype(y.dtype, copy=False), saved, trained)
    return merge_params(
        saved, _restore_constant(checkpoint, without_places(constant)), finetune
    )


def _restore_constant(checkpoint: Path, like: Any) -> Any:
    """What this and all other checkpoints of the run have in common."""
    if like is None:
        return None
    place = checkpoint.with_name(CONSTANT)
    try:
        return unflatten(like, load_arrays(place, flatten(like)))
    except DamagedCheckpoint as error:
        # Not a damaged checkpoint: no earlier one could do without it.
        raise RunError(
            f"{place} is missing, cut short or damaged, and all checkpoints of the run need it: "
            "bring it back from a copy, or train again in another directory."
        ) from error


def _check_dtypes(
    checkpoint: Path, items: Mapping[str, Mapping[str, Any]], like: TrainState
) -> None:
    for item, wanted in _items(like).items():
        for name, x in wanted.items():
            there = items[item][name].dtype
            if there != x.dtype:
                raise RunError(
                    f"{checkpoint} was kept in another precision ({name!r} is {there} there, "
                    f"{x.dtype} here): use the configuration in the run's config.json."
                )


def _read_progress(checkpoint: Path) -> dict[str, Any]:
    check_sizes(checkpoint)
    try:
        return dict(ocp.JsonCheckpointHandler().restore(checkpoint / PROGRESS))
    except Exception as error:
        raise cut_short(checkpoint, error) from error


def _replace_progress(checkpoint: Path, progress: Mapping[str, Any]) -> None:
    # Its size is no longer known; that it is cut short would show in its JSON.
    write_sizes(checkpoint, without=PROGRESS)
    place = checkpoint / PROGRESS
    with tempfile.TemporaryDirectory(dir=checkpoint.parent, prefix=".tell-") as made:
        ocp.JsonCheckpointHandler().save(Path(made), dict(progress))
        for file in Path(made).iterdir():
            os.replace(file, place / file.name)
