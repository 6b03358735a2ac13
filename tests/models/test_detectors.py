"""Both detectors: what fills up changes nothing, a scene is learnt by heart, and the matching."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from qkv_jax.models import set_prediction, single_stage
from qkv_jax.models.detection import sigmoid_focal
from qkv_jax.models.pyramid import PyramidConfig
from qkv_jax.tasks.detection import DetectionScore
from tests.tasks.detection_toy import NAMES, scenes, tiny

both = pytest.mark.parametrize("kind", [single_stage, set_prediction])


def batch(count=4):
    return scenes(count) | {"weight": np.ones(count, np.float32)}


@functools.cache
def made(kind, **changes):
    config = dataclasses.replace(tiny(kind), **changes)
    model = kind.Model(config, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model, nnx.Param)
    loss = jax.jit(lambda p, rows: nnx.merge(graph, p).loss(rows, rng=None))
    return graph, params, loss


@both
def test_what_fills_up_changes_no_loss(kind):
    _, params, loss = made(kind)
    # A batch is not written to once it is handed over: it may still be read.
    rows, other, boxed = batch(), batch(), batch()
    rows["weight"][-1] = other["weight"][-1] = 0.0
    other["image"][-1], other["classes"][-1] = 255, 0
    boxed["boxes"][boxed["classes"] < 0] = [3.0, 3.0, 9.0, 9.0]
    (whole, sums), (part, fewer) = loss(params, batch()), loss(params, rows)
    assert part < whole and fewer["tokens"] == sums["tokens"] - 2
    assert loss(params, other)[0] == pytest.approx(float(part), rel=1e-6)
    assert loss(params, boxed)[0] == pytest.approx(float(whole), rel=1e-6)


@both
def test_scenes_are_learnt_by_heart(kind):
    graph, params, _ = made(kind)
    optimizer, rows = optax.adam(1e-2), batch()

    # Not in a scan: XLA's convolutions are slow in loops on a CPU.
    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: nnx.merge(graph, p).loss(rows, rng=None)[0])(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(150):
        params, state = step(params, state)
    outputs = jax.jit(lambda p: nnx.merge(graph, p).predict(rows))(params)
    outputs = jax.device_get(outputs)
    assert DetectionScore()(outputs, rows, NAMES)["ap50"] > 0.9
    assert (np.diff(outputs["scores"], axis=1) <= 0).all()
    H, W = rows["image"].shape[1:3]
    assert (outputs["boxes"] >= 0).all()
    assert (outputs["boxes"] <= [W, H, W, H]).all()


def test_the_cheapest_matching_is_found():
    costs = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    real = np.asarray([[True, True, True], [True, False, True]])
    found = set_prediction.match(jnp.asarray(costs), jnp.asarray(real))
    for table, there, queries in zip(costs, real, np.asarray(found)):
        columns = np.flatnonzero(there)
        ways = np.asarray(list(itertools.permutations(range(5), len(columns))))
        best = ways[table[ways, columns].sum(axis=1).argmin()]
        assert queries[columns].tolist() == best.tolist()
        assert len(set(queries.tolist())) == 3


def test_costs_that_are_no_numbers_end_the_search():
    found = set_prediction.match(jnp.full((1, 4, 2), jnp.nan), jnp.ones((1, 2), bool))
    assert len(set(found[0].tolist())) == 2


def test_a_focal_loss_forgets_what_is_easy():
    logits, ones = jnp.asarray([0.0, 4.0]), jnp.ones(2)
    loss = sigmoid_focal(logits, ones)
    assert loss[0] == pytest.approx(0.25 * 0.25 * np.log(2))
    plain = sigmoid_focal(logits, ones, gamma=0.0, alpha=1.0)
    assert loss[1] / plain[1] < 1e-3
    heat = single_stage.penalty_reduced_focal(jnp.zeros(3), jnp.asarray([1, 0.9, 0]))
    np.testing.assert_allclose(
        heat, np.log(2) / 4 * np.asarray([1, 1e-4, 1]), rtol=1e-4
    )


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: single_stage.Config(threshold=0.0), "threshold"),
        (
            lambda: single_stage.Model(single_stage.Config(), rngs=nnx.Rngs(0)),
            "classes",
        ),
        (lambda: set_prediction.Config(queries=0), "queries"),
        (lambda: PyramidConfig(widths=(8, 12)), "blocks"),
        (lambda: PyramidConfig(widths=(8, 12, 16), groups=8), "groups"),
        (lambda: PyramidConfig(d_model=42), "d_model"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, named):
    with pytest.raises(ValueError, match=named):
        make()


def test_more_boxes_than_queries_are_refused():
    graph, params, _ = made(set_prediction, queries=1)
    with pytest.raises(ValueError, match="queries must not be less than the data's 3"):
        nnx.merge(graph, params).loss(batch(), rng=None)
