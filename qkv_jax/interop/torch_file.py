"""Tensors of a `torch.save` file, without torch and without unpickling.

The file is a zip with the bytes of each storage and a pickle that names them. The pickle is read
as data, by an interpreter of the opcodes that a dict of tensors takes: it can build tuples, dicts
and views of the storages, and nothing else. Any other opcode, or any other global, is refused,
so no code in the file can run.
"""

import math
import pickletools
import zipfile
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from qkv_jax.interop.errors import InteropError

STORAGES: dict[str, np.dtype] = {
    f"torch {name}Storage": np.dtype(kind)
    for name, kind in {
        "Float": np.float32,
        "Double": np.float64,
        "Half": np.float16,
        "BFloat16": ml_dtypes.bfloat16,
        "Long": np.int64,
        "Int": np.int32,
        "Short": np.int16,
        "Char": np.int8,
        "Byte": np.uint8,
        "Bool": np.bool_,
    }.items()
}
TENSOR = "torch._utils _rebuild_tensor_v2"
PARAMETER = "torch._utils _rebuild_parameter"
ORDERED = "collections OrderedDict"
ADMITTED = {TENSOR, PARAMETER, ORDERED, *STORAGES}
IGNORED = ("PROTO", "FRAME", "STOP")
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
ARGUMENTS = [
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "INT",
    "LONG",
    "UNICODE",
]
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()


class _Global(NamedTuple):
    name: str


class _Refused(Exception):
    """The pickle holds something else than tensors."""


def read_torch_file(path: str | PathLike[str]) -> dict[str, np.ndarray]:
    """The tensors of a state dict that `torch.save` wrote, by name.

    Raises:
        InteropError: it is no such file, or it holds anything but tensors.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(archive)
    except _Refused as refused:
        raise InteropError(
            f"{path} holds more than tensors ({refused}), and is not read: a pickle can run code. "
            "Get the checkpoint as model.safetensors."
        ) from None
    except (zipfile.BadZipFile, KeyError, StopIteration) as error:
        raise InteropError(
            f"{path} is damaged, or of torch before 1.6 ({error}): get the checkpoint as "
            "model.safetensors."
        ) from None
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise InteropError(f"{path} is damaged ({error}): get it again.") from None


def _read(archive: zipfile.ZipFile) -> dict[str, np.ndarray]:
    main = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
    folder = main.removesuffix("data.pkl")
    if f"{folder}byteorder" in archive.namelist():
        order = archive.read(f"{folder}byteorder")
        if order != b"little":
            raise _Refused(f"byte order {order!r}")
    found = _Reader(archive, folder).run(archive.read(main))
    if not isinstance(found, dict):
        raise _Refused(f"a {type(found).__name__} at the top")
    # Some checkpoints keep the state dict one level down.
    found = found.get("state_dict", found)
    wrong = [name for name, x in found.items() if not isinstance(x, np.ndarray)]
    if wrong:
        raise _Refused(f"{wrong[0]!r} is no tensor")
    return found


class _Reader:
    """A stack, a memo, and the storages of one file."""

    def __init__(self, archive: zipfile.ZipFile, folder: str):
        self.archive, self.folder = archive, folder
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, np.ndarray] = {}

    def run(self, pickle: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(pickle):
            self.step(opcode.name, argument)
        (result,) = self.stack
        return result

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in IGNORED:
            return
        if name in ARGUMENTS:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in TUPLES:
            count = TUPLES[name]
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("EMPTY_TUPLE", "EMPTY_DICT", "EMPTY_LIST"):
            stack.append({"EMPTY_TUPLE": (), "EMPTY_DICT": {}, "EMPTY_LIST": []}[name])
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "TUPLE":
            stack.append(tuple(self.since_mark()))
        elif name in ("SETITEM", "SETITEMS", "BUILD"):
            self.fill(name)
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self.memo[int(argument)] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self.memo[int(argument)])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            self.name_global(name, argument)
        elif name == "BINPERSID":
            stack.append(self.storage(stack.pop()))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(self.call(function, arguments))
        else:
            raise _Refused(f"opcode {name}")

    def since_mark(self) -> list[Any]:
        at = max(i for i, item in enumerate(self.stack) if item is _MARK)
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def fill(self, name: str) -> None:
        if name == "BUILD":  # The attributes of a state dict: its _metadata.
            self.stack.pop()
            return
        if name == "SETITEM":
            value, key = self.stack.pop(), self.stack.pop()
            items = [key, value]
        else:
            items = self.since_mark()
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise _Refused(f"items of a {type(target).__name__}")
        target.update(zip(items[::2], items[1::2], strict=True))

    def name_global(self, name: str, argument: Any) -> None:
        if name == "STACK_GLOBAL":
            attribute, module = self.stack.pop(), self.stack.pop()
            argument = f"{module} {attribute}"
        if argument not in ADMITTED:
            raise _Refused(str(argument).replace(" ", "."))
        self.stack.append(_Global(argument))

    def storage(self, identity: Any) -> np.ndarray:
        kind, dtype, place, *_ = identity
        if kind != "storage" or not isinstance(dtype, _Global):
            raise _Refused(f"a persistent {kind!r}")
        if dtype.name not in STORAGES:
            raise _Refused(dtype.name.replace(" ", "."))
        if place not in self.storages:
            content = self.archive.read(f"{self.folder}data/{place}")
            self.storages[place] = np.frombuffer(content, STORAGES[dtype.name])
        return self.storages[place]

    def call(self, function: Any, arguments: Any) -> Any:
        name = function.name if isinstance(function, _Global) else str(function)
        if name == ORDERED and arguments == ():
            return {}
        if name == PARAMETER and isinstance(arguments[0], np.ndarray):
            return arguments[0]
        if name == TENSOR:
            return _view(*arguments[:4])
        raise _Refused(f"a call of {name.replace(' ', '.')}")


def _view(storage: Any, offset: int, shape: tuple, strides: tuple) -> np.ndarray:
    if not isinstance(storage, np.ndarray) or len(shape) != len(strides):
        raise _Refused("a tensor without a storage")
    if min((offset, *shape, *strides), default=0) < 0:
        raise ValueError("a tensor has a negative size")
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides))
    if math.prod(shape) and last >= len(storage):
        raise ValueError("a tensor reaches past its storage")
    size = storage.itemsize
    start = storage[offset:] if math.prod(shape) else storage[:0]
    view = np.lib.stride_tricks.as_strided(
        start, shape, [size * step for step in strides], writeable=False
    )
    return np.ascontiguousarray(view).reshape(shape)
