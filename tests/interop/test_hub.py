"""Names of the hub become directories; a stand-in takes the place of the hub."""

import fnmatch
import sys
import types

import pytest

from qkv_jax.interop import InteropError, fetch

MODELS = {
    "org/safe": ["config.json", "source.spm", "model.safetensors", "pytorch_model.bin"],
    "org/old": ["config.json", "pytorch_model.bin", "spiece.model", "rust_model.ot"],
    "t5-small": ["config.json", "model.safetensors", "run.py", "onnx/config.json"],
}


class RepositoryNotFoundError(OSError):
    pass


class GatedRepoError(RepositoryNotFoundError):
    pass


class LocalEntryNotFoundError(FileNotFoundError):
    pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Hands out the files of `MODELS` that patterns ask for; fails as it is told to."""
    hub = types.ModuleType("huggingface_hub")
    hub.failure, hub.revisions = None, []

    def snapshot_download(name, *, revision, allow_patterns, ignore_patterns):
        hub.revisions.append(revision)
        if hub.failure:
            raise hub.failure
        if name not in MODELS:
            raise RepositoryNotFoundError("404 Client Error\nmore lines")
        for file in MODELS[name]:
            wanted = any(fnmatch.fnmatch(file, x) for x in allow_patterns)
            if wanted and not any(fnmatch.fnmatch(file, x) for x in ignore_patterns):
                (tmp_path / name).mkdir(parents=True, exist_ok=True)
                (tmp_path / name / file).write_text(file)
        return str(tmp_path / name)

    hub.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    return hub


def files(path) -> set[str]:
    return {x.name for x in path.iterdir()}


def test_a_directory_is_itself_and_asks_no_hub(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert fetch(tmp_path) == tmp_path
    assert fetch(str(tmp_path)) == tmp_path
    with pytest.raises(InteropError, match="is a directory: it has no revision"):
        fetch(tmp_path, revision="main")


def test_only_data_is_fetched(hub):
    assert files(fetch("t5-small")) == {"config.json", "model.safetensors"}
    assert "pytorch_model.bin" not in files(fetch("org/safe"))
    assert hub.revisions == [None, None]


def test_a_pickle_is_fetched_where_there_is_nothing_else(hub):
    found = files(fetch("org/old", revision="v1"))
    assert found == {"config.json", "pytorch_model.bin", "spiece.model"}
    assert hub.revisions == ["v1", "v1"]


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (None, "no directory org/none, and no such model on the hub"),
        (GatedRepoError(), "accept its terms"),
        (LocalEntryNotFoundError("x"), "the hub cannot be reached"),
        (ConnectionError("x"), "the hub cannot be reached"),
        (ValueError("odd\nlines"), "org/none cannot be downloaded: odd$"),
    ],
)
def test_failures_are_told_in_one_line(hub, failure, message):
    hub.failure = failure
    with pytest.raises(InteropError, match=message) as caught:
        fetch("org/none")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["./missing", "/missing", "a/b/c", "../x", "a b"])
def test_what_is_no_name_asks_no_hub(hub, name):
    with pytest.raises(InteropError, match="no directory, and no name of a model"):
        fetch(name)
    assert hub.revisions == []


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InteropError, match=r"pip install 'qkv_jax\[hub\]'") as caught:
        fetch("org/name")
    assert "there is no directory org/name" in str(caught.value)
