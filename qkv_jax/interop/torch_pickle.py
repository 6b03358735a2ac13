"""The pickles of `torch.save`, read as data.

An interpreter of the opcodes that a dict of tensors takes: it can build tuples, lists, dicts and
views of storages, and nothing else. Any other opcode, and any other global, is refused, so no code
in a file can run.
"""

import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

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
        "ComplexFloat": np.complex64,
        "ComplexDouble": np.complex128,
    }.items()
}
BYTES = "torch.storage UntypedStorage"
# Types that came after the storages of their own: their tensors name them.
DTYPES: dict[str, np.dtype] = {
    f"torch {name}": np.dtype(kind)
    for name, kind in {
        "uint16": np.uint16,
        "uint32": np.uint32,
        "uint64": np.uint64,
        "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
        "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
        "float8_e5m2": ml_dtypes.float8_e5m2,
        "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    }.items()
}
TENSOR = "torch._utils _rebuild_tensor_v2"
TYPED_TENSOR = "torch._utils _rebuild_tensor_v3"
PARAMETER = "torch._utils _rebuild_parameter"
ORDERED = "collections OrderedDict"
ADMITTED = {TENSOR, TYPED_TENSOR, PARAMETER, ORDERED, BYTES, *STORAGES, *DTYPES}
IGNORED = ("PROTO", "FRAME", "STOP")
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
ARGUMENTS = {
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "INT",
    "LONG",
    "UNICODE",
}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()


class Refused(Exception):
    """A pickle holds something else than tensors."""


@dataclass(frozen=True)
class Storage:
    """What a pickle says of a storage.

    Attributes:
        place: its name in the file.
        dtype: of its numbers.
        count: of its numbers.
    """

    place: str
    dtype: np.dtype
    count: int


class _Global(NamedTuple):
    name: str


class Reader:
    """A stack and a memo, and where storages come from.

    Args:
        load: gives the numbers of a storage, an array of one axis.
    """

    def __init__(self, load: Callable[[Storage], np.ndarray]):
        self.load = load
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, np.ndarray] = {}

    def run(self, pickle: Any) -> Any:
        """What one pickle holds, of bytes or of a file, which is then behind it.

        Raises:
            Refused: it holds something else than tensors.
            ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError: it is
                damaged.
        """
        self.stack, self.memo = [], {}
        for opcode, argument, _ in pickletools.genops(pickle):
            self._step(opcode.name, argument)
        (result,) = self.stack
        return result

    def _step(self, name: str, argument: Any) -> None:
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
            stack.append(tuple(self._since_mark()))
        elif name in ("SETITEM", "SETITEMS", "BUILD", "APPEND", "APPENDS"):
            self._fill(name)
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self.memo[int(argument)] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self.memo[int(argument)])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            self._name_global(name, argument)
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_call(function, arguments))
        else:
            raise Refused(f"opcode {name}")

    def _since_mark(self) -> list[Any]:
        at = max(i for i, item in enumerate(self.stack) if item is _MARK)
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def _fill(self, name: str) -> None:
        if name.endswith("S"):
            items = self._since_mark()
        else:
            count = 2 if name == "SETITEM" else 1
            items = self.stack[-count:]
            del self.stack[-count:]
        target, appends = self.stack[-1], name.startswith("APPEND")
        if appends and isinstance(target, list):
            target.extend(items)
        elif appends or not isinstance(target, dict):
            raise Refused(f"{name} on a {type(target).__name__}")
        elif name != "BUILD":  # What a state dict has beside its items: its _metadata.
            target.update(zip(items[::2], items[1::2], strict=True))

    def _name_global(self, name: str, argument: Any) -> None:
        if name == "STACK_GLOBAL":
            attribute, module = self.stack.pop(), self.stack.pop()
            argument = f"{module} {attribute}"
        if argument not in ADMITTED:
            raise Refused(str(argument).replace(" ", "."))
        self.stack.append(_Global(argument))

    def _storage(self, identity: Any) -> np.ndarray:
        if not isinstance(identity, tuple) or len(identity) < 5:
            raise Refused(f"a persistent {type(identity).__name__}")
        kind, dtype, place, _, count, *view = identity
        if (
            kind != "storage"
            or not isinstance(dtype, _Global)
            or view not in ([], [None])
        ):
            raise Refused(f"a persistent {kind!r}")
        if dtype.name != BYTES and dtype.name not in STORAGES:
            raise Refused(dtype.name.replace(" ", "."))
        if type(count) is not int or count < 0 or not isinstance(place, str):
            raise ValueError("a storage has no size or name")
        if place not in self.storages:
            kind = STORAGES.get(dtype.name, np.dtype(np.uint8))
            self.storages[place] = self.load(Storage(place, kind, count))
        return self.storages[place]


def _call(function: Any, arguments: Any) -> Any:
    name = function.name if isinstance(function, _Global) else str(function)
    if name == ORDERED and arguments == ():
        return {}
    if name == PARAMETER and isinstance(arguments[0], np.ndarray):
        return arguments[0]
    if name == TENSOR:
        return _view(*arguments[:4])
    if name == TYPED_TENSOR and isinstance(arguments[6], _Global):
        if arguments[6].name not in DTYPES:
            raise Refused(arguments[6].name.replace(" ", "."))
        storage, *where = arguments[:4]
        return _view(storage.view(DTYPES[arguments[6].name]), *where)
    raise Refused(f"a call of {name.replace(' ', '.')}")


def _view(storage: Any, offset: int, shape: tuple, strides: tuple) -> np.ndarray:
    """A view of a storage, read-only and without a copy: as large as the file, at most."""
    if not isinstance(storage, np.ndarray) or len(shape) != len(strides):
        raise Refused("a tensor without a storage")
    if min((offset, *shape, *strides), default=0) < 0:
        raise ValueError("a tensor has a negative size")
    count = math.prod(shape)
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides))
    if count and (last >= len(storage) or count > len(storage)):
        raise ValueError("a tensor reaches past its storage")
    size = storage.itemsize
    if not count:
        return np.empty(shape, storage.dtype)
    steps, numbers = [size * step for step in strides], storage.view(np.uint8)
    view = np.ndarray(shape, storage.dtype, numbers.data, offset * size, steps)
    view.flags.writeable = False
    return view
