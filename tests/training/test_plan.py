import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from qkv_jax.training import MeshConfig, logical_sharding, make_mesh
from qkv_jax.training.plan import (
    HARDWARE,
    Collective,
    Estimate,
    Plan,
    collectives,
    device_bytes,
    this_machine,
)

KB = 1000
PLAN = Plan(
    devices=4,
    tokens=1000,
    flops=8e15,
    held={"parameters": 2 * KB, "activations": 3 * KB},
    read=3.35e12,
    collectives={"all-reduce": Collective(count=2, bytes=9e9)},
    dtype="bfloat16",
)
# As XLA prints them, shortened.
LOOP = """HloModule jit_step, is_scheduled=true

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %g = f32[64]{0} all-gather(%x), replica_groups={{0,1,2,3}}, dimensions={0}
}

%branch_one (p: f32[4]) -> f32[4] {
  %s = f32[10]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %r = (f32[8]{0}, bf16[16]{0}) all-reduce(%a, %b), replica_groups=[1,8]<=[8], to_apply=%add
  %w = (s32[], f32[4]) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %c = f32[4] conditional(%i, %y), branch_computations={%branch_one}
}
"""


def test_collectives_in_loops_count_as_often_as_they_run():
    found = collectives(LOOP)
    assert found["all-gather"] == Collective(count=3, bytes=3 * 64 * 4 * 3 / 4)
    assert found["all-reduce"] == Collective(count=1, bytes=64 * 2 * 7 / 8)
    assert found["collective-permute"] == Collective(count=1, bytes=40)


def test_the_collectives_of_a_compiled_program_are_found():
    mesh = make_mesh(MeshConfig(data=2, tensor=4))
    x = jax.ShapeDtypeStruct(
        (8, 64), jnp.float32, sharding=logical_sharding(mesh, "batch", "ff")
    )
    whole = logical_sharding(mesh, "batch")
    # The sum over "ff" is over 4 devices, of (4, 1) floats each.
    summed = jax.jit(lambda x: x.sum(1, keepdims=True), out_shardings=whole)
    found = collectives(summed.lower(x).compile().as_text())
    assert found == {"all-reduce": Collective(count=1, bytes=2 * 3 / 4 * 16)}
    gathered = jax.jit(lambda x: x + 1, out_shardings=whole)
    found = collectives(gathered.lower(x).compile().as_text())
    assert found == {"all-gather": Collective(count=1, bytes=4 * 64 * 4 * 3 / 4)}


def test_bytes_are_those_of_one_device():
    mesh = make_mesh(MeshConfig(data=2, tensor=4))
    split = jax.device_put(
        np.zeros((8, 64), np.float32), logical_sharding(mesh, "batch", "ff")
    )
    whole = jax.device_put(np.zeros(3, np.float32), logical_sharding(mesh))
    assert split.sharding.spec == PartitionSpec("data", "tensor")
    assert device_bytes({"a": split, "b": whole}) == 4 * 16 * 4 + 12


def test_an_estimate_is_the_slowest_of_its_parts():
    h100 = HARDWARE[0]
    found = PLAN.estimate(h100)
    assert found == Estimate(compute=8e15 / 4 / 989e12, memory=1.0, network=0.02)
    assert found.bound == "compute"
    assert found.seconds == found.compute == pytest.approx(2.02, rel=1e-2)
    assert PLAN.bytes == 5 * KB


def test_a_plan_is_json():
    content = json.loads(json.dumps(PLAN.to_json()))
    h100 = content["estimates"]["H100"]
    assert h100["fits"] and h100["bound"] == "compute"
    assert h100["tokens_per_second"] == pytest.approx(1000 / 2.022, rel=1e-3)
    assert set(content["estimates"]) == {hardware.name for hardware in HARDWARE}


def test_this_machine_is_measured():
    found = this_machine(size=64, seconds=0.01)
    assert found.f32 > 1e6 and found.memory > 1e6
