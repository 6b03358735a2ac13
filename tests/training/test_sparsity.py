import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax import training
from qkv_jax.training import (
    FinetuneConfig,
    LoraConfig,
    MeshConfig,
    OptimizerConfig,
    RunError,
    SparsityConfig,
    TrainingConfig,
    check_sparsity,
    make_mesh,
    new_masks,
    restore_masks,
    restore_params,
)
from qkv_jax.training.sparsity import next_masks, zeros_share
from tests.training import toy

HOW = SparsityConfig(final=0.5, start=1, end=5, every=2, parameters=("head.kernel",))


def zeros(params):
    return float((params["head"]["kernel"] == 0).mean())


def test_the_share_follows_the_cubic_schedule():
    found = [float(HOW.share(n)) for n in (0, 1, 3, 5, 9)]
    np.testing.assert_allclose(found, [0, 0, 0.5 * (1 - 0.5**3), 0.5, 0.5], atol=1e-6)


def test_the_smallest_weights_go_and_never_come_back():
    weights = {"head": {"kernel": jnp.array([[3.0, -1.0], [0.5, -2.0]])}}
    masks = new_masks(weights, HOW)
    choose = jax.jit(lambda m, w, n: next_masks(m, w, n, HOW))
    assert choose(masks, weights, 4)["head.kernel"].all()  # Not a time to choose.
    masks = choose(masks, weights, 5)
    np.testing.assert_array_equal(masks["head.kernel"], [[1, 0], [0, 1]])
    assert zeros_share(masks) == 0.5
    grown = {"head": {"kernel": jnp.array([[0.1, 9.0], [9.0, 0.1]])}}
    np.testing.assert_array_equal(
        choose(masks, grown, 5)["head.kernel"], [[1, 0], [0, 1]]
    )


def test_weights_go_by_schedule_and_stay_0_whatever_the_optimizer(tmp_path):
    shares = []

    def callback(step, state, metrics):
        shares.append((zeros(state.params), zeros(state.ema)))
        np.testing.assert_allclose(metrics["sparsity"], shares[-1][0], atol=1e-6)

    optimizer = OptimizerConfig(
        name="adamw", weight_decay=0.1, peak_lr=0.05, warmup_steps=1
    )
    result = toy.run(
        tmp_path, steps=7, sparsity=HOW, optimizer=optimizer, callbacks=[callback]
    )
    ones = [(0.0, 0.0)] * 3
    np.testing.assert_allclose(
        shares, ones + [(24 / 55, 24 / 55)] * 2 + [(28 / 55, 28 / 55)] * 2
    )
    assert not (np.asarray(result.state.params["embed"]) == 0).any()
    read = restore_params(tmp_path, toy.params(), step="latest")
    assert zeros(read) == shares[-1][0]


def test_resumed_masks_are_the_same_bits(tmp_path):
    straight = toy.run(tmp_path / "a", steps=6, sparsity=HOW)

    class Stop(Exception):
        pass

    def stop(step, state, metrics):
        if step == 4:
            raise Stop

    with pytest.raises(Stop):
        toy.run(tmp_path / "b", steps=6, sparsity=HOW, callbacks=[stop])
    iterator = toy.Batches()
    resumed = toy.run(tmp_path / "b", steps=6, sparsity=HOW, iterator=iterator)
    assert iterator.position == 6
    toy.assert_same_bits(resumed.state, straight.state)
    assert not resumed.state.masks["head.kernel"].all()


def test_a_mask_from_another_run_stays_as_it_is(tmp_path):
    first = toy.run(tmp_path / "a", steps=6, sparsity=HOW)
    masks = restore_masks(tmp_path / "a", toy.params())
    np.testing.assert_array_equal(
        masks["head.kernel"], first.state.masks["head.kernel"]
    )
    fixed = SparsityConfig(rewind=2)
    second = toy.run(tmp_path / "b", steps=2, sparsity=fixed, masks=masks)
    found = np.asarray(second.state.params["head"]["kernel"]) != 0
    np.testing.assert_array_equal(found, masks["head.kernel"])
    toy.run(tmp_path / "dense", steps=1)
    assert restore_masks(tmp_path / "dense", toy.params()) is None
    with pytest.raises(RunError, match="holds no checkpoint"):
        restore_masks(tmp_path / "none", toy.params())


@pytest.mark.parametrize(
    "changes",
    [{"final": 0.8}, {"start": 3}, {"end": 3}, {"every": 4}, {"parameters": ("*",)}],
)
def test_each_field_changes_which_weights_are_0(changes):
    params = {"head": {"kernel": toy.params()["head"]["kernel"]}}
    if "parameters" in changes:
        params["embed"] = toy.params()["embed"]

    def history(how):
        masks, found = new_masks(params, how), []
        choose = jax.jit(lambda m, n: next_masks(m, params, n, how))
        for n in range(6):
            masks = choose(masks, n)
            found.append({name: m.tolist() for name, m in masks.items()})
        return found

    assert history(HOW) != history(dataclasses.replace(HOW, **changes))


def test_a_mesh_changes_nothing():
    def update(**sizes):
        mesh = make_mesh(MeshConfig(**sizes))
        optimizer = training.make_optimizer(
            OptimizerConfig(peak_lr=0.1, warmup_steps=1), 9
        )
        how = dataclasses.replace(HOW, start=0, end=1, every=1)
        state = training.create_state(
            toy.params(), optimizer, seed=0, mesh=mesh, sparsity=how
        )
        step = training.make_train_step(
            toy.dry_loss_fn, optimizer, mesh=mesh, sparsity=how
        )
        for seed in (0, 1):
            placed = training.place_batch(toy.batch(seed), mesh)
            state, _ = step(state, placed)
        return jax.device_get(state.params)

    one, eight = update(data=1), update(data=8)
    assert zeros(one) == zeros(eight) > 0.4
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), one, eight
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SparsityConfig(final=1.0), r"final must be in \(0, 1\)"),
        (lambda: SparsityConfig(start=3), "start must be 0: it is of final"),
        (lambda: SparsityConfig(final=0.5, rewind=3), "final must be None: a ticket's"),
        (lambda: SparsityConfig(rewind=-1), "rewind must not be negative"),
        (lambda: SparsityConfig(final=0.5, every=7), "every must divide end - start"),
        (lambda: SparsityConfig(final=0.5, start=1000), "start must be in 0 .. end"),
        (lambda: SparsityConfig(final=0.5, parameters=()), "at least one pattern"),
        (
            lambda: new_masks(
                toy.params(), SparsityConfig(final=0.5, parameters=("head.bias",))
            ),
            "'head.bias', which is no matrix",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("changes", "finetune", "message"),
    [
        ({"steps": 5}, {}, "sparsity.end must be less than training.steps"),
        ({"average": 2, "checkpoint_every": 1}, {}, "training.average must be 1"),
        ({"patience": 2}, {}, "training.patience must be None"),
        ({}, {"lora": LoraConfig(rank=2)}, "lora adds a change to them"),
    ],
)
def test_what_does_not_fit_a_run_is_refused(changes, finetune, message):
    config = TrainingConfig(**({"steps": 9} | changes))
    with pytest.raises(ValueError, match=message):
        check_sparsity(HOW, config, FinetuneConfig(**finetune))
