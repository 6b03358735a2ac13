"""From what was published to a directory of its own."""

import sys
import types

import jax
import numpy as np
import pytest

from qkv_jax.interop import (
    InteropError,
    import_published,
    load,
    load_tokenizer,
    read_tensors,
)
from tests.interop import toy_marian


@pytest.fixture
def marian(tmp_path):
    directory = tmp_path / "marian"
    directory.mkdir()
    options = toy_marian.options(toy_marian.vocabulary(directory))
    arrays = toy_marian.arrays(np.random.default_rng(0), options)
    toy_marian.write(directory, options, arrays)
    return directory


def content(directory) -> dict[str, bytes]:
    return {x.name: x.read_bytes() for x in directory.iterdir()}


def test_a_model_of_the_marian_toolkit_and_then_of_hugging_face(marian, tmp_path):
    first = import_published(marian, tmp_path / "first")
    again = import_published(tmp_path / "first", tmp_path / "second")
    before, after = (read_tensors(tmp_path / x) for x in ("first", "second"))
    assert {x: y.tobytes() for x, y in before.items()} == {
        x: y.tobytes() for x, y in after.items()
    }
    assert content(tmp_path / "first") == content(tmp_path / "second")
    assert first.settings == again.settings == load(tmp_path / "second").settings
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
    load_tokenizer(
        tmp_path / "second", family="marian", settings=again.settings, generation={}
    )


def test_a_name_of_the_hub(marian, tmp_path, monkeypatch):
    import_published(marian, tmp_path / "hub")
    hub = types.ModuleType("huggingface_hub")
    asked = []

    def snapshot_download(name, *, revision, **options):
        asked.append((name, revision))
        return str(tmp_path / "hub")

    hub.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    import_published("org/name", tmp_path / "out", revision="v1")
    assert asked == [("org/name", "v1")]
    assert content(tmp_path / "out") == content(tmp_path / "hub")


def test_nothing_is_left_of_what_cannot_be_taken(marian, tmp_path):
    import_published(marian, tmp_path / "whole")
    (tmp_path / "whole" / "target.spm").unlink()
    with pytest.raises(InteropError, match="holds no tokeniser: target.spm is missing"):
        import_published(tmp_path / "whole", tmp_path / "out")
    with pytest.raises(InteropError, match="whole is not empty"):
        import_published(marian, tmp_path / "whole")
    assert {x.name for x in tmp_path.iterdir()} == {"marian", "whole"}
