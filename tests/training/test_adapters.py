import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from qkv_jax.training import (
    FinetuneConfig,
    LoraConfig,
    MeshConfig,
    OptimizerConfig,
    RunError,
    abstract_state,
    average_params,
    checkpoint_steps,
    count_params,
    create_state,
    make_mesh,
    make_optimizer,
    make_train_step,
    merge_params,
    place_batch,
    restore_params,
    split_params,
)
from tests.training import toy

FROZEN = FinetuneConfig(freeze=("embed", "*.bias"))
LORA = FinetuneConfig(lora=LoraConfig(rank=2, alpha=6.0, kernels=("head.*kernel",)))
WET = FinetuneConfig(lora=LoraConfig(rank=2, dropout=0.4, kernels=("head.kernel",)))
BOTH = pytest.mark.parametrize("finetune", [FROZEN, WET], ids=["frozen", "lora"])
NET = FinetuneConfig(lora=LoraConfig(rank=2, alpha=6.0, kernels=("*.kernel", "table")))
ONE = make_mesh(MeshConfig(data=1))


class Net(nnx.Module):
    """A table, and kernels of three axes as those of attention."""

    def __init__(self):
        rngs, general = nnx.Rngs(0), nnx.LinearGeneral
        table = jax.random.normal(rngs.params(), (toy.VOCAB, 8)).at[0].set(0.0)
        self.table = nnx.Param(table, axes=("vocab", "embed"))
        query, out = ("embed", "heads", "head_dim"), ("heads", "head_dim", "embed")
        self.query = general(8, (4, 3), kernel_metadata={"axes": query}, rngs=rngs)
        self.out = general(
            (4, 3), 8, axis=(-2, -1), kernel_metadata={"axes": out}, rngs=rngs
        )

    def __call__(self, tokens):
        x = self.table[...][tokens]
        return (x + self.out(jnp.tanh(self.query(x)))) @ self.table[...].T


def net_params():
    return nnx.state(Net(), nnx.Param)


def net_loss(params, batch, rng):
    del rng
    logits = nnx.merge(nnx.graphdef(Net()), params)(batch["source"])
    real = (batch["target"] > 0).astype(jnp.float32)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["target"])
    loss = (nll * real).sum()
    return loss, {"loss_sum": loss, "tokens": real.sum()}


def trained(params, loss_fn, finetune, *, optimizer=None, steps=3, mesh=ONE, **options):
    """The state after some steps, and the losses on the way."""
    optimizer = optimizer or optax.adam(0.05)
    state = create_state(params, optimizer, seed=5, mesh=mesh, finetune=finetune)
    step = make_train_step(loss_fn, optimizer, mesh=mesh, finetune=finetune, **options)
    losses = []
    for seed in range(steps):
        batch = place_batch(toy.batch(seed), mesh)
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return state, losses


def merged(state, finetune):
    return merge_params(state.params, state.constant, finetune)


def numpy_of(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_frozen_parameters_keep_their_bits_and_cost_no_moments(name):
    config = OptimizerConfig(name=name, peak_lr=0.05, warmup_steps=1, weight_decay=0.1)
    optimizer = make_optimizer(config, 10)
    state, _ = trained(toy.params(), toy.loss_fn, FROZEN, optimizer=optimizer)
    after, before = merged(state, FROZEN), toy.params()
    toy.assert_same_bits(after["embed"], before["embed"])
    toy.assert_same_bits(after["head"]["bias"], before["head"]["bias"])
    assert not np.isclose(after["head"]["kernel"], before["head"]["kernel"]).any()
    moments = [x.shape for x in jax.tree.leaves(state.opt_state) if x.ndim > 1]
    assert moments and set(moments) == {before["head"]["kernel"].shape}


def test_what_is_left_trains_as_it_would_alone():
    frozen, losses = trained(toy.params(), toy.loss_fn, FROZEN)
    whole = toy.params()

    def loss_fn(kernel, batch, rng):
        head = {"kernel": kernel, "bias": whole["head"]["bias"]}
        return toy.loss_fn({"embed": whole["embed"], "head": head}, batch, rng)

    alone, wanted = trained(whole["head"]["kernel"], loss_fn, None)
    assert losses == pytest.approx(wanted, rel=1e-6)
    found = frozen.params["head"]["kernel"]
    np.testing.assert_allclose(found, alone.params, rtol=1e-5)


@pytest.mark.parametrize("finetune", [LORA, WET])
def test_the_first_loss_with_adapters_is_that_of_the_model(finetune):
    _, losses = trained(toy.params(), toy.loss_fn, finetune)
    _, wanted = trained(toy.params(), toy.loss_fn, None)
    assert losses[0] == wanted[0] and losses[1] != wanted[1]


def test_only_adapters_move_and_merged_they_are_the_same_model():
    state, _ = trained(toy.params(), toy.dry_loss_fn, LORA)
    toy.assert_same_bits(state.constant, toy.params())
    assert [x.shape for x in jax.tree.leaves(state.params)] == [(5, 2), (2, 11)]
    adapter = numpy_of(state.params["head"]["kernel"])
    params = numpy_of(toy.params())
    params["head"]["kernel"] += 6.0 / 2 * adapter.lora_a @ adapter.lora_b
    whole = merged(state, LORA)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5), whole, params
    )
    wanted = toy.loss_fn(whole, toy.batch(9), None)[1]
    step = make_train_step(toy.dry_loss_fn, optax.adam(1.0), mesh=ONE, finetune=LORA)
    metrics = step(state, place_batch(toy.batch(9), ONE))[1]
    loss = float(wanted["loss_sum"] / wanted["tokens"])
    assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-6)


def test_the_gradient_of_b_is_that_of_the_kernel_seen_through_a():
    state, _ = trained(
        toy.params(), toy.dry_loss_fn, LORA, optimizer=optax.sgd(1.0), steps=1
    )
    first = split_params(toy.params(), LORA, seed=5)[0]["head"]["kernel"]
    batch = toy.batch(0)
    grads, sums = jax.grad(toy.loss_fn, has_aux=True)(toy.params(), batch, None)
    kernel = np.asarray(grads["head"]["kernel"]) / float(sums["tokens"])
    adapter = state.params["head"]["kernel"]
    np.testing.assert_allclose(
        adapter.lora_b, -3.0 * np.asarray(first.lora_a).T @ kernel, rtol=1e-4, atol=1e-6
    )
    # As B was 0, A had no gradient.
    np.testing.assert_allclose(adapter.lora_a, first.lora_a, rtol=1e-6)


def test_kernels_of_three_axes_are_matrices_from_inputs_to_outputs():
    state, losses = trained(net_params(), net_loss, NET)
    assert losses[2] < losses[0]
    query, out = state.params["query"]["kernel"], state.params["out"]["kernel"]
    assert query.lora_a.get_metadata()["axes"] == ("embed", "rank")
    assert query.lora_b.get_metadata()["axes"] == ("rank", "heads", "head_dim")
    assert (out.lora_a.shape, out.lora_b.shape) == ((4, 3, 2), (2, 8))
    whole, before = merged(state, NET), net_params()
    assert jax.tree.structure(whole) == jax.tree.structure(before)
    for name, rule in [("query", "DR,RNH->DNH"), ("out", "NHR,RD->NHD")]:
        adapter = numpy_of(state.params[name]["kernel"])
        change = np.einsum(rule, *jax.tree.leaves(adapter))
        wanted = np.asarray(before[name]["kernel"][...]) + 3.0 * change
        np.testing.assert_allclose(whole[name]["kernel"][...], wanted, rtol=1e-5)


def test_an_adapter_of_a_table_leaves_rows_without_a_gradient_alone():
    def loss_fn(params, batch, rng):
        del rng
        x = params["table"][...][batch["source"]]
        return (x**2).sum(), {"loss_sum": (x**2).sum(), "tokens": jnp.float32(1)}

    table = jnp.ones((50, 8)).at[0].set(0.0)
    params = {"table": nnx.Param(table, axes=("vocab", "embed"))}
    finetune = FinetuneConfig(lora=LoraConfig(rank=2, kernels=("table",)))
    state, _ = trained(params, loss_fn, finetune)  # tokens 1 to 10
    after = np.asarray(merged(state, finetune)["table"][...])
    assert (after[0] == 0).all() and (after[11:] == 1).all()
    assert (after[1:11] != 1).any(axis=1).all()


def test_dropout_of_adapters_drops_inputs_and_scales_the_others():
    state, _ = trained(toy.params(), toy.loss_fn, WET)
    before = np.asarray(toy.params()["head"]["kernel"])
    change = np.asarray(merged(state, WET)["head"]["kernel"]) - before
    ratios = []
    for seed in range(40):
        dropped = merge_params(
            state.params, state.constant, WET, rng=jax.random.key(seed)
        )
        rows = (np.asarray(dropped["head"]["kernel"]) - before) / change
        np.testing.assert_allclose(
            rows, rows[:, :1] * np.ones(11), rtol=1e-2, atol=1e-3
        )
        ratios += list(rows[:, 0])
    near = np.isclose(np.array(ratios)[:, None], [0, 1 / 0.6], atol=0.01)
    assert near.any(axis=1).all() and near.any(axis=0).all()
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.15)


def test_muon_takes_the_factors_for_matrices():
    config = OptimizerConfig(name="muon", peak_lr=0.1, warmup_steps=1)
    optimizer = make_optimizer(config, 10)
    state, _ = trained(net_params(), net_loss, NET, optimizer=optimizer, steps=1)
    first = split_params(net_params(), NET, seed=5)[0]
    for name in ("query", "out"):
        after, before = state.params[name]["kernel"], first[name]["kernel"]
        change = np.asarray(after.lora_b[...] - before.lora_b[...]).reshape(2, -1)
        values = np.linalg.svd(change, compute_uv=False)
        assert (
            values[1] > 0.5 * values[0]
        )  # all directions alike, whatever the gradient's


MESHES = [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1, "fsdp": 8}]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("finetune", [NET, FinetuneConfig(freeze=("out.*", "table"))])
def test_a_mesh_changes_nothing(sizes, finetune):
    mesh = make_mesh(MeshConfig(**sizes))
    # A large eps: where the gradient is 0 but for rounding, Adam would make that a whole step.
    options = {"optimizer": optax.adam(0.05, eps=1e-3), "accumulate": 2}
    found, losses = trained(net_params, net_loss, finetune, mesh=mesh, **options)
    wanted, others = trained(net_params, net_loss, finetune, **options)
    assert losses == pytest.approx(others, rel=1e-5)
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(compare, found.params, wanted.params)
    jax.tree.map(compare, merged(found, finetune), merged(wanted, finetune))
    planned = abstract_state(
        net_params, options["optimizer"], mesh=mesh, finetune=finetune
    )
    places = jax.tree.map(
        lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim), found, planned
    )
    assert all(jax.tree.leaves(places))


def test_parameters_in_host_memory_are_placed_and_stay_as_they_were():
    given = jax.tree.map(lambda x: np.array(x), net_params())
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    state, _ = trained(given, net_loss, NET, mesh=mesh)
    toy.assert_same_bits(given, net_params())
    toy.assert_same_bits(state.constant, net_params())
    kernel = state.constant["query"]["kernel"][...]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(4, 2, 3)}
    factor = state.params["query"]["kernel"].lora_b[...]
    assert {shard.data.shape for shard in factor.addressable_shards} == {(2, 2, 3)}


class Stop(Exception):
    pass


def stop(step, state, metrics):
    if step == 2:
        raise Stop


@BOTH
def test_resumed_training_ends_with_the_same_bits_whatever_it_is_given(
    tmp_path, finetune
):
    options = {"finetune": finetune, "evaluate": lambda params: {"loss": 1.0}}
    straight = toy.run(tmp_path / "a", **options)
    with pytest.raises(Stop):
        toy.run(tmp_path / "b", **options, callbacks=[stop])
    elsewhere = jax.tree.map(jnp.zeros_like, toy.params())
    resumed = toy.run(tmp_path / "b", **options, params=elsewhere)
    toy.assert_same_bits(resumed.state, straight.state)
    assert checkpoint_steps(tmp_path / "b") == [1, 2, 3, 4]


@BOTH
def test_evaluation_and_restoring_see_the_same_plain_parameters(tmp_path, finetune):
    seen = []
    evaluate = lambda params: (
        seen.append(jax.device_get(params)) or {"loss": -len(seen)}
    )
    state = toy.run(tmp_path, steps=3, evaluate=evaluate, finetune=finetune).state
    like = jax.eval_shape(toy.params)
    restored = restore_params(tmp_path, like, finetune=finetune)
    toy.assert_same_bits(restored, seen[-1])
    toy.assert_same_bits(restored, merge_params(state.ema, state.constant, finetune))
    mean = average_params(tmp_path, like, count=2, finetune=finetune)
    jax.tree.map(
        lambda m, x, y: np.testing.assert_allclose(m, (x + y) / 2, rtol=1e-6),
        mean,
        *seen[1:],
    )
    with pytest.raises(RunError, match="is of another model or optimizer"):
        restore_params(tmp_path, like)


def test_constant_parameters_are_kept_once_and_a_loss_of_them_is_named(tmp_path):
    toy.run(tmp_path, steps=3, finetune=LORA)
    like = jax.eval_shape(toy.params)
    constant = tmp_path / "checkpoints" / "constant"
    shutil.rmtree(constant)
    with pytest.raises(RunError, match="constant is missing, .* all checkpoints"):
        restore_params(tmp_path, like, finetune=LORA)
    with pytest.raises(RunError, match="constant is missing, .* all checkpoints"):
        toy.run(tmp_path, steps=4, finetune=LORA)
    assert checkpoint_steps(tmp_path) == [1, 2, 3]  # none is taken for damaged


def test_a_new_run_keeps_nothing_of_one_that_ended_before_its_first_checkpoint(
    tmp_path,
):
    toy.run(tmp_path, steps=1, finetune=FROZEN)
    shutil.rmtree(tmp_path / "checkpoints" / "1")
    ones = jax.tree.map(jnp.ones_like, toy.params())
    toy.run(tmp_path, steps=1, finetune=FROZEN, params=ones)
    restored = restore_params(tmp_path, ones, finetune=FROZEN)
    toy.assert_same_bits(restored["embed"], ones["embed"])


@pytest.mark.parametrize(
    ("finetune", "numbers"),
    [
        (None, (121, 121)),
        (FinetuneConfig(), (121, 121)),
        (FROZEN, (55, 121)),
        (LORA, (5 * 2 + 2 * 11, 121 + 32)),
    ],
)
def test_counts(finetune, numbers):
    assert count_params(jax.eval_shape(toy.params), finetune) == numbers


def test_counts_are_shown_as_a_share():
    assert str(count_params(toy.params(), FROZEN)) == "55 of 121 (45.45%)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"freeze": ("embd",)},
            r"'embd', which matches no parameter; near it: 'embed'",
        ),
        ({"freeze": ("haed.*",)}, r"near it: 'head\.\*'"),
        ({"freeze": ("embed", "head.*")}, "leaves none of the 3 parameters to train"),
        (
            {"lora": LoraConfig(rank=8)},
            r"lora.kernels .*'\*.query.kernel', which matches no",
        ),
        (
            {"lora": LoraConfig(rank=2, kernels=("head.*",))},
            r"'head.bias' of shape \(11,\), which is no matrix",
        ),
        (
            {"lora": LoraConfig(rank=6, kernels=("embed",))},
            "rank must not exceed the sides of 'embed', 11 and 5; got 6",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_an_error_before_any_step(options, message):
    finetune = FinetuneConfig(**options)
    with pytest.raises(ValueError, match=message):
        count_params(jax.eval_shape(toy.params), finetune)
    with pytest.raises(ValueError, match=message):
        create_state(toy.params(), optax.sgd(1.0), seed=0, mesh=ONE, finetune=finetune)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoraConfig(rank=0), "rank must be at least 1"),
        (lambda: LoraConfig(alpha=0.0), "alpha must be positive"),
        (lambda: LoraConfig(dropout=1.0), "dropout must be in"),
        (lambda: LoraConfig(rank=2, kernels=()), "kernels must have at least one"),
        (lambda: FinetuneConfig(freeze="encoder.*"), "must be a tuple of patterns"),
        (
            lambda: FinetuneConfig(freeze=("a",), lora=LoraConfig(rank=8)),
            "freeze must be empty",
        ),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
