"""The tensors of a checkpoint directory, as numpy arrays by name."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from qkv_jax.interop.errors import InteropError
from qkv_jax.interop.torch_file import read_torch_file

SINGLE = "model.safetensors"
TORCH = "pytorch_model.bin"


def read_tensors(directory: str | os.PathLike) -> dict[str, np.ndarray]:
    """All tensors of model.safetensors, of its shards, or of pytorch_model.bin and its shards.

    Raises:
        InteropError: there is none, one is damaged or missing, or shards and index differ.
    """
    directory = Path(directory)
    for name, read in ((SINGLE, _read_safetensors), (TORCH, read_torch_file)):
        if (directory / name).is_file():
            return read(directory / name)
        index = directory / f"{name}.index.json"
        if index.is_file():
            return _read_shards(index, read)
    raise InteropError(
        f"{directory} holds no weights: it needs {SINGLE} or {TORCH}, whole or in shards with "
        "their index."
    )


def write_tensors(directory: str | os.PathLike, tensors: Mapping[str, np.ndarray]):
    """Writes model.safetensors, whole or not at all."""
    place = Path(directory) / SINGLE
    temporary = place.with_name(SINGLE + ".tmp")
    arrays = {name: np.asarray(x, order="C") for name, x in tensors.items()}
    save_file(arrays, temporary, metadata={"format": "pt"})
    os.replace(temporary, place)


def _read_shards(
    index: Path, read: Callable[[Path], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The tensors of all shards: those that the index lists, each once."""
    places, tensors = _places(index), dict[str, np.ndarray]()
    for shard in sorted(set(places.values())):
        if not (index.parent / shard).is_file():
            raise InteropError(
                f"{index.parent / shard} is missing: {index.name} names it."
            )
        part = read(index.parent / shard)
        twice = tensors.keys() & part.keys()
        if twice:
            raise InteropError(f"{index}: {min(twice)!r} is in two shards.")
        tensors |= part
    odd = tensors.keys() ^ places.keys()
    if odd:
        raise InteropError(
            f"{index} and its shards differ: {min(odd)!r} is in one of them."
        )
    return tensors


def _places(index: Path) -> dict[str, str]:
    """Tensor -> file, of an index; files beside it only."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        outside = [x for x in places.values() if x in ("", "..") or Path(x).name != x]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InteropError(f"{index} is no index of shards ({error}).") from error
    if outside:
        raise InteropError(f"{index} names a file elsewhere: {outside[0]!r}.")
    return places


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in list(file.keys())}
    except (SafetensorError, OSError, ValueError) as error:
        raise InteropError(
            f"{path} is damaged or missing ({error}): get it again."
        ) from None
