import hashlib
import types

import numpy as np
import pytest

from qkv_jax.training import RunConfig, model_card
from qkv_jax.training.model_card import (
    Power,
    array_digest,
    assumed_power,
    code_version,
    cost,
    duration,
    line_digest,
    numbers,
    table,
)


def devices(monkeypatch, kind: str, count: int) -> None:
    one = types.SimpleNamespace(platform="gpu", device_kind=kind)
    monkeypatch.setattr(model_card.jax, "devices", lambda: [one] * count)
    monkeypatch.setattr(model_card.jax, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("kind", "each"),
    [
        ("NVIDIA H100 80GB HBM3", 700),
        ("NVIDIA L40S", 300),
        ("NVIDIA L4", 72),
        ("?", 200),
    ],
)
def test_power_is_assumed_by_the_kind_of_device(monkeypatch, kind, each):
    devices(monkeypatch, kind, 3)
    watts, method = assumed_power(None)
    assert watts == 3 * each
    assert f"3 x {each} W, assumed for {kind}" in method


def test_power_that_is_given_is_used_and_stated(monkeypatch):
    devices(monkeypatch, "?", 3)
    assert assumed_power(150.0) == Power(150.0, "150 W, as given by --run.watts")
    with pytest.raises(ValueError, match="watts must be positive, or None; got 0"):
        RunConfig(watts=0.0)


def test_processors_count_by_the_cores_in_use(monkeypatch):
    monkeypatch.setattr(model_card, "_cores", lambda: 5)
    assert assumed_power(None).watts == 60


def test_energy_is_power_times_the_time_of_all_parts():
    text = cost(loop=7000.0, rest=200.0, power=Power(500.0, "measured")).text
    assert "| energy, an estimate | 1 kWh |" in text
    assert "| its method | 2 h 00 min x 500 W: measured |" in text
    assert [duration(x) for x in (3.21, 150, 7500)] == ["3.2 s", "2 min", "2 h 05 min"]


def test_code_is_named_by_its_commit_only_where_git_tracks_it(monkeypatch):
    said = {"rev-parse": "ab" * 20, "ls-files": "qkv_jax/__init__.py", "status": ""}
    monkeypatch.setattr(model_card, "_git", lambda root, *words: said[words[0]])
    assert code_version().endswith(f", commit {'ab' * 20}")
    said["status"] = " M qkv_jax/__init__.py"
    assert code_version().endswith(", with changes that are not committed")
    said["ls-files"] = ""
    assert code_version().endswith(", not in a git checkout")


def test_cells_cannot_break_a_table():
    text = table(("a", "b"), [("x | y", "one\ntwo")])
    assert text == "| a | b |\n| --- | --- |\n| x \\| y | one two |"


def test_digests_tell_text_and_arrays_apart(tmp_path):
    (tmp_path / "text").write_bytes("ä\n\nb\n".encode())
    expected = hashlib.sha256((tmp_path / "text").read_bytes()).hexdigest()
    assert line_digest(["ä", "", "b"]) == expected
    arrays = {"b": np.arange(6), "a": np.ones(3, bool)}
    same = {"a": np.ones(3, bool), "b": np.arange(6)}
    assert array_digest(arrays) == array_digest(same)
    for other in ({"b": np.arange(6).reshape(2, 3)}, {"b": np.arange(6.0)}):
        assert array_digest(arrays | other) != array_digest(arrays)


def test_numbers_are_found_at_any_depth():
    values = {"test": {"f1": 0.5, "of": {"n": 3}, "ok": True, "name": "x"}}
    assert numbers(values) == [("test.f1", "0.5"), ("test.of.n", "3")]
