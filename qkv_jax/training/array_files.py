"""Arrays by name in a directory, written by orbax, beside a list of the sizes of its files.

The list, `files.json`, tells of a file that is missing or cut short before orbax meets it.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from qkv_jax.training.distributed import on_first
from qkv_jax.training.errors import DamagedCheckpoint, RunError

SIZES_FILE = "files.json"
WORTH_SLICING = 2**20  # bytes of one device's slice


def tree_handler() -> ocp.PyTreeCheckpointHandler:
    """Writes and reads arrays; of those that every device has, the small ones are one device's to write.

    Left to itself, orbax has each device write its slice of every such array, and so compiles a
    program for each shape and device: 15 s before the first checkpoint of 40 shapes on 8 devices.
    """
    of_types = ocp.type_handlers
    arrays = of_types.ArrayHandler(min_slice_bytes_for_replica_parallel=WORTH_SLICING)
    return ocp.PyTreeCheckpointHandler(
        type_handler_registry=of_types.create_type_handler_registry(
            (np.ndarray, of_types.NumpyHandler()), (jax.Array, arrays)
        )
    )


def save_arrays(place: Path, arrays: Mapping[str, Any]) -> None:
    """Writes arrays by name, with the sizes of their files."""
    with ocp.Checkpointer(tree_handler()) as checkpointer:
        saved = ocp.args.PyTreeSave(dict(arrays))
        checkpointer.save(place.absolute() / "params", args=saved, force=True)
    on_first(lambda: write_sizes(place))


def load_arrays(place: Path, like: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What `save_arrays` wrote.

    Args:
        place: given to it.
        like: names, and shapes and dtypes, as ShapeDtypeStructs; where these have shardings,
            the arrays are put there.

    Raises:
        DamagedCheckpoint: it is missing or cut short.
        RunError: it holds other arrays.
    """
    check_sizes(place)
    return restore_arrays(place.absolute(), "params", like)


def flatten(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by their dotted names."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {
        jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves
    }
    if len(named) != len(leaves):
        raise ValueError("two leaves of the pytree have the same dotted name.")
    return named


def unflatten(like: Any, named: Mapping[str, Any]) -> Any:
    return jax.tree.unflatten(
        jax.tree.structure(like), [named[name] for name in flatten(like)]
    )


def without_places(like: Any) -> Any:
    """Shapes without shardings, which are restored as numpy arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)


def restore_arrays(
    checkpoint: Path, item: str, like: Mapping[str, Any]
) -> dict[str, Any]:
    """One item's arrays: where `like` says, or as numpy arrays where it has no shardings."""
    directory = checkpoint / item
    handler = tree_handler()
    try:
        saved = handler.metadata(directory).tree
    except Exception as error:
        raise cut_short(checkpoint, error) from error
    _check_same(checkpoint, {name: x.shape for name, x in saved.items()}, like)
    restore_args = {name: _restore_args(x) for name, x in like.items()}
    try:
        return handler.restore(
            directory, args=ocp.args.PyTreeRestore(restore_args=restore_args)
        )
    except Exception as error:
        raise cut_short(checkpoint, error) from error


def _restore_args(like: Any) -> ocp.RestoreArgs:
    if like.sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=like.sharding)


def _check_same(
    checkpoint: Path, saved: dict[str, tuple], like: Mapping[str, Any]
) -> None:
    wanted = {name: tuple(x.shape) for name, x in like.items()}
    wrong = sorted(
        name
        for name in saved.keys() | wanted.keys()
        if saved.get(name) != wanted.get(name)
    )
    if wrong:
        there, here = saved.get(wrong[0], "absent"), wanted.get(wrong[0], "absent")
        raise RunError(
            f"{checkpoint} is of another model or optimizer ({wrong[0]!r} is {there} there, {here} "
            f"here; {len(wrong)} arrays differ): use the configuration in the run's config.json."
        )


def _sizes(checkpoint: Path) -> dict[str, int]:
    """Bytes of every file of the items; orbax still writes beside them as it commits."""
    files = (path for path in checkpoint.glob("*/**/*") if path.is_file())
    return {str(path.relative_to(checkpoint)): path.stat().st_size for path in files}


def write_sizes(checkpoint: Path, *, without: str | None = None) -> None:
    """Into the finished checkpoint, be it before or after orbax gave it its final name.

    Args:
        checkpoint: its final name.
        without: an item whose files are left out.
    """
    places = [*checkpoint.parent.glob(checkpoint.name + ".*"), checkpoint]
    place = next(path for path in places if path.is_dir())
    temporary = place / (SIZES_FILE + ".tmp")
    sizes = {
        name: size
        for name, size in _sizes(place).items()
        if Path(name).parts[0] != without
    }
    temporary.write_text(json.dumps(sizes), encoding="utf-8")
    os.replace(temporary, place / SIZES_FILE)


def check_sizes(checkpoint: Path) -> None:
    """Raises for a file that is missing or cut; a checkpoint without a list passes."""
    file = checkpoint / SIZES_FILE
    if not file.exists():
        return
    try:
        wanted = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise cut_short(checkpoint, f"{SIZES_FILE}: {error}") from error
    found = _sizes(checkpoint)
    for name, size in wanted.items():
        if found.get(name) != size:
            there = (
                f"has {found[name]} bytes, not {size}"
                if name in found
                else "is missing"
            )
            raise cut_short(checkpoint, f"{name} {there}")


def cut_short(checkpoint: Path, cause: Exception | str) -> DamagedCheckpoint:
    what = (str(cause).splitlines() or [""])[0][:120]
    if isinstance(cause, Exception):
        what = f"{type(cause).__name__}: {what}"
    return DamagedCheckpoint(
        f"{checkpoint} is cut short or damaged ({what}): move that directory away, "
        "and the run goes on from the checkpoint before it."
    )
