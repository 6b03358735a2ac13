"""The loss of an update: of ragged microbatches, and of two dropouts that are drawn together."""

import dataclasses

import jax
import numpy as np
import pytest

from qkv_jax import training
from qkv_jax.models import recurrent, seq2seq
from qkv_jax.training import MeshConfig, OptimizerConfig, make_mesh
from qkv_jax.translation.loss import make_loss
from qkv_jax.translation.models import init_params
from tests.translation import toy

SIZES = {"encoder_layers": 1, "decoder_layers": 1, "vocabulary": 24}
CONFIG = seq2seq.Config(d_model=16, d_ff=24, heads=2, norm="pre", dropout=0.2, **SIZES)


def batch():
    """Ragged rows of two pairs each."""
    rng = np.random.default_rng(0)
    source, target = rng.integers(4, 24, (2, 16, 9)).astype(np.int32)
    lengths = rng.integers(4, 10, 16)
    lengths[3] = 0
    target[np.arange(9)[None] >= lengths[:, None]] = 0
    made = {"source": source, "target": target}
    second = 1 + (np.arange(9)[None] >= 3)
    segments = {
        f"{name}_segments": (second * (array > 0)).astype(np.int32)
        for name, array in made.items()
    }
    return made | segments


def update(config=CONFIG, *, r_drop=0.0, devices=1, accumulate=1):
    """Metrics and parameters of an update."""
    mesh = make_mesh(MeshConfig(data=devices))
    optimizer = training.make_optimizer(
        OptimizerConfig(peak_lr=0.1, warmup_steps=1, eps=1e-3), 10
    )
    state = training.create_state(
        lambda: init_params(config, seed=0), optimizer, seed=0, mesh=mesh
    )
    step = training.make_train_step(
        make_loss(config, 0.1, r_drop=r_drop),
        optimizer,
        mesh=mesh,
        accumulate=accumulate,
    )
    state, metrics = step(state, training.place_batch(batch(), mesh))
    return jax.device_get((metrics, jax.tree.map(np.asarray, state.params)))


def test_the_gradient_of_ragged_microbatches_is_that_of_the_whole_batch():
    dry = dataclasses.replace(CONFIG, dropout=0.0)
    whole, parts = (update(dry, accumulate=count)[0] for count in (1, 4))
    for name in ("grad_norm", "loss", "nll", "tokens"):
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-5)


def test_eight_devices_and_packed_microbatches_equal_one_device():
    one, eight = (update(r_drop=2.0, devices=count, accumulate=2) for count in (1, 8))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), one, eight
    )
    assert one[0]["tokens"] == (batch()["target"] > 0).sum()


def test_the_divergence_of_both_dropouts_is_weighted_by_alpha():
    params, rng = init_params(CONFIG, seed=0), jax.random.key(0)
    found = []
    for alpha in (1.0, 3.0):
        loss = jax.jit(make_loss(CONFIG, 0.0, r_drop=alpha))
        sums = loss(params, batch(), rng)[1]
        found.append(sums["loss_sum"] - sums["nll_sum"])
    assert found[0] > 0.1
    assert found[1] == pytest.approx(3 * float(found[0]), rel=1e-4)


@pytest.mark.parametrize("config", [CONFIG, recurrent.Config(d_model=16, **SIZES)])
def test_evaluation_and_an_alpha_of_0_cost_nothing(config):
    params, rng = init_params(config, seed=0), jax.random.key(0)

    def program(rng, **options):
        loss = make_loss(config, 0.1, **options)
        return str(jax.make_jaxpr(lambda x: loss(x, batch(), rng))(params))

    assert program(None, r_drop=5.0) == program(None)
    assert program(rng, r_drop=0.0) == program(rng) != program(rng, r_drop=5.0)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"r_drop": -1.0}, "r_drop must not be negative; got -1.0"),
        (
            {"r_drop": 1.0, "model": seq2seq.tiny(dropout=0.0)},
            "the model has none: give model.dropout",
        ),
    ],
)
def test_misuse_is_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        toy.make_config(tmp_path, tmp_path, **changes)
