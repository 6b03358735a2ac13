import jax
import numpy as np
import pytest

from qkv_jax.training import (
    MeshConfig,
    logical_sharding,
    make_mesh,
    place_batch,
    place_state,
)

DEVICES = jax.device_count()


def test_default_mesh_takes_all_devices():
    assert make_mesh().shape == {"data": DEVICES}
    assert make_mesh(MeshConfig(data=1)).shape == {"data": 1}


def test_more_devices_than_there_are_is_an_error_with_both_numbers():
    with pytest.raises(ValueError, match=rf"asks for 999 .* there are {DEVICES}"):
        make_mesh(MeshConfig(data=999))
    with pytest.raises(ValueError, match="data must be a positive number"):
        MeshConfig(data=0)


def test_batch_rows_are_split_and_the_state_is_whole_everywhere():
    mesh = make_mesh()
    rows = np.arange(DEVICES * 6).reshape(DEVICES * 2, 3)
    placed = place_batch({"source": rows}, mesh)["source"]
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(placed, rows)
    state = place_state({"w": rows}, mesh)
    assert {shard.data.shape for shard in state["w"].addressable_shards} == {rows.shape}


def test_rows_that_do_not_divide_are_an_error_with_the_numbers():
    mesh = make_mesh()
    rows = np.zeros((DEVICES * 2 + 1, 2))
    with pytest.raises(
        ValueError, match=rf"'x'.* has {DEVICES * 2 + 1} rows.*{DEVICES * 2} rows"
    ):
        place_batch({"x": rows}, mesh, accumulate=2)


def test_unknown_logical_axis_is_an_error():
    with pytest.raises(
        ValueError, match="unknown logical axis 'colour'; known: batch, "
    ):
        logical_sharding(make_mesh(), "colour")
