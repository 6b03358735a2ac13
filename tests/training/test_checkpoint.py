import errno

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax.training import (
    CheckpointStore,
    OptimizerConfig,
    RunError,
    average_params,
    checkpoint_steps,
    create_state,
    make_mesh,
    make_optimizer,
    restore_params,
)
from tests.training import toy


def make_state(value=0.0, *, ema=True, clip_norm=None, params=None):
    optimizer = make_optimizer(OptimizerConfig(clip_norm=clip_norm), 10)
    params = jax.tree.map(lambda x: x + value, params or toy.params())
    return create_state(params, optimizer, seed=3, mesh=make_mesh(), ema=ema)


def save(directory, values, *, keep=9, best_step=None, ema=True):
    """A checkpoint of step 1, 2, ... for each value."""
    with CheckpointStore(directory, keep=keep) as store:
        for step, value in enumerate(values, start=1):
            progress = {"best_step": min(step, best_step) if best_step else None}
            store.save(step, make_state(value, ema=ema), progress | {"data": [step]})


def files(directory):
    return {p: p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_round_trip_keeps_every_bit(tmp_path):
    saved = make_state(0.5)
    with CheckpointStore(tmp_path, keep=1) as store:
        assert store.restore(saved) is None
        store.save(7, saved, {"best_step": None, "data": {"position": 12}})
    with CheckpointStore(tmp_path, keep=1) as store:
        restored, progress = store.restore(make_state())
    toy.assert_same_bits(restored, saved)
    assert progress == {"best_step": None, "data": {"position": 12}}
    shardings = jax.tree.map(lambda a, b: a.sharding == b.sharding, restored, saved)
    assert all(jax.tree.leaves(shardings))


def test_small_arrays_that_every_device_has_are_saved_as_they_are(tmp_path, caplog):
    small = {str(rows): jnp.ones((rows, 3)) for rows in (8, 16, 24)}
    large = jnp.arange(8 * 2**18, dtype=jnp.float32)
    state = make_state(params=small | {"large": large}, ema=False)
    with jax.log_compiles(), CheckpointStore(tmp_path, keep=1) as store:
        store.save(1, state, {})
    # Each device slices the large one; for the small ones there would be a program a shape as well.
    assert 1 <= caplog.text.count("Finished XLA compilation") <= 8
    found = restore_params(tmp_path, state.params, step=1)
    toy.assert_same_bits(found, state.params)


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    double = jax.jit(lambda s: jax.tree.map(lambda x: x * 2, s), donate_argnums=0)
    state = make_state(1.0)
    expected = toy.arrays(state.params)
    with CheckpointStore(tmp_path, keep=1) as store:
        store.save(1, state, {})
        for _ in range(5):
            state = double(state)
    restored = restore_params(tmp_path, toy.params(), step=1)
    for name, array in toy.arrays(restored).items():
        np.testing.assert_array_equal(array, expected[name])


def test_last_and_best_stay(tmp_path):
    save(tmp_path, [0.0] * 6, keep=2, best_step=3)
    assert checkpoint_steps(tmp_path) == [3, 5, 6]
    with CheckpointStore(tmp_path, keep=2) as store:
        store.restore(make_state())
        store.save(7, make_state(), {"best_step": 3})
    assert checkpoint_steps(tmp_path) == [3, 6, 7]


def test_parameters_are_restored_without_the_optimizer(tmp_path):
    save(tmp_path, [1.0, 2.0, 3.0], best_step=2, ema=False)
    like = jax.eval_shape(toy.params)
    for step, value in [("best", 2.0), ("latest", 3.0), (1, 1.0)]:
        bias = restore_params(tmp_path, like, step=step)["head"]["bias"]
        np.testing.assert_array_equal(bias, toy.params()["head"]["bias"] + value)
    with pytest.raises(
        RunError, match="no checkpoint of step 9: choose one of 1, 2, 3"
    ):
        restore_params(tmp_path, like, step=9)


def test_the_moving_average_is_what_is_evaluated(tmp_path):
    state = make_state()
    state = jax.tree.map(lambda x: x, state)
    object.__setattr__(state, "ema", jax.tree.map(lambda x: x + 5, state.params))
    with CheckpointStore(tmp_path, keep=1) as store:
        store.save(1, state, {})
    restored = restore_params(tmp_path, toy.params())
    np.testing.assert_array_equal(restored["embed"], toy.params()["embed"] + 5)


def test_average_is_the_mean_of_the_last(tmp_path):
    save(tmp_path, [100.0, 1.0, 4.0], ema=False)
    mean = average_params(tmp_path, toy.params(), count=2)
    np.testing.assert_allclose(mean["embed"], toy.params()["embed"] + 2.5, rtol=1e-6)
    assert mean["embed"].dtype == jnp.float32
    with pytest.raises(RunError, match="holds 3 checkpoints, 4 are to be averaged"):
        average_params(tmp_path, toy.params(), count=4)


def test_a_checkpoint_in_the_making_is_ignored(tmp_path):
    save(tmp_path, [1.0])
    (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir()
    assert checkpoint_steps(tmp_path) == [1]
    assert restore_params(tmp_path, toy.params(), step="latest")


@pytest.mark.parametrize("damage", ["cut", "remove"])
def test_every_damaged_file_is_named_and_nothing_is_deleted(tmp_path, damage):
    save(tmp_path, [1.0])
    checkpoint = tmp_path / "checkpoints" / "1"
    for file, content in files(checkpoint).items():
        needed = file.parent != checkpoint or (damage, file.name) == (
            "cut",
            "files.json",
        )
        if not needed:
            continue
        file.write_bytes(content[: len(content) // 2])
        if damage == "remove":
            file.unlink()
        before = files(tmp_path)
        with pytest.raises(RunError, match=f"{checkpoint} is cut short .*{file.name}"):
            restore_params(tmp_path, toy.params())
        with CheckpointStore(tmp_path, keep=1) as store, pytest.raises(RunError):
            store.restore(make_state())
        assert files(tmp_path) == before
        file.write_bytes(content)


def test_damage_is_an_error_without_the_list_of_sizes_too(tmp_path):
    save(tmp_path, [1.0])
    checkpoint = tmp_path / "checkpoints" / "1"
    (checkpoint / "files.json").unlink()
    assert restore_params(tmp_path, toy.params())
    (checkpoint / "ema" / "_METADATA").write_text("{")
    with pytest.raises(RunError, match="is cut short or damaged"):
        restore_params(tmp_path, toy.params())
    (checkpoint / "progress" / "metadata").unlink()
    with (
        CheckpointStore(tmp_path, keep=1) as store,
        pytest.raises(RunError, match="FileNotFound"),
    ):
        store.restore(make_state())


def test_another_model_or_optimizer_is_named(tmp_path):
    save(tmp_path, [1.0])
    other = toy.params() | {"embed": jnp.zeros((2, 3))}
    with pytest.raises(RunError, match=r"'embed' is \(11, 5\) there, \(2, 3\) here"):
        restore_params(tmp_path, other)
    with (
        CheckpointStore(tmp_path, keep=1) as store,
        pytest.raises(RunError, match="opt_state"),
    ):
        store.restore(make_state(clip_norm=1.0))


def test_no_checkpoint_is_an_error(tmp_path):
    with pytest.raises(RunError, match="holds no checkpoint"):
        restore_params(tmp_path, toy.params())


def test_a_damaged_newest_checkpoint_is_set_aside_for_the_one_before(tmp_path):
    save(tmp_path, [1.0, 0.5])
    parts = (tmp_path / "checkpoints" / "2" / "params").rglob("*")
    largest = max(parts, key=lambda path: path.stat().st_size * path.is_file())
    largest.write_bytes(largest.read_bytes()[:-1])
    with CheckpointStore(tmp_path, keep=2) as store:
        state, progress = store.restore(make_state())
        assert "damaged-2" in store.set_aside[0] and largest.name in store.set_aside[0]
        assert checkpoint_steps(tmp_path) == [1]
        store.save(2, state, progress)
    assert checkpoint_steps(tmp_path) == [1, 2]
    assert (tmp_path / "checkpoints" / "damaged-2").is_dir()


def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path, monkeypatch):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    save(tmp_path, [1.0])
    before = files(tmp_path)
    with CheckpointStore(tmp_path, keep=1) as store, monkeypatch.context() as patch:
        patch.setattr(store._manager, "wait_until_finished", full)
        with pytest.raises(RunError, match="cannot be written .*No space left"):
            store.wait()
    assert files(tmp_path) == before
