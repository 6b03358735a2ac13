"""A directory that appears whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from qkv_jax.interop.errors import InteropError


@contextlib.contextmanager
def new_directory(directory: str | os.PathLike) -> Iterator[Path]:
    """A place to write into, which becomes `directory` at the end, or is gone after an error.

    Raises:
        InteropError: there is something at `directory` other than an empty folder, or it cannot
            be written.
    """
    target = Path(directory)
    check_free(target)
    building = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        building.mkdir()
        yield building
        # A folder replaces an empty one, and nothing else.
        os.replace(building, target)
    except OSError as error:
        raise InteropError(f"{target} cannot be written ({error}).") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def check_free(target: Path) -> None:
    """Raises InteropError where something is lost if `target` is written."""
    if target.is_dir():
        if any(target.iterdir()):
            raise InteropError(f"{target} is not empty: choose another directory.")
    elif target.exists() or target.is_symlink():
        raise InteropError(f"{target} is no directory: choose another.")
