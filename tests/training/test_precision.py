import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from qkv_jax.models import gat, recurrent, seq2seq, vit
from qkv_jax.ops import index_bits
from qkv_jax.training import (
    FinetuneConfig,
    LoraConfig,
    MeshConfig,
    OptimizerConfig,
    PrecisionConfig,
    RunError,
    TrainingConfig,
    abstract_state,
    apply_precision,
    check_optimizer,
    create_state,
    make_mesh,
    make_train_step,
    precision,
    restore_params,
)
from qkv_jax.training.precision import keep_params, stochastic_round, widen
from qkv_jax.translation.loss import make_loss
from qkv_jax.translation.models import init_params
from tests.jaxprs import equations
from tests.training import toy

ONE = MeshConfig(data=1)
STOCHASTIC, KAHAN, NEAREST = (
    dataclasses.replace(precision.bf16(how), compute=None)
    for how in ("stochastic", "kahan", "nearest")
)
SCALED = PrecisionConfig(loss_scale=2.0**10, growth_interval=3)


def half_loss_fn(params, batch, rng):
    """The toy's, with its product in float16."""
    del rng
    x = params["embed"][batch["source"]].astype(jnp.float16)
    logits = x @ params["head"]["kernel"].astype(jnp.float16)
    logp = jax.nn.log_softmax(logits.astype(jnp.float32))
    real = (batch["target"] > 0).astype(jnp.float32)
    nll = -jnp.take_along_axis(logp, batch["target"][..., None], axis=-1)[..., 0]
    loss = (nll * real).sum()
    return loss, {"loss_sum": loss, "tokens": real.sum()}


def started(loss_fn, policy, *, optimizer=None, params=toy.params, **options):
    mesh, optimizer = make_mesh(ONE), optimizer or optax.adam(0.05)
    shared = {"mesh": mesh, "precision": policy}
    state = create_state(params, optimizer, seed=0, **shared, **options)
    return make_train_step(loss_fn, optimizer, **shared, **options), state


def dtypes(tree):
    return {str(x.dtype) for x in jax.tree.leaves(tree) if x.ndim}


@pytest.mark.parametrize("value", [1.001, -3.3e-5, 2.0 - 2**-9 + 1e-5, 1e-39, 0.1])
def test_stochastic_rounding_gives_a_neighbour_and_on_average_the_number(value):
    x = jnp.full((200, 500), value, jnp.float32)
    found = np.asarray(stochastic_round(x, jnp.uint32(7)), np.float64)
    low, high = np.unique(found)
    exact = float(x[0, 0])
    assert low < exact < high
    step = np.float32(low).view(np.uint32).astype(np.int64)
    assert abs(np.float32(high).view(np.uint32) - step) == 1 << 16
    # Six standard deviations of the mean of 100,000 draws.
    assert abs(found.mean() - exact) < 6 * (high - low) / 2 / np.sqrt(found.size)


def test_stochastic_rounding_leaves_what_bfloat16_can_tell():
    x = jnp.array([0.0, 1.5, -(2.0**-120), jnp.inf, -jnp.inf, jnp.nan])
    seeds = jnp.arange(50, dtype=jnp.uint32)
    found = jax.vmap(stochastic_round, (None, 0))(x, seeds)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        np.asarray(found, np.float32), np.broadcast_to(x, (50, 6))
    )


def test_random_bits_of_places_are_even_and_differ_by_seed_and_place():
    bits = np.asarray(index_bits(jnp.uint32(3), (64, 5, 31)))
    ones = np.unpackbits(bits.view(np.uint8)).mean()
    assert abs(ones - 0.5) < 6 * 0.5 / np.sqrt(bits.size * 32)
    assert len(np.unique(bits)) == bits.size
    assert not np.any(bits == np.asarray(index_bits(jnp.uint32(4), (64, 5, 31))))


@pytest.mark.parametrize(
    "policy, least, most",
    [(NEAREST, 1.0, 1.0), (KAHAN, 1.249, 1.251), (STOCHASTIC, 1.15, 1.35)],
    ids=["nearest", "kahan", "stochastic"],
)
def test_small_updates_add_up_but_where_the_nearest_is_taken(policy, least, most):
    def update(kept, i):
        params = jax.tree.map(lambda x: x + 2.0**-12, widen(*kept))
        return keep_params(policy, params, jax.random.fold_in(rng, i)), None

    rng = jax.random.key(0, impl="threefry2x32")
    start = keep_params(policy, {"w": jnp.ones(4)}, None)
    (params, _), _ = jax.lax.scan(update, start, jnp.arange(1024))
    assert params["w"].dtype == jnp.bfloat16
    found = np.asarray(params["w"], np.float32)
    assert np.all((least <= found) & (found <= most))


@pytest.mark.parametrize(
    "policy, params, moments, lost",
    [
        (PrecisionConfig(), "float32", "float32", None),
        (NEAREST, "bfloat16", "float32", None),
        (STOCHASTIC, "bfloat16", "bfloat16", None),
        (KAHAN, "bfloat16", "float32", "bfloat16"),
        (
            PrecisionConfig(moments="bfloat16", rounding="stochastic"),
            "float32",
            "bfloat16",
            None,
        ),
    ],
    ids=["float32", "nearest", "stochastic", "kahan", "moments"],
)
def test_each_policy_keeps_what_it_says_and_learns(policy, params, moments, lost):
    step, state = started(toy.dry_loss_fn, policy)
    losses = []
    for _ in range(8):
        state, metrics = step(state, toy.batch(1))
        losses.append(float(metrics["loss"]))
    assert dtypes(state.params) == {params}
    assert dtypes(state.opt_state) == {moments}
    assert (lost and {lost}) == (state.precision and dtypes(state.precision.lost))
    chex.assert_trees_all_equal_shapes(state.params, toy.params())
    assert losses[-1] < 0.9 * losses[0]


def test_gradients_are_float32_and_so_is_what_the_loss_is_given():
    seen = []

    def loss_fn(params, batch, rng):
        seen.append(dtypes(params))
        return toy.dry_loss_fn(params, batch, rng)

    step, state = started(loss_fn, STOCHASTIC, optimizer=optax.sgd(0.0))
    first = keep_params(NEAREST, toy.params(), None)[0]
    after, metrics = step(state, toy.batch(1))
    assert seen == [{"float32"}]
    chex.assert_trees_all_equal(after.params, first)  # Nothing was added.
    grads = jax.grad(lambda p: toy.dry_loss_fn(p, toy.batch(1), None)[0])(widen(first))
    tokens = (toy.batch(1)["target"] > 0).sum()
    np.testing.assert_allclose(
        metrics["grad_norm"], optax.tree.norm(grads) / tokens, rtol=1e-5
    )


def test_a_scaled_loss_has_the_same_gradients():
    """Clipping included, which must see them unscaled.

    Scaling by a power of two is exact; but these are two programs, and whether the compiler joins a
    product and a sum into one rounding may differ between them.
    """
    clipped = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(1.0))
    found = {}
    for policy in (PrecisionConfig(), SCALED):
        mesh = make_mesh(ONE)
        step, state = started(toy.dry_loss_fn, policy, optimizer=clipped)
        step = make_train_step(
            toy.dry_loss_fn, clipped, mesh=mesh, precision=policy, accumulate=2
        )
        state, found[policy] = step(state, toy.batch(3))
        found[policy]["params"] = state.params
    scaled, plain = found[SCALED], found[PrecisionConfig()]
    assert scaled.pop("loss_scale") == 2.0**10
    chex.assert_trees_all_close(scaled, plain, rtol=1e-6, atol=1e-7)


def test_an_overflow_skips_the_update_and_the_scale_recovers():
    policy = PrecisionConfig(loss_scale=2.0**24, growth_interval=4)
    step, state = started(half_loss_fn, policy)
    before = jax.device_get(state.params)
    scales, skipped = [], []
    for _ in range(16):
        state, metrics = step(state, toy.batch(1))
        scales.append(float(metrics["loss_scale"]))
        skipped.append(bool(metrics["skipped"]))
        if all(skipped):
            chex.assert_trees_all_equal(jax.device_get(state.params), before)
    overflows = skipped.index(False)
    assert 2 <= overflows <= 10
    assert scales[: overflows + 1] == [2.0 ** (24 - i) for i in range(overflows + 1)]
    grown = scales[
        overflows : overflows + 5
    ]  # Four finite updates, then twice as much.
    assert grown[:4] == [grown[0]] * 4 and grown[4] == 2 * grown[0]
    assert optax.tree.norm(optax.tree.sub(state.params, before)) > 0.1


def test_a_forced_overflow_in_the_midst_of_a_run_halves_the_scale_once(tmp_path):
    class Poisoned(toy.Batches):
        def __next__(self):
            rows = super().__next__()
            return rows | {"bad": np.full(16, self.position == 3, np.float32)}

    def loss_fn(params, batch, rng):
        loss, sums = toy.dry_loss_fn(params, batch, rng)
        return loss * jnp.where(batch["bad"].max() > 0, jnp.inf, 1.0), sums

    result = toy.run(
        tmp_path,
        steps=5,
        loss_fn=loss_fn,
        iterator=Poisoned(),
        precision=dataclasses.replace(SCALED, growth_interval=100),
    )
    rows = [row for row in result.history if "train/loss" in row]
    assert [row["train/loss_scale"] for row in rows] == [1024, 1024, 512, 512]
    assert result.state.precision.loss_scale == 512
    assert result.state.precision.finite_steps == 2


@pytest.mark.parametrize(
    "policy",
    [dataclasses.replace(STOCHASTIC, loss_scale=8.0, growth_interval=3), KAHAN],
    ids=["stochastic", "kahan"],
)
def test_a_resumed_run_has_the_same_bits(policy, tmp_path):
    straight = toy.run(tmp_path / "straight", precision=policy)
    toy.run(tmp_path / "parts", steps=2, precision=policy)
    resumed = toy.run(tmp_path / "parts", precision=policy)
    assert resumed.step == 4 and len(resumed.history) == len(straight.history)
    toy.assert_same_bits(resumed.state, straight.state)
    if policy.loss_scale:
        assert resumed.state.precision.loss_scale == 16.0


def test_weights_of_a_run_in_bfloat16_are_read_as_float32(tmp_path):
    seen = []

    def evaluate(params):
        seen.append(dtypes(params))
        return {"loss": 1.0}

    options = {"precision": STOCHASTIC, "ema_decay": None, "evaluate": evaluate}
    result = toy.run(tmp_path, steps=1, **options)
    assert dtypes(result.state.params) == {"bfloat16"} and seen == [{"float32"}]
    found = restore_params(tmp_path, toy.params())
    chex.assert_trees_all_equal(found, widen(result.state.params))
    assert dtypes(found) == {"float32"}
    with pytest.raises(RunError, match="another precision .* bfloat16 there, float32"):
        toy.run(tmp_path, steps=2, ema_decay=None)


@pytest.mark.parametrize("ema", [False, True])
def test_averages_are_float32(ema):
    options = {"mesh": make_mesh(ONE), "precision": KAHAN}
    state = create_state(toy.params(), optax.sgd(0.1), seed=0, ema=ema, **options)
    decay = 0.9 if ema else None
    step = make_train_step(toy.loss_fn, optax.sgd(0.1), ema_decay=decay, **options)
    state, _ = step(state, toy.batch(1))
    assert dtypes(state.ema) == ({"float32"} if ema else set())


@pytest.mark.parametrize(
    "finetune",
    [
        FinetuneConfig(freeze=("head.*",)),
        FinetuneConfig(lora=LoraConfig(rank=2, kernels=("head.kernel",))),
    ],
    ids=["freeze", "lora"],
)
def test_what_is_not_trained_stays_float32(finetune):
    step, state = started(toy.dry_loss_fn, KAHAN, finetune=finetune)
    constant = jax.device_get(state.constant)
    state, _ = step(state, toy.batch(1))
    assert dtypes(state.params) == dtypes(state.precision.lost) == {"bfloat16"}
    assert dtypes(state.constant) == {"float32"}
    chex.assert_trees_all_equal(jax.device_get(state.constant), constant)


def test_what_rounding_lost_lies_where_its_parameter_does():
    def params():
        return {"w": nnx.Param(jnp.ones((8, 4)), axes=("embed", "ff"))}

    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
    state = abstract_state(params, optax.adam(1.0), mesh=mesh, precision=KAHAN)
    (kept,), (lost,) = map(jax.tree.leaves, (state.params, state.precision.lost))
    assert lost.sharding == kept.sharding and not kept.sharding.is_fully_replicated


def test_a_mesh_rounds_alike():
    x = jax.random.normal(jax.random.key(0), (8, 6))
    mesh = make_mesh()
    split = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
    rounded = jax.jit(stochastic_round)
    np.testing.assert_array_equal(
        rounded(split, jnp.uint32(1)), rounded(x, jnp.uint32(1))
    )


SMALL = seq2seq.Config(
    vocabulary=13,
    d_model=8,
    d_ff=12,
    heads=2,
    encoder_layers=1,
    decoder_layers=1,
    dropout=0.1,
    attention_dropout=0.1,
)
SUMS = {"exp", "exp2", "log", "rsqrt", "sqrt", "cumsum", "scatter-add", "argmax"}


@pytest.mark.parametrize("dtype, norm", [("bfloat16", "pre"), ("float16", "post")])
def test_softmax_norms_loss_and_reductions_are_float32(dtype, norm):
    config = dataclasses.replace(SMALL, dtype=dtype, norm=norm)
    loss, batch = make_loss(config, 0.1), toy_rows()
    gradient = jax.grad(lambda p: loss(p, batch, jax.random.key(0))[0])
    params = jax.eval_shape(functools.partial(init_params, config, seed=0))
    half = products = 0
    for equation in equations(jax.make_jaxpr(gradient)(params).jaxpr):
        name = equation.primitive.name
        low = [x for x in equation.invars if str(x.aval.dtype) == dtype]
        half += bool(low) and (name.startswith("reduce_") or name in SUMS)
        products += bool(low) and name == "dot_general"
    assert products > 20 and not half


def toy_rows():
    tokens = np.random.default_rng(0).integers(3, 13, (2, 4, 5)).astype(np.int32)
    return dict(zip(("source", "target"), tokens))


def program(field, policy):
    """What a policy makes of a model's loss, or of the toy's step, as text; nothing is compiled."""
    if field in ("compute", "output"):
        config = apply_precision(SMALL, policy)
        params = jax.eval_shape(functools.partial(init_params, config, seed=0))
        loss = functools.partial(make_loss(config, 0.0), rng=None)
        return str(jax.make_jaxpr(loss)(params, toy_rows()))
    step, state = started(toy.dry_loss_fn, policy)
    return step.lower(state, toy.batch(1)).as_text()


# Another value for every field, and what it needs beside it.
FLIPS = {
    "params": ({}, "bfloat16"),
    "compute": ({}, "bfloat16"),
    "output": ({}, "bfloat16"),
    "moments": ({"params": "bfloat16", "rounding": "stochastic"}, "bfloat16"),
    "rounding": ({"params": "bfloat16"}, "kahan"),
    "loss_scale": ({}, 16.0),
    "growth_interval": ({"loss_scale": 8.0}, 7),
}


def test_every_field_has_another_value_to_try():
    assert set(FLIPS) == {field.name for field in dataclasses.fields(PrecisionConfig)}


@pytest.mark.parametrize("field", FLIPS)
def test_every_field_changes_the_program(field):
    beside, value = FLIPS[field]
    policy = PrecisionConfig(**beside)
    flipped = dataclasses.replace(policy, **{field: value})
    assert program(field, policy) == program(field, policy) != program(field, flipped)


def test_the_first_scale_is_that_of_the_state():
    for scale in (8.0, 16.0):
        state = started(half_loss_fn, PrecisionConfig(loss_scale=scale))[1]
        assert state.precision.loss_scale == scale


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"params": "float16"}, "params must be one of .*; got 'float16'"),
        ({"rounding": "up"}, "rounding must be one of .*; got 'up'"),
        ({"rounding": "stochastic"}, "needs params='bfloat16' or moments='bfloat16'"),
        ({"rounding": "kahan"}, "'kahan' needs params='bfloat16'"),
        ({"moments": "bfloat16"}, "needs rounding='stochastic': .* got 'nearest'"),
        (
            {"params": "bfloat16", "moments": "bfloat16", "rounding": "kahan"},
            "needs rounding='stochastic': .* got 'kahan'",
        ),
        ({"compute": "float16"}, "compute 'float16' needs precision.loss_scale"),
        (
            {"compute": "bfloat16", "loss_scale": 8.0},
            "loss_scale is of float16 and compute is 'bfloat16'",
        ),
        ({"loss_scale": 0.5}, "loss_scale must be in 1 .. 16777216, or None; got 0.5"),
        ({"growth_interval": 3}, "growth_interval is of loss_scale: give it too"),
        (
            {"growth_interval": 0, "loss_scale": 8.0},
            "growth_interval must be at least 1; got 0",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(fields, message):
    with pytest.raises(ValueError, match=message):
        PrecisionConfig(**fields)


@pytest.mark.parametrize(
    "model, fields, message",
    [
        (seq2seq.tiny(dtype="bfloat16"), {"compute": "float32"}, "say it in one place"),
        (
            seq2seq.tiny(output_dtype="float32"),
            {"output": "bfloat16"},
            "precision.output is 'bfloat16', and model.output_dtype is 'float32'",
        ),
        (gat.Config(), {"compute": "bfloat16"}, "models.gat has no dtype to choose"),
        (recurrent.Config(), {"output": "float32"}, "recurrent has no output_dtype"),
        (seq2seq.tiny(dtype="float16"), {}, "'float16' needs precision.loss_scale"),
        (seq2seq.tiny(), {"loss_scale": 8.0}, "model.dtype is 'float32'"),
    ],
)
def test_a_model_and_a_policy_may_not_contradict_each_other(model, fields, message):
    with pytest.raises(ValueError, match=message):
        apply_precision(model, PrecisionConfig(**fields))


def test_a_policy_says_what_a_model_computes_in():
    found = apply_precision(
        seq2seq.tiny(), dataclasses.replace(precision.float16(), output="float32")
    )
    assert (found.dtype, found.output_dtype) == ("float16", "float32")
    assert apply_precision(vit.Config(), precision.mixed_bf16()).dtype == "bfloat16"
    own = seq2seq.tiny(dtype="bfloat16")
    assert apply_precision(own, PrecisionConfig()) is own
    assert apply_precision(own, precision.bf16()) is own
    assert apply_precision(gat.Config(), precision.float32()) == gat.Config()


def test_an_average_of_all_iterates_is_not_kept_in_bfloat16():
    free = OptimizerConfig(name="schedule_free", schedule="constant")
    with pytest.raises(
        ValueError, match="moments must be 'float32' for name='schedule"
    ):
        check_optimizer(free, TrainingConfig(steps=3), STOCHASTIC)
    check_optimizer(free, TrainingConfig(steps=3), KAHAN)
