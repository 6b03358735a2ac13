"""Files of torch, written by hand: tensors are read, and everything else is refused unrun."""

import os
import pickle
import random
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from qkv_jax.interop import InteropError
from qkv_jax.interop.torch_file import read_torch_file

SIX = np.arange(6, dtype=np.float32).tobytes()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    content = value.to_bytes(12, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def numbers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(kind="FloatStorage", place="0", count=6, module="torch", head="storage"):
    content = text(head) + name(module, kind) + text(place) + text("cpu")
    return b"(" + content + number(count) + b"tQ"


def tensor(shape=(2, 3), strides=(3, 1), offset=0, where: bytes | None = None) -> bytes:
    content = (where or storage()) + number(offset) + numbers(shape) + numbers(strides)
    hooks = name("collections", "OrderedDict") + b")R"
    return (
        name("torch._utils", "_rebuild_tensor_v2")
        + b"("
        + content
        + b"\x89"
        + hooks
        + b"tR"
    )


def state(**tensors: bytes) -> bytes:
    return b"\x80\x02}(" + b"".join(text(x) + t for x, t in tensors.items()) + b"u."


def write(path: Path, content: bytes, *, method=zipfile.ZIP_STORED, first=SIX):
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/data/0", first)
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "pytorch_model.bin"


def test_tensors_of_one_storage_are_read(path):
    views = {"a": tensor(), "b": tensor((3, 2), (1, 3)), "c": tensor((2,), (2,), 1)}
    found = read_torch_file(write(path, state(**views, d=tensor((), ()))))
    whole = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(found["a"], whole)
    np.testing.assert_array_equal(found["b"], whole.T)
    np.testing.assert_array_equal(found["c"], [1, 3])
    np.testing.assert_array_equal(found["d"], np.float32(0))
    assert not found["a"].flags.writeable


class Attack:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"a": x}, lambda x: [x]])
def test_a_pickle_that_would_run_a_program_is_refused_unrun(
    path, tmp_path, protocol, wrap
):
    trace = tmp_path / "trace"
    content = pickle.dumps(wrap(Attack(trace)), protocol)
    for write_it in (lambda: write(path, content), lambda: path.write_bytes(content)):
        write_it()
        with pytest.raises(InteropError, match="damaged|holds more than tensors"):
            read_torch_file(path)
        assert not trace.exists()
    pickle.loads(content)
    assert trace.exists()  # It is an attack.


SYSTEM = name("posix", "system") + text("false") + b"\x85R"
REFUSED = {
    "a global beside a tensor": (state(a=tensor(), b=SYSTEM), "posix.system"),
    "a global inside of a tensor": (
        state(a=tensor(where=b"(" + text("storage") + SYSTEM + b"tQ")),
        "posix.system",
    ),
    "a global of attributes": (
        state(a=name("torch._utils", "_rebuild_tensor_v2.__globals__")),
        "_rebuild_tensor_v2.__globals__",
    ),
    "a global of a stack": (
        b"\x80\x04}(" + text("a") + text("os") + text("system") + b"\x93u.",
        "os.system",
    ),
    "an instance": (b"\x80\x02(cos\nsystem\no.", "os.system"),
    "an object": (b"\x80\x02(iposix\nsystem\n.", "opcode INST"),
    "an extension": (b"\x80\x02\x82\x01.", "opcode EXT1"),
    "a class built": (
        b"\x80\x02ccollections\nOrderedDict\n)\x81.",
        "opcode NEWOBJ",
    ),
    "a text as persistent id": (b"\x80\x02P0\n.", "opcode PERSID"),
    "another persistent id": (
        state(a=tensor(where=storage(head="module"))),
        "a persistent 'module'",
    ),
    "a persistent id of no tuple": (
        b"\x80\x02" + text("0") + b"Q.",
        "a persistent str",
    ),
    "another storage": (
        state(a=tensor(where=storage(kind="QInt8Storage"))),
        "torch.QInt8Storage",
    ),
    "an admitted global where none is": (
        state(a=tensor(where=storage("OrderedDict", module="collections"))),
        "collections.OrderedDict",
    ),
    "a call of a text": (b"\x80\x02" + text("a") + b")R.", "a call of a"),
    "a call with arguments": (
        b"\x80\x02" + name("collections", "OrderedDict") + text("a") + b"\x85R.",
        "a call of collections.OrderedDict",
    ),
    "attributes of a tensor": (state(a=tensor() + b"}b"), "BUILD on a ndarray"),
    "a number": (state(a=number(1)), "'a' is no tensor"),
    "a list": (b"\x80\x02].", "a list at the top"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_anything_but_tensors_is_refused(path, case):
    content, reason = REFUSED[case]
    with pytest.raises(InteropError, match="holds more than tensors") as caught:
        read_torch_file(write(path, content))
    assert reason in str(caught.value) and "model.safetensors" in str(caught.value)


HUGE = 10**12
DAMAGED = {
    "a tensor past its storage": tensor((2, 4), (3, 1)),
    "an offset past it": tensor((6,), (1,), 1),
    "a tensor of one number, spread out": tensor((HUGE,), (0,)),
    "windows over a storage": tensor((4, 3), (1, 1)),
    "a negative stride": tensor((2,), (-1,), 3),
    "a negative size": tensor((-2,), (1,)),
    "a shape without strides": tensor((2, 3), (3, 1), 0, number(3)),
    "a storage with more numbers than bytes": tensor(where=storage(count=HUGE)),
    "a storage with fewer numbers than bytes": tensor(
        (2,), (1,), where=storage(count=2)
    ),
    "a storage that is not there": tensor(where=storage(place="7")),
    "a storage elsewhere": tensor(where=storage(place="../../0")),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_tensors_that_cannot_be_are_refused(path, case):
    with pytest.raises(InteropError, match="is damaged|more than tensors"):
        read_torch_file(write(path, state(a=DAMAGED[case])))


def test_a_compressed_file_is_no_bomb(path):
    zeros = bytes(4 * 10**6)
    content = state(a=tensor((10**6,), (1,), where=storage(count=10**6)))
    write(path, content, method=zipfile.ZIP_DEFLATED, first=zeros)
    assert path.stat().st_size < 10**4
    with pytest.raises(InteropError, match="compressed, or larger than it can be"):
        read_torch_file(path)


def test_members_that_share_bytes_are_no_bomb(path):
    """1,000 entries of a zip's list that name the same 40 kB."""
    count = 10**4
    views = {f"t{i}": storage(place=str(i), count=count) for i in range(1000)}
    tensors = {x: tensor((count,), (1,), where=y) for x, y in views.items()}
    write(path, state(**tensors), first=bytes(4 * count))
    with zipfile.ZipFile(path, "a") as archive:
        first = archive.getinfo("archive/data/0")
        for i in range(1, 1000):
            copy = zipfile.ZipInfo(f"archive/data/{i}")
            copy.file_size = copy.compress_size = first.file_size
            copy.CRC, copy.header_offset = first.CRC, first.header_offset
            archive.filelist.append(copy)
        archive._didModify = True
    with pytest.raises(InteropError, match="is damaged"):
        read_torch_file(path)


def test_a_truncated_file_is_refused(path):
    content = write(path, state(a=tensor())).read_bytes()
    for size in range(0, len(content), 7):
        path.write_bytes(content[:size])
        with pytest.raises(InteropError, match="is damaged"):
            read_torch_file(path)


def test_no_damage_brings_anything_but_tensors_or_an_error(path):
    rng = random.Random(0)
    content = state(a=tensor(), b=tensor((3, 2), (1, 3)))
    for _ in range(500):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            found = read_torch_file(write(path, bytes(damaged)))
        except InteropError:
            continue
        assert all(isinstance(x, np.ndarray) and x.size <= 24 for x in found.values())


def old(
    content: bytes, *storages: tuple[str, int, bytes], magic=0x1950A86A20F9469CFC6C
):
    """A file as torch wrote it before 1.6."""
    pickles = [magic, 1001, {"protocol_version": 1001, "little_endian": True}]
    places = [place for place, _, _ in storages]
    parts = [pickle.dumps(x, 2) for x in pickles] + [content, pickle.dumps(places, 2)]
    tail = [struct.pack("<q", count) + values for _, count, values in storages]
    return b"".join(parts + tail)


def test_a_file_from_before_torch_1_6_is_read(path):
    ones = np.ones(2, np.int64).tobytes()
    where = storage("LongStorage", "17", 2)
    content = state(a=tensor((3, 2), (1, 3)), b=tensor((2,), (1,), where=where))
    path.write_bytes(old(content, ("17", 2, ones), ("0", 6, SIX)))
    found = read_torch_file(path)
    whole = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(found["a"], whole.T)
    np.testing.assert_array_equal(found["b"], [1, 1])
    assert found["b"].dtype == np.int64


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (old(state(a=tensor()), ("0", 6, SIX[:-1])), "storage 0 is cut short"),
        (old(state(a=tensor()), ("0", 5, SIX)), "storage 0 is not of 6 numbers"),
        (old(state(a=tensor())), "not those of its tensors"),
        (old(state(a=tensor()), ("0", 6, SIX), magic=7), "begins otherwise"),
        (old(state(a=SYSTEM)), "posix.system"),
        (old(state(a=tensor(where=storage(count=HUGE)))), "larger than the file"),
        (old(state(a=tensor()), ("0", 6, SIX))[:60], "is damaged"),
    ],
)
def test_an_odd_file_from_before_torch_1_6_is_refused(path, content, message):
    path.write_bytes(content)
    with pytest.raises(InteropError, match=message):
        read_torch_file(path)
