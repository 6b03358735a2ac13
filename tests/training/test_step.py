import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qkv_jax.training import (
    MeshConfig,
    create_state,
    evaluate_loss,
    make_eval_step,
    make_mesh,
    make_train_step,
    place_state,
)
from tests.training import toy

ONE_DEVICE = MeshConfig(data=1)
SGD = optax.sgd(1.0)  # the update is the gradient


def one_step(loss_fn, batch, *, mesh=None, optimizer=SGD, seed=0, **options):
    mesh = make_mesh(mesh)
    ema = "ema_decay" in options
    state = create_state(toy.params(), optimizer, seed=seed, mesh=mesh, ema=ema)
    return make_train_step(loss_fn, optimizer, mesh=mesh, **options)(state, batch)


def test_gradient_is_that_of_the_mean_over_real_tokens():
    batch = toy.batch(3)

    def mean(params):
        loss, sums = toy.loss_fn(params, batch, None)
        return loss / sums["tokens"]

    loss, expected = jax.value_and_grad(mean)(toy.params())
    state, metrics = one_step(toy.dry_loss_fn, batch)
    found = jax.tree.map(lambda a, b: a - b, toy.params(), state.params)
    chex.assert_trees_all_close(found, expected, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(
        metrics["grad_norm"], optax.tree.norm(expected), rtol=1e-5
    )
    assert metrics["tokens"] == (batch["target"] > 0).sum()


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_equals_the_whole_batch_on_ragged_rows(accumulate):
    batch = toy.batch(3, rows=64)
    whole, one = one_step(toy.dry_loss_fn, batch)
    parts, many = one_step(toy.dry_loss_fn, batch, accumulate=accumulate)
    chex.assert_trees_all_close(parts.params, whole.params, atol=1e-6)
    chex.assert_trees_all_close(many, one, rtol=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_all_devices_equal_one(accumulate):
    batch = toy.batch(4)
    one, _ = one_step(toy.dry_loss_fn, batch, mesh=ONE_DEVICE, accumulate=accumulate)
    all_, _ = one_step(toy.dry_loss_fn, batch, accumulate=accumulate)
    chex.assert_trees_all_close(one.params, jax.device_get(all_.params), atol=1e-6)


def test_dropout_differs_between_steps_seeds_and_microbatches():
    rows = toy.batch(4, rows=8)
    twice = {name: np.repeat(x, 2, axis=0) for name, x in rows.items()}
    runs = [one_step(toy.loss_fn, rows, mesh=ONE_DEVICE, seed=seed) for seed in (0, 1)]
    assert runs[0][1]["loss"] != runs[1][1]["loss"]
    _, parts = one_step(toy.loss_fn, twice, mesh=ONE_DEVICE, accumulate=2)
    assert parts["loss"] != runs[0][1]["loss"]
    step = make_train_step(toy.loss_fn, optax.sgd(0.0), mesh=make_mesh(ONE_DEVICE))
    state = create_state(
        toy.params(), optax.sgd(0.0), seed=0, mesh=make_mesh(ONE_DEVICE)
    )
    state, first = step(state, rows)
    assert first["loss"] != step(state, rows)[1]["loss"]


def test_moving_average_follows_the_parameters():
    state, _ = one_step(toy.dry_loss_fn, toy.batch(1), ema_decay=0.99)
    start = toy.params()  # at the first update the decay is capped at 1/10
    expected = jax.tree.map(lambda a, b: 0.1 * a + 0.9 * b, start, state.params)
    chex.assert_trees_all_close(state.ema, expected, atol=1e-6)


def test_batch_of_padding_changes_nothing():
    batch = toy.batch(1)
    batch["target"][:] = 0
    state, metrics = one_step(toy.loss_fn, batch)
    chex.assert_trees_all_equal(jax.device_get(state.params), toy.params())
    assert metrics["loss"] == metrics["tokens"] == 0


def test_equal_shapes_are_traced_once_and_the_state_is_donated():
    mesh = make_mesh()
    loss_fn = chex.assert_max_traces(toy.loss_fn, n=1)
    step = make_train_step(loss_fn, SGD, mesh=mesh)
    first = state = create_state(toy.params(), SGD, seed=0, mesh=mesh)
    for seed in range(3):
        state, _ = step(state, toy.batch(seed))
    assert jax.tree.leaves(first.params)[0].is_deleted()
    assert state.step == 3


def test_schedule_is_reported_for_the_update_made():
    _, metrics = one_step(toy.loss_fn, toy.batch(1), schedule=lambda n: 0.5 + n)
    assert metrics["learning_rate"] == 0.5


def test_evaluation_is_deterministic_and_weights_tokens_not_batches():
    mesh = make_mesh()
    step = make_eval_step(toy.loss_fn, mesh=mesh)
    params = place_state(toy.params(), mesh)
    batches = [toy.batch(1), toy.batch(2, length=3)]
    result = evaluate_loss(step, params, batches, mesh=mesh)
    sums = [toy.loss_fn(toy.params(), batch, None)[1] for batch in batches]
    loss, tokens = (sum(float(s[k]) for s in sums) for k in ("loss_sum", "tokens"))
    np.testing.assert_allclose(result["loss"], loss / tokens, rtol=1e-6)
    assert result == evaluate_loss(step, params, batches, mesh=mesh)
    with pytest.raises(ValueError, match="at least one batch"):
        evaluate_loss(step, params, [], mesh=mesh)


def test_rows_that_do_not_divide_are_an_error():
    with pytest.raises(ValueError, match="3 rows, which accumulate=2"):
        one_step(toy.loss_fn, toy.batch(1, rows=3), mesh=ONE_DEVICE, accumulate=2)


def test_parameters_can_be_made_under_jit():
    mesh = make_mesh()
    one = create_state(toy.params, SGD, seed=0, mesh=mesh)
    other = create_state(toy.params(), SGD, seed=0, mesh=mesh)
    toy.assert_same_bits(one, other)
    assert one.step.dtype == jnp.int32
