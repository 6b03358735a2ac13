"""The tensors of a checkpoint directory, as numpy arrays by name."""

import json
import os
from collections.abc import Mapping
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
        InteropError: there is none, one is damaged, or a tensor is in two shards.
    """
    directory = Path(directory)
    for name, read in ((SINGLE, _read_safetensors), (TORCH, read_torch_file)):
        if (directory / name).is_file():
            return read(directory / name)
        index = directory / f"{name}.index.json"
        if index.is_file():
            tensors: dict[str, np.ndarray] = {}
            for shard in _shards(index):
                part = read(directory / shard)
                twice = tensors.keys() & part.keys()
                if twice:
                    raise InteropError(f"{index}: {min(twice)!r} is in two shards.")
                tensors |= part
            return tensors
    raise InteropError(
        f"{directory} holds no weights: it needs {SINGLE} or {TORCH}, whole or in shards with "
        "their index."
    )


def write_tensors(directory: str | os.PathLike, tensors: Mapping[str, np.ndarray]):
    """Writes model.safetensors, whole or not at all."""
    place = Path(directory) / SINGLE
    temporary = place.with_name(SINGLE + ".tmp")
    arrays = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    save_file(arrays, temporary, metadata={"format": "pt"})
    os.replace(temporary, place)


def _shards(index: Path) -> list[str]:
    try:
        names = set(
            json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        )
    except (ValueError, KeyError, AttributeError) as error:
        raise InteropError(f"{index} is no index of shards ({error}).") from error
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise InteropError(f"{index} names a file elsewhere: {outside[0]!r}.")
    return sorted(names)


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in list(file.keys())}
    except (SafetensorError, OSError, ValueError) as error:
        raise InteropError(
            f"{path} is damaged or missing ({error}): get it again."
        ) from None
