"""Weights of a directory: whole, in shards, and damaged in every way."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from qkv_jax.interop import InteropError, read_tensors
from qkv_jax.interop.tensors import write_tensors

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.ones(3, np.float16),
    "c": np.zeros((), np.int64),
}
SHARDS = {
    "a": "model-00001-of-00002.safetensors",
    "b": "model-00002-of-00002.safetensors",
    "c": "model-00002-of-00002.safetensors",
}


def index(directory, places) -> None:
    content = {"metadata": {}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(content))


@pytest.fixture
def sharded(tmp_path):
    for shard in set(SHARDS.values()):
        part = {x: TENSORS[x] for x, place in SHARDS.items() if place == shard}
        save_file(part, tmp_path / shard)
    index(tmp_path, SHARDS)
    return tmp_path


def same(found) -> bool:
    return found.keys() == TENSORS.keys() and all(
        found[x].dtype == y.dtype and np.array_equal(found[x], y)
        for x, y in TENSORS.items()
    )


def test_what_is_written_is_read(tmp_path):
    write_tensors(tmp_path, TENSORS | {"a": TENSORS["a"].T.copy().T})
    assert same(read_tensors(tmp_path))
    assert [x.name for x in tmp_path.iterdir()] == ["model.safetensors"]


def test_shards_are_put_together(sharded):
    assert same(read_tensors(sharded))


@pytest.mark.parametrize("place", ["../x.safetensors", "/etc/passwd", "a/b", "..", ""])
def test_a_shard_elsewhere_is_refused(sharded, place):
    index(sharded, SHARDS | {"a": place})
    with pytest.raises(InteropError, match="names a file elsewhere"):
        read_tensors(sharded)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (
            SHARDS | {"a": "model-3.safetensors"},
            "model-3.safetensors is missing: .* names",
        ),
        (SHARDS | {"d": SHARDS["a"]}, "'d' is in one of them"),
        ({"b": SHARDS["b"]}, "'c' is in one of them"),
        ({"b": 3}, "no index of shards"),
        (None, "no index of shards"),
        ([], "no index of shards"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(sharded, places, message):
    index(sharded, places)
    with pytest.raises(InteropError, match=message):
        read_tensors(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded):
    save_file({"a": TENSORS["a"], "b": TENSORS["b"]}, sharded / SHARDS["a"])
    with pytest.raises(InteropError, match="'b' is in two shards"):
        read_tensors(sharded)


@pytest.mark.parametrize("content", ["", "{", "[]", "\udcff"])
def test_an_index_that_is_no_json_is_refused(sharded, content):
    path = sharded / "model.safetensors.index.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(InteropError, match="no index of shards"):
        read_tensors(sharded)


def test_truncated_safetensors_are_refused(tmp_path):
    write_tensors(tmp_path, TENSORS)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    for size in range(0, len(content), 9):
        path.write_bytes(content[:size])
        with pytest.raises(InteropError, match="damaged"):
            read_tensors(tmp_path)


def test_a_directory_without_weights_says_what_it_needs(tmp_path):
    with pytest.raises(
        InteropError, match="needs model.safetensors or pytorch_model.bin"
    ):
        read_tensors(tmp_path)
