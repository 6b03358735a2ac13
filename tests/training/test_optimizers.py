from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from qkv_jax.layers import init_rngs
from qkv_jax.models.seq2seq import Config, Model
from qkv_jax.training import (
    MeshConfig,
    OptimizerConfig,
    abstract_state,
    averaged_params,
    load_params,
    make_mesh,
    make_optimizer,
    make_schedule,
)
from qkv_jax.training.optimizers import MEANT_FOR, Name
from tests.training import toy

# schedule, options, {step (1 = the first update): learning rate}, by hand.
SCHEDULES = [
    ("inverse_sqrt", {}, {1: 0.25, 2: 0.5, 4: 1.0, 16: 0.5, 64: 0.25}),
    ("constant", {}, {1: 0.25, 4: 1.0, 5: 1.0, 100: 1.0}),
    ("linear", {}, {2: 0.5, 4: 1.0, 12: 0.5, 20: 0.0, 30: 0.0}),
    ("linear", {"final_fraction": 0.2}, {4: 1.0, 12: 0.6, 20: 0.2}),
    ("cosine", {}, {4: 1.0, 8: 0.5 + 0.5**1.5, 12: 0.5, 20: 0.0}),
    ("cosine", {"final_fraction": 0.1}, {4: 1.0, 12: 0.55, 20: 0.1}),
    ("constant", {"warmup_steps": 0}, {1: 1.0, 7: 1.0}),
    ("linear", {"warmup_steps": 0}, {1: 0.95, 10: 0.5, 20: 0.0}),
]


@pytest.mark.parametrize(("name", "options", "expected"), SCHEDULES)
def test_schedule_has_the_values_worked_out_by_hand(name, options, expected):
    options = {"warmup_steps": 4, "peak_lr": 2.0} | options
    schedule = make_schedule(OptimizerConfig(schedule=name, **options), 20)
    for step, fraction in expected.items():
        np.testing.assert_allclose(schedule(step - 1), 2.0 * fraction, atol=1e-6)


def test_first_adam_update_is_the_learning_rate_against_the_gradient():
    config = OptimizerConfig(peak_lr=0.4, warmup_steps=4, eps=1e-20)
    optimizer = make_optimizer(config, 10)
    params = {"w": jnp.array([1.0, 2.0])}
    updates, _ = optimizer.update({"w": jnp.array([3.0, -7.0])}, optimizer.init(params))
    np.testing.assert_allclose(updates["w"], [-0.1, 0.1], rtol=1e-6)


def test_clipping_bounds_the_global_norm():
    loose, tight = (
        make_optimizer(OptimizerConfig(warmup_steps=1, clip_norm=norm, eps=1.0), 10)
        for norm in (100.0, 1.0)
    )
    params = {"a": jnp.zeros(2), "b": jnp.zeros((1, 1))}
    grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}  # norm 5
    fifth = jax.tree.map(lambda g: g / 5, grads)
    expected, _ = loose.update(fifth, loose.init(params))
    clipped, _ = tight.update(grads, tight.init(params))
    np.testing.assert_allclose(clipped["a"], expected["a"], rtol=1e-6)
    np.testing.assert_allclose(clipped["b"], expected["b"], rtol=1e-6)
    unclipped, _ = loose.update(grads, loose.init(params))
    assert abs(float(unclipped["a"][0])) > 1.2 * abs(float(expected["a"][0]))


def test_weight_decay_spares_vectors():
    config = OptimizerConfig(
        name="adamw", weight_decay=0.5, peak_lr=0.1, warmup_steps=1
    )
    optimizer = make_optimizer(config, 10)
    params = {"kernel": jnp.full((2, 3), 4.0), "scale": jnp.full(3, 4.0)}
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["kernel"], 4.0 - 0.1 * 0.5 * 4.0, rtol=1e-6)
    np.testing.assert_array_equal(params["scale"], 4.0)


@pytest.mark.parametrize("kv_heads, each_head", [(None, False), (1, False), (1, True)])
def test_muon_orthogonalises_the_layers_matrices_and_nothing_else(kv_heads, each_head):
    sizes = {"d_model": 16, "d_ff": 24, "heads": 2, "kv_heads": kv_heads}
    layers = {"encoder_layers": 1, "decoder_layers": 1}
    model = Model(Config(vocabulary=9, **sizes, **layers), rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), params)
    config = OptimizerConfig(
        name="muon", peak_lr=0.5, warmup_steps=1, each_head=each_head
    )
    optimizer = make_optimizer(config, 10)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    seen = set()
    for path, update in nnx.to_flat_state(updates):
        kernel = path[-1] == "kernel"
        value = np.asarray(update[...])
        # What a layer writes to the model's width has that as its last axis.
        last = path[-2] in ("out", "down")
        if kernel:
            parts = [value]
            if each_head and value.ndim == 3:
                parts = np.moveaxis(value, 0 if last else 1, 0)
            for part in parts:
                matrix = part.reshape((-1, 16) if last else (16, -1)) / 0.5
                assert np.sqrt((matrix**2).mean()) == pytest.approx(0.2, rel=0.2)
                singular = np.linalg.svd(matrix, compute_uv=False)
                assert singular.max() < 4 * singular.min()  # of its gradient: over 10
        else:  # Adam's first update (with Nesterov's momentum) has one size for all
            assert np.ptp(abs(value)) < 1e-3
        seen.add((kernel, last))
    assert seen >= {(True, True), (True, False), (False, True), (False, False)}


def test_muon_takes_plain_arrays_of_two_axes_for_matrices():
    config = OptimizerConfig(
        name="muon", peak_lr=0.5, warmup_steps=1, weight_decay=0.5, clip_norm=1.0
    )
    optimizer = make_optimizer(config, 10)
    params = {"kernel": jnp.eye(4), "scale": jnp.ones(4)}
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.25 * jnp.eye(4), atol=1e-6)
    np.testing.assert_array_equal(updates["scale"], 0.0)


NAMES = get_args(Name)
FLAT = {"warmup_steps": 1, "schedule": "constant"}
OTHER = {"b1": 0.5, "b2": 0.7, "eps": 0.1, "momentum": 0.5, "each_head": True}
OTHER |= {"weight_decay": 0.1}


def updated(**options):
    """A kernel (D, N, H) and a bias (D,) after three updates by drawn gradients."""
    optimizer = make_optimizer(OptimizerConfig(**FLAT, **options), 10)
    rng = np.random.default_rng(0)

    def draw():
        kernel, bias = (
            jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((4, 2, 3), 4)
        )
        axes = ("embed", "heads", "head_dim")
        return {"kernel": nnx.Param(kernel, axes=axes), "bias": bias}

    params = draw()
    state = optimizer.init(params)
    for _ in range(3):
        updates, state = optimizer.update(draw(), state, params)
        params = optax.apply_updates(params, updates)
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)])


@pytest.mark.parametrize("field", MEANT_FOR)
@pytest.mark.parametrize("name", NAMES)
def test_a_field_matters_or_is_refused(name, field):
    change = {"name": name, field: OTHER[field]}
    if name in MEANT_FOR[field]:
        assert np.any(updated(**change) != updated(name=name))
    else:
        with pytest.raises(ValueError, match=f"{field} needs name=.* got '{name}'"):
            OptimizerConfig(**FLAT, **change)


def test_the_first_update_of_lion_is_the_rate_against_the_sign():
    config = OptimizerConfig(name="lion", peak_lr=0.1, **FLAT)
    optimizer, params = make_optimizer(config, 10), {"w": jnp.ones(3)}
    grads = {"w": jnp.array([3.0, -1e-4, 0.0])}
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_allclose(updates["w"], [-0.1, 0.1, 0.0], rtol=1e-6)


def test_adafactor_keeps_rows_and_columns_and_moves_by_the_size_of_a_parameter():
    optimizer = make_optimizer(
        OptimizerConfig(name="adafactor", peak_lr=0.1, **FLAT), 10
    )
    rng = np.random.default_rng(0)
    size = (128, 160)
    params = {"w": jnp.asarray(rng.normal(size=size) * 5.0, jnp.float32)}
    rows, columns = rng.uniform(0.1, 2.0, size[0]), rng.uniform(0.1, 2.0, size[1])
    signs = rng.choice([-1.0, 1.0], size)
    grads = {"w": jnp.asarray(rows[:, None] * columns * signs, jnp.float32)}
    state = optimizer.init(params)
    assert sum(x.size for x in jax.tree.leaves(state)) < 2 * sum(size)
    updates, _ = optimizer.update(grads, state, params)
    moved = 0.1 * np.sqrt(np.mean(params["w"] ** 2))
    np.testing.assert_allclose(updates["w"], -moved * signs, rtol=1e-4)


def test_schedule_free_evaluates_the_average_of_its_iterates():
    """The recursion of the paper's equations 3 to 5, with AdamW's step, in float64."""
    config = OptimizerConfig(
        name="schedule_free", peak_lr=0.1, b1=0.8, weight_decay=0.5, **FLAT
    )
    optimizer = make_optimizer(config, 10)
    x = z = y = np.array([[1.0, -2.0]])
    params, square = jnp.asarray(y, jnp.float32), 0.0
    state = optimizer.init(params)
    for step in range(1, 5):
        gradient = np.array([[0.3, -0.2]]) * step + y
        square = 0.98 * square + 0.02 * gradient**2
        scaled = gradient / (np.sqrt(square / (1 - 0.98**step)) + 1e-9)
        z = z - 0.1 * (scaled + 0.5 * y)
        x = x + (z - x) / step
        y = 0.8 * x + 0.2 * z
        found = jnp.asarray(gradient, jnp.float32)
        updates, state = optimizer.update(found, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params, y, rtol=1e-4)
        np.testing.assert_allclose(averaged_params(state, params), x, rtol=1e-4)


@pytest.mark.parametrize("name", ["adafactor", "schedule_free"])
def test_a_run_goes_on_with_the_same_bits(name, tmp_path):
    config = OptimizerConfig(name=name, peak_lr=0.05, clip_norm=1.0, **FLAT)
    options = {"optimizer": config, "ema_decay": None}
    straight = toy.run(tmp_path / "a", **options)
    toy.run(tmp_path / "b", **options, steps=2)
    toy.assert_same_bits(toy.run(tmp_path / "b", **options).state, straight.state)
    losses = [row["train/loss"] for row in straight.history]
    assert losses[-1] < losses[0]


def test_the_average_is_what_is_evaluated_kept_and_loaded(tmp_path):
    seen = []

    def evaluate(params):
        seen.append(np.asarray(params["embed"]))
        return {"loss": -float(len(seen))}

    config = OptimizerConfig(name="schedule_free", peak_lr=0.05, **FLAT)
    result = toy.run(tmp_path, optimizer=config, ema_decay=None, evaluate=evaluate)
    state = result.state
    average = averaged_params(state.opt_state, state.params)["embed"]
    assert np.any(seen[-1] != np.asarray(state.params["embed"]))
    np.testing.assert_allclose(seen[-1], average, rtol=1e-5)
    for checkpoint in ("best", "latest"):
        loaded = load_params(tmp_path, toy.params(), checkpoint=checkpoint)
        np.testing.assert_array_equal(loaded["embed"], seen[-1])
    with pytest.raises(ValueError, match="ema_decay must be None for name='schedule_"):
        toy.run(tmp_path / "other", optimizer=config, ema_decay=0.9)


@pytest.mark.parametrize("name", NAMES)
def test_states_lie_where_their_parameters_do(name):
    config = Config(
        vocabulary=160, d_model=128, d_ff=256, encoder_layers=1, decoder_layers=1
    )
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    state = abstract_state(
        lambda: nnx.state(Model(config, rngs=init_rngs(0)), nnx.Param),
        make_optimizer(OptimizerConfig(name=name, **FLAT), 10),
        mesh=mesh,
    )

    def held(tree):
        return sum(
            np.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree)
        )

    copies = {"lion": 1.0, "muon": 1.1, "adafactor": 0.5}.get(name, 2.0)
    assert held(state.opt_state) == pytest.approx(copies * held(state.params), rel=0.25)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "schedule_free"}, "needs schedule='constant'"),
        (
            {"name": "schedule_free", "schedule": "constant", "b1": 0.0},
            "b1 must be positive for name='schedule_free'",
        ),
        ({"name": "sgd"}, "name must be"),
        ({"schedule": "step"}, "schedule must be"),
        ({"peak_lr": 0.0}, "peak_lr must be positive"),
        ({"warmup_steps": -1}, "warmup_steps must not be negative"),
        ({"warmup_steps": 0}, "at least 1 for the schedule 'inverse_sqrt'"),
        ({"final_fraction": 0.1}, "no meaning for the schedule 'inverse_sqrt'"),
        (
            {"final_fraction": 2.0, "schedule": "cosine"},
            r"final_fraction must be in \[0, 1\]",
        ),
        ({"b2": 1.0}, "b2 must be in"),
        ({"momentum": -0.1}, "momentum must be in"),
        ({"eps": 0.0}, "eps must be positive"),
        ({"weight_decay": 0.1}, "needs name='adamw'"),
        ({"weight_decay": -0.1, "name": "adamw"}, "weight_decay must not be negative"),
        ({"clip_norm": 0.0}, "clip_norm must be positive"),
        ({"each_head": True}, "each_head needs name='muon'; got 'adam'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**options)


def test_a_warm_up_longer_than_a_decaying_run_is_an_error():
    with pytest.raises(ValueError, match="less than the 10 steps"):
        make_schedule(OptimizerConfig(schedule="linear", warmup_steps=10), 10)
