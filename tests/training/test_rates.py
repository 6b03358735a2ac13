"""A learning rate, found by trying many: on curves made by hand, and on the toy."""

from types import SimpleNamespace

import numpy as np
import pytest

from qkv_jax.training import (
    DistributedConfig,
    MeshConfig,
    OptimizerConfig,
    PrecisionConfig,
    RateCurve,
    RateRange,
    RunError,
    Task,
    TrainingConfig,
    find_rate,
)
from tests.training import toy


def config(loss_fn=toy.dry_loss_fn):
    """What find_rate takes of a configuration."""

    def task(mesh):
        return Task(params=toy.params(), loss_fn=loss_fn, iterator=toy.Batches())

    return SimpleNamespace(
        # A warm-up that no short run has room for: it is left out.
        optimizer=OptimizerConfig(schedule="linear", warmup_steps=1000),
        precision=PrecisionConfig(),
        training=TrainingConfig(steps=2000, accumulate=2),
        mesh=MeshConfig(data=1),
        distributed=DistributedConfig(),
        task=task,
    )


def test_a_rate_is_a_tenth_of_where_the_smoothed_loss_is_lowest():
    rates = RateRange(low=1e-3, high=1e3, steps=61)  # ten a decade
    assert rates.factor == pytest.approx(10**0.1)
    falls = np.concatenate([np.full(20, 9.0), np.linspace(9, 8, 8), [6, 3, 2, 1, 5, 9]])
    curve = RateCurve(rates, falls)
    assert rates.window == 3
    # The loss 1 is seen after the update before it, the thirtieth; its neighbours are 2 and 5.
    assert curve.smoothed[30] == pytest.approx((3 + 2 + 1) / 3)
    assert curve.lowest == pytest.approx(1e-3 * 10 ** (29 / 10))
    assert curve.suggested == pytest.approx(curve.lowest / 10)
    assert curve.steepest == pytest.approx(1e-3 * 10 ** (28 / 10))
    assert curve.diverged
    assert not RateCurve(rates, np.linspace(9, 1, 61)).diverged


def test_a_range_ends_where_the_loss_diverges_and_says_what_was_best():
    rates = RateRange(low=1e-4, high=1e4, steps=80)
    curve = find_rate(config(), rates)
    assert curve.diverged and 20 < len(curve.losses) < 80
    assert curve.losses[0] > curve.smoothed.min() + 0.3
    assert 1e-3 < curve.suggested < curve.lowest < 10
    assert curve.steepest <= curve.lowest
    assert curve.rates[-1] < rates.high
    first = toy.dry_loss_fn(toy.params(), toy.batch(1, length=6), None)[1]
    np.testing.assert_allclose(
        curve.losses[0], first["loss_sum"] / first["tokens"], rtol=1e-5
    )


def test_a_loss_that_is_never_finite_is_said():
    def loss_fn(params, batch, rng):
        loss, sums = toy.loss_fn(params, batch, None)
        return loss * np.nan, sums | {"loss_sum": loss * np.nan}

    with pytest.raises(RunError, match="the first loss is not finite"):
        find_rate(config(loss_fn), RateRange(steps=10))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"low": 0.0}, "low must be positive and less than high; got 0.0 and 1.0"),
        ({"low": 2.0}, "low must be positive and less than high; got 2.0 and 1.0"),
        ({"steps": 9}, "steps must be at least 10; got 9"),
    ],
)
def test_ranges_that_are_none_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RateRange(**options)
