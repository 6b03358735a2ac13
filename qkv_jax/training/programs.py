"""Compiled programs, kept on disk from one command to the next."""

import hashlib
import os
import platform
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import jax

# The oldest programs go when all together pass the first; none is kept with less room than the
# second, since one that is cut short would stand in its own way for ever.
MOST_BYTES = 1 << 30
LEAST_FREE = 256 << 20


def keep_programs(directory: Path) -> Path | None:
    """Has JAX keep all that it compiles from now on, in a directory of this kind of machine.

    To be called by a process of its own, before anything is compiled: JAX looks for the place
    once. Where the user has told JAX of a place already (JAX_COMPILATION_CACHE_DIR), that holds.
    Nothing here is ever fatal: where programs cannot be kept, they are compiled each time.

    Args:
        directory: to be trusted, for what lies there is run; made where it is missing.

    Returns:
        Where programs are kept; None: nowhere new.
    """
    config: Any = jax.config
    if config.jax_compilation_cache_dir is not None:
        return None
    place = directory / _machine()
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):  # Tells more than permissions do.
            pass
        _forget_oldest(place, MOST_BYTES)
        if shutil.disk_usage(place).free < LEAST_FREE:
            return None
    except OSError:
        return None
    for name, value in {
        "jax_compilation_cache_dir": str(place),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }.items():
        config.update(name, value)
    # A program that cannot be read or written is compiled: nothing that a user could act on.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent")
    return place


def _machine() -> str:
    """Names what programs were compiled for: another processor may lack what they use."""
    parts = [platform.system(), platform.machine(), jax.__version__]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        parts += sorted({x for x in lines if x.startswith(("flags", "Features"))})
    except OSError:
        parts.append(platform.processor())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _forget_oldest(directory: Path, most_bytes: int) -> None:
    """Removes the files written first, until what is left is no more than most_bytes."""
    with os.scandir(directory) as entries:
        files = [(entry.stat(), entry.path) for entry in entries if entry.is_file()]
    total = sum(stat.st_size for stat, _ in files)
    for stat, path in sorted(files, key=lambda file: file[0].st_mtime_ns):
        if total <= most_bytes:
            return
        os.unlink(path)
        total -= stat.st_size
