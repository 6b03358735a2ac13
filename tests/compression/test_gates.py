import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax.compression import (
    GateConfig,
    Pruning,
    add_gates,
    apply_gates,
    fold_gates,
    keep_units,
    open_heads,
    writing_heads,
)
from qkv_jax.layers import init_rngs
from qkv_jax.models import seq2seq
from tests.compression.test_prune import BATCH, CONFIG

HOW = GateConfig(penalty=0.1)
# Of 3 key heads with 2 query heads each: open, half open, closed.
LOGITS = {
    "encoder.0.attention": [9.0, 0.3, -9.0],
    "encoder.1.attention": [9.0, 9.0, 9.0],
    "decoder.0.attention": [-3.0, -4.0, 0.5],
    "decoder.0.cross": [-9.0, -9.0, -9.0],
}


@functools.cache
def gated():
    """A model whose gates are as in LOGITS."""

    def make():
        model = seq2seq.Model(CONFIG, rngs=init_rngs(3))
        add_gates(model, HOW)
        for name, layer in model.attention_layers().items():
            layer.gate_logits[...] = jnp.array(LOGITS[name]) / HOW.speed
        return model

    graph = nnx.split(nnx.eval_shape(make), nnx.Param)[0]
    return graph, jax.jit(lambda: nnx.state(make(), nnx.Param))()


def logits(model):
    graph, params = nnx.split(model, nnx.Param)
    call = jax.jit(
        lambda p: nnx.merge(graph, p)(BATCH["source"], BATCH["target"]),
    )
    return np.asarray(call(params))


def test_without_its_closed_heads_a_model_computes_what_it_did_with_gates():
    graph, params = gated()

    @jax.jit
    def run(params):
        model = nnx.merge(graph, params)
        number = apply_gates(model, HOW, 2, None)
        return model(BATCH["source"], BATCH["target"]), number

    wanted, number = run(params)
    assert number == 6
    model = nnx.merge(graph, params)
    fold_gates(model, HOW)
    norms = writing_heads(model)
    kept = open_heads(norms)
    assert {n: x.tolist() for n, x in kept.items()} == {
        "encoder.0.attention": [0, 1],
        "encoder.1.attention": [0, 1, 2],
        "decoder.0.attention": [2],
        "decoder.0.cross": [0],  # One has to stay, and writes nothing.
    }
    np.testing.assert_allclose(logits(model), wanted, rtol=1e-6, atol=1e-6)
    keep_units(model, kept)
    assert model.decoder[0].attention.query.kernel.shape == (12, 2, 4)
    np.testing.assert_allclose(logits(model), wanted, rtol=1e-6, atol=1e-6)
    pruned = dataclasses.replace(CONFIG, heads_by_layer=(4, 6, 2, 2))
    like = nnx.eval_shape(lambda: seq2seq.Model(pruned, rngs=init_rngs(0)))
    shapes = [jax.tree.map(jnp.shape, nnx.state(m, nnx.Param)) for m in (like, model)]
    assert shapes[0] == shapes[1]


def test_gates_are_drawn_from_the_hard_concrete_distribution():
    logits = jnp.array([-1.0, 0.0, 2.0])
    drawn = np.asarray(HOW.draw(logits, 40_000, jax.random.key(0)))
    assert drawn.min() == 0.0 and drawn.max() == 1.0
    # Louizos et al. 2018, equations 10 to 12, by hand.
    odds = np.exp(np.asarray(logits, np.float64))
    closed = 1 / (1 + odds * (1.1 / 0.1) ** (2 / 3))
    opened = 1 / (1 + (1.1 / 0.1) ** (2 / 3) / odds)
    np.testing.assert_allclose((drawn == 0).mean(0), closed, atol=0.01)
    np.testing.assert_allclose((drawn == 1).mean(0), opened, atol=0.01)
    np.testing.assert_allclose(HOW.open(logits), 1 - closed, rtol=1e-5)
    wanted = np.clip(1.2 * odds / (1 + odds) - 0.1, 0, 1)
    np.testing.assert_allclose(HOW.value(logits), wanted, rtol=1e-5)
    edge = math.log(0.1 / 1.1)
    assert HOW.value(jnp.array([edge - 1e-3])) == 0 < HOW.value(jnp.array([edge + 0.1]))


def test_rows_have_gates_of_their_own_and_slopes_close_them():
    graph, params = gated()

    @jax.jit
    @jax.grad
    def slopes(params):
        model = nnx.merge(graph, params)
        return apply_gates(model, HOW, 2, jax.random.key(0))

    for name, slope in zip(LOGITS, _logits_of(slopes(params))):
        assert (slope > 0).all(), name
    drawn = HOW.draw(jnp.zeros(3), 4, jax.random.key(1))
    assert len(np.unique(drawn)) > 4


def _logits_of(params):
    model = nnx.merge(gated()[0], params)
    return [model.attention_layers()[name].gate_logits[...] for name in LOGITS]


@pytest.mark.parametrize(
    "changes", [{"start": 1.0}, {"temperature": 0.3}, {"stretch": 0.2}, {"speed": 9.0}]
)
def test_each_field_changes_what_is_drawn(changes):
    def drawn(how):
        layer = seq2seq.MultiHeadAttention(4, 2, rngs=nnx.Rngs(0))
        add_gates(layer, how)
        rate = how.speed * 0.01  # As far as an update of 0.01 moves a logit.
        return how.draw(how.speed * layer.gate_logits[...] - rate, 9, jax.random.key(0))

    assert not np.array_equal(drawn(HOW), drawn(dataclasses.replace(HOW, **changes)))


def test_a_model_without_a_closed_head_says_so():
    with pytest.raises(ValueError, match="none of the 3 heads is closed"):
        open_heads({"a": np.array([0.1, 2.0]), "b": np.array([1.0])})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GateConfig(start=1.0), "start is of gates: give penalty"),
        (lambda: GateConfig(penalty=-1.0), "penalty must not be negative"),
        (lambda: GateConfig(penalty=1.0, speed=0.0), "speed must be positive"),
        (lambda: GateConfig(penalty=1.0, start=math.inf), "start must be finite"),
        (lambda: Pruning(gates=True, heads=0.5), "both say which heads go"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
