import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from experiments.translation import multi30k
from experiments.translation.multi30k import CONFIG
from qkv_jax.models import seq2seq
from qkv_jax.training import (
    MeshConfig,
    RunError,
    create_state,
    make_mesh,
    make_optimizer,
)
from qkv_jax.translation.loss import make_loss
from qkv_jax.translation.models import init_params
from qkv_jax.translation.plan import plan_run, show_plan
from tests.jaxprs import equations


def small(**mesh):
    model = dataclasses.replace(
        CONFIG.model, d_model=32, d_ff=48, heads=4, encoder_layers=1, decoder_layers=1
    )
    text = dataclasses.replace(
        CONFIG.text, vocabulary=88, batch_tokens=128, max_source=12, max_target=16
    )
    return dataclasses.replace(CONFIG, model=model, text=text, mesh=MeshConfig(**mesh))


def test_heads_that_ulysses_cannot_share_out_are_an_error():
    config = small(data=1, context=4, tensor=2)
    model = dataclasses.replace(config.model, context="ulysses")
    with pytest.raises(RunError, match="mesh: ulysses .* 2 query heads .* 4 devices"):
        plan_run(dataclasses.replace(config, model=model))


def products(jaxpr):
    """Floating-point operations of all products in a jaxpr without loops."""
    total = 0.0
    for equation in equations(jaxpr):
        if equation.primitive.name == "dot_general":
            ((contracted, _), _) = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            size = equation.outvars[0].aval.size
            for axis in contracted:
                size *= left[axis]
            total += 2.0 * size
    return total


@pytest.mark.parametrize("changes", [{}, {"kv_heads": 1, "gated": True, "heads": 2}])
def test_flops_are_those_of_the_products(changes):
    config = dataclasses.replace(seq2seq.tiny(vocabulary=120), d_model=16, **changes)
    B, S, T = 2, 9, 7
    batch = {
        "source": jnp.ones((B, S), jnp.int32),
        "target": jnp.ones((B, T), jnp.int32),
    }
    params = jax.eval_shape(lambda: init_params(config, seed=0))
    jaxpr = jax.make_jaxpr(
        lambda p, b: jax.grad(make_loss(config, 0.1), has_aux=True)(p, b, None)
    )(params, batch)
    counted = products(jaxpr.jaxpr)
    formula = seq2seq.train_flops(config, rows=B, source=S, target=T)
    assert formula == pytest.approx(counted, rel=1e-6)


def shard_bytes(tree):
    """Of one device."""
    device = jax.devices()[0]
    return sum(
        shard.data.nbytes
        for array in jax.tree.leaves(tree)
        for shard in array.addressable_shards
        if shard.device == device
    )


def test_devices_that_share_out_the_model_hold_less_and_send_more():
    one, many = plan_run(small(data=1)), plan_run(small(data=2, fsdp=2, tensor=2))
    assert one.devices == 1 and many.devices == 8
    assert not one.collectives and {"all-gather", "all-reduce"} <= set(many.collectives)
    assert many.held["parameters"] < 0.3 * one.held["parameters"]
    assert many.held["optimizer"] < 0.3 * one.held["optimizer"]
    assert one.flops == many.flops and one.tokens == many.tokens == 128
    # And what is said of the state is what it is given.
    config = small(data=2, fsdp=2, tensor=2)
    state = create_state(
        lambda: init_params(dataclasses.replace(config.model, vocabulary=88), seed=0),
        make_optimizer(config.optimizer, config.training.steps),
        seed=0,
        mesh=make_mesh(config.mesh),
        ema=config.training.ema_decay is not None,
    )
    assert shard_bytes(state.params) == many.held["parameters"]
    assert shard_bytes((state.opt_state, state.ema)) == many.held["optimizer"]
    assert [table.title for table in show_plan(many)][1] == "a device sends in a step"


def test_a_mesh_that_does_not_fit_is_an_error_with_the_numbers():
    with pytest.raises(RunError, match="mesh: the mesh splits 'heads' into 8 parts"):
        plan_run(small(data=1, tensor=8))


def test_plan_prints_tables_of_a_mesh_or_json():
    # A process of its own: it asks for as many devices as the mesh has, before JAX starts.
    command = [sys.executable, "-m", "qkv_jax", "plan"]
    command += [str(multi30k.__file__), "--model.d-model=16"]
    command += ["--model.d-ff=32", "--model.heads=4", "--model.encoder-layers=1"]
    command += ["--model.decoder-layers=1", "--text.vocabulary=88"]
    command += ["--mesh.data=1", "--mesh.fsdp=2", "--mesh.context=2"]

    def run(*more):
        done = subprocess.run(
            [*command, *more], capture_output=True, text=True, check=True
        )
        return done.stdout

    tables = run()
    assert "one of 4 devices holds" in tables
    assert "all-gather" in tables and "H100" in tables and "this machine" not in tables
    plan = json.loads(run("--json"))
    assert plan["devices"] == 4 and plan["estimates"]["H200"]["fits"]
    assert plan["collectives"]["collective-permute"]["bytes"] > 0
