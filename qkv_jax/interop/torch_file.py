"""Tensors of a `torch.save` file, without torch and without unpickling.

Since torch 1.6 (2020) the file is a zip with the bytes of each storage and a pickle that names
them; before, it is a row of pickles with the bytes behind them. The pickles are read as data, by
`torch_pickle`.
"""

import os
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from qkv_jax.interop.errors import InteropError
from qkv_jax.interop.torch_pickle import Reader, Refused, Storage

# What files before torch 1.6 begin with: its number, pickled.
MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001


def read_torch_file(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The tensors of a state dict that `torch.save` wrote, by name; read-only.

    Raises:
        InteropError: it is no such file, or it holds anything but tensors.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            if zipfile.is_zipfile(file):
                with zipfile.ZipFile(file) as archive:
                    found = _read_zip(archive, path.stat().st_size)
            else:
                file.seek(0)
                found = _read_old(file, path.stat().st_size)
        return _state_dict(found)
    except Refused as refused:
        raise InteropError(
            f"{path} holds more than tensors ({refused}), and is not read: a pickle can run code. "
            "Get the checkpoint as model.safetensors."
        ) from None
    except (
        zipfile.BadZipFile,
        OSError,
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
        OverflowError,
        RuntimeError,  # Of zipfile: encrypted, or compressed in an unknown way.
    ) as error:
        reason = str(error) or type(error).__name__
        raise InteropError(
            f"{path} is damaged, or no file of torch.save ({reason}): get it again."
        ) from None


def _state_dict(found: Any) -> dict[str, np.ndarray]:
    if not isinstance(found, dict):
        raise Refused(f"a {type(found).__name__} at the top")
    # Some checkpoints keep the state dict one level down.
    inner = found.get("state_dict")
    found = inner if isinstance(inner, dict) else found
    for name, x in found.items():
        if not isinstance(name, str) or not isinstance(x, np.ndarray):
            raise Refused(f"{name!r} is no tensor")
    return found


class _Budget:
    """Bytes that storages may still have: no more than the file, whatever it says of itself."""

    def __init__(self, size: int):
        self.left = size

    def take(self, storage: Storage) -> int:
        size = storage.count * storage.dtype.itemsize
        self.left -= size
        if self.left < 0:
            raise ValueError("its tensors are larger than the file")
        return size


def _read_zip(archive: zipfile.ZipFile, size: int) -> Any:
    mains = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(mains) != 1:
        raise ValueError(f"{len(mains)} members are named data.pkl")
    folder, budget = mains[0].removesuffix("data.pkl"), _Budget(size)
    if f"{folder}byteorder" in archive.namelist():
        order = _member(archive, f"{folder}byteorder", 6)
        if order != b"little":
            raise ValueError(f"its byte order is {order!r}")

    def load(storage: Storage) -> np.ndarray:
        count = budget.take(storage)
        content = _member(archive, f"{folder}data/{storage.place}", count)
        if len(content) != count:
            raise ValueError(
                f"storage {storage.place} has {len(content)} bytes, not {count}"
            )
        return np.frombuffer(content, storage.dtype) if count else _empty(storage)

    return Reader(load).run(_member(archive, mains[0], size))


def _member(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    """A member, which torch never compresses; no more than `limit` bytes."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.file_size > limit:
        raise ValueError(f"{name} is compressed, or larger than it can be")
    return archive.read(info)


def _read_old(file: BinaryIO, size: int) -> Any:
    budget, storages = _Budget(size), {}

    def load(storage: Storage) -> np.ndarray:
        budget.take(storage)
        storages[storage.place] = _empty(storage)
        return storages[storage.place]

    def refuse(storage: Storage) -> np.ndarray:
        raise ValueError("a storage where none can be")

    if Reader(refuse).run(file) != MAGIC or Reader(refuse).run(file) != PROTOCOL:
        raise ValueError("it begins otherwise")
    system = Reader(refuse).run(file)
    if system.get("little_endian") is not True:
        raise ValueError("its byte order is another")
    found = Reader(load).run(file)
    places = Reader(refuse).run(file)
    if sorted(places) != sorted(storages):
        raise ValueError("its storages are not those of its tensors")
    for place in places:
        _fill(file, place, storages[place])
    return found


def _fill(file: BinaryIO, place: str, storage: np.ndarray) -> None:
    """Reads the numbers of a storage into it: the views of it are made already."""
    head = file.read(8)
    if len(head) < 8 or struct.unpack("<q", head)[0] != len(storage):
        raise ValueError(f"storage {place} is not of {len(storage)} numbers")
    content = storage.view(np.uint8)
    if file.readinto(content.data) != content.nbytes:  # type: ignore[attr-defined]
        raise ValueError(f"storage {place} is cut short")


def _empty(storage: Storage) -> np.ndarray:
    return np.empty(storage.count, storage.dtype)
