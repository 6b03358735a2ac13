import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from qkv_jax.ops import pin
from qkv_jax.training import (
    MeshConfig,
    auto_mesh,
    batch_shares,
    logical_sharding,
    make_mesh,
    place_batch,
    place_state,
)

DEVICES = jax.device_count()


def param(*shape, axes):
    return nnx.Param(jnp.zeros(shape), axes=axes)


def spec(variable, **sizes):
    mesh = make_mesh(MeshConfig(**sizes))
    placed = place_state({"w": variable}, mesh)["w"][...]
    return placed.sharding.spec


def test_default_mesh_takes_all_devices():
    whole = {"fsdp": 1, "context": 1, "tensor": 1}
    assert make_mesh().shape == {"data": DEVICES} | whole
    assert make_mesh(MeshConfig(data=1)).shape == {"data": 1} | whole


def test_one_axis_takes_the_devices_that_are_left():
    mesh = make_mesh(MeshConfig(data=2, fsdp=-1, tensor=2))
    assert mesh.shape == {"data": 2, "fsdp": 2, "context": 1, "tensor": 2}
    assert mesh.axis_types == (AxisType.Auto,) * 4
    assert batch_shares(mesh) == 4


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"data": 999}, rf"asks for 999 devices \(data 999\); there are {DEVICES}"),
        ({"tensor": 3}, rf"\(tensor 3\) do not divide the {DEVICES} devices.*'data'"),
        (
            {"data": 4, "tensor": 4},
            rf"asks for 16 devices \(data 4 x tensor 4\); there are {DEVICES}",
        ),
        ({"data": 0}, "data must be a positive number"),
        ({"context": -2}, "context must be a positive number.*got -2"),
        ({"fsdp": -1}, "only one axis can be -1.*got data and fsdp"),
    ],
)
def test_a_mesh_that_does_not_fit_is_an_error_with_the_numbers(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(MeshConfig(**sizes))


def test_batch_rows_are_split_over_data_and_fsdp():
    rows = np.arange(16 * 3).reshape(16, 3)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    placed = place_batch({"source": rows}, mesh)["source"]
    assert {shard.data.shape for shard in placed.addressable_shards} == {(4, 3)}
    np.testing.assert_array_equal(placed, rows)


def test_rows_that_do_not_divide_are_an_error_with_the_numbers():
    mesh = make_mesh()
    rows = np.zeros((DEVICES * 2 + 1, 2))
    with pytest.raises(
        ValueError, match=rf"'x'.* has {DEVICES * 2 + 1} rows.*{DEVICES * 2} rows"
    ):
        place_batch({"x": rows}, mesh, accumulate=2)


def test_parameters_lie_where_the_names_of_their_axes_say():
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    kernel = param(8, 4, 3, axes=("embed", "heads", "head_dim"))
    assert spec(kernel, **sizes) == PartitionSpec("fsdp", "tensor", None)
    assert spec(kernel) == PartitionSpec(None, None, None)
    assert spec(param(8, axes=("embed",)), **sizes) == PartitionSpec(None)
    assert spec(param(8, axes=("ff",)), **sizes) == PartitionSpec("tensor")


def test_key_heads_and_a_vocabulary_that_do_not_divide_stay_whole():
    table = param(7, 8, axes=("vocab", "embed"))
    assert spec(table, fsdp=2, tensor=4, data=1) == PartitionSpec(None, "fsdp")
    keys = param(8, 1, 3, axes=("embed", "kv_heads", "head_dim"))
    assert spec(keys, fsdp=2, tensor=4, data=1) == PartitionSpec("fsdp", None, None)


def test_heads_that_the_mesh_does_not_divide_are_an_error_with_both_numbers():
    kernel = param(8, 6, 3, axes=("embed", "heads", "head_dim"))
    with pytest.raises(ValueError, match="'heads' into 4 parts.* size of 6 .*'?tensor"):
        spec(kernel, tensor=4, data=2)
    with pytest.raises(ValueError, match="'embed' into 8 parts.* size of 6 .*'?fsdp"):
        spec(param(6, 8, axes=("embed", "ff")), fsdp=8, data=1)


def test_plain_arrays_lie_whole_everywhere():
    rows = np.arange(DEVICES * 6).reshape(DEVICES * 2, 3)
    state = place_state({"w": rows}, make_mesh())
    assert {shard.data.shape for shard in state["w"].addressable_shards} == {rows.shape}


def test_unknown_logical_axis_is_an_error():
    with pytest.raises(
        ValueError, match="unknown logical axis 'colour'; known: batch, "
    ):
        logical_sharding(make_mesh(), "colour")


def test_a_pinned_array_lies_as_its_names_say_within_a_mesh_and_nothing_happens_without():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, context=2))
    x = jnp.ones((8, 6, 3))
    run = jax.jit(lambda x: pin(x, "batch", "length") * 2)
    assert run(x).sharding.is_fully_replicated
    with jax.set_mesh(mesh):
        assert run(x).sharding.spec == PartitionSpec(("data", "fsdp"), "context")
        # 5 does not divide, and stays whole
        assert run(x[:, :5]).sharding.spec == PartitionSpec(("data", "fsdp"))


def test_a_mesh_of_explicit_axes_becomes_one_that_the_partitioner_may_use():
    explicit = jax.make_mesh((2, 4), ("data", "tensor"), (AxisType.Explicit,) * 2)
    mesh = auto_mesh(explicit)
    assert mesh.axis_types == (AxisType.Auto,) * 2
    assert mesh.shape == explicit.shape
