"""Adaptive depth: who halts when, what comes out, and what it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax.layers import AdaptiveDepth, EncoderBlock

D, MOST = 8, 4
X = np.random.default_rng(1).normal(size=(2, 5, D)).astype(np.float32)
THERE = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)


class AddOne(nnx.Module):
    """Stands for a block: each application adds 1."""

    def __call__(self, x, *, mask, rng):
        return x + 1.0


def depth_of(chances):
    """Adaptive depth whose chance to halt is set by the value of the first entry."""
    layer = AdaptiveDepth(AddOne(), D, most=MOST, rngs=nnx.Rngs(0))
    layer.halt.kernel.set_value(jnp.zeros((D, 1)))
    layer.halt.bias.set_value(jnp.log(jnp.array([chances / (1 - chances)])))
    return layer


@pytest.mark.parametrize(
    ("chance", "depth", "mean"),
    [
        (0.995, 1, 1.0),
        (0.6, 2, 0.6 * 1 + 0.4 * 2),
        (0.4, 3, 0.4 * 1 + 0.4 * 2 + 0.2 * 3),
        (0.1, 4, 0.1 * 1 + 0.1 * 2 + 0.1 * 3 + 0.7 * 4),
    ],
)
def test_a_token_halts_once_its_chances_sum_to_one(chance, depth, mean):
    zeros = np.zeros_like(X)
    halted = depth_of(chance)(zeros, THERE, mask=None)
    np.testing.assert_array_equal(halted.depth, np.where(THERE, depth, 0))
    np.testing.assert_allclose(halted.states[..., 0], np.where(THERE, mean, 0), 1e-5)
    left = 1 - min(depth - 1, MOST - 1) * chance
    np.testing.assert_allclose(halted.ponder, np.where(THERE, depth + left, 0), 1e-5)


def test_what_is_left_to_halt_with_teaches_the_chance():
    graph, params = nnx.split(depth_of(0.4))

    def ponder(params):
        halted = nnx.merge(graph, params)(np.zeros_like(X), THERE, mask=None)
        return halted.ponder.sum()

    slope = jax.jit(jax.grad(ponder))(params)
    # A larger chance leaves less: d(1 - 2 p) / dp times p (1 - p), for 8 tokens.
    assert slope["halt"]["bias"][...] == pytest.approx(-2 * 0.4 * 0.6 * 8, rel=1e-4)


def test_the_block_is_not_computed_once_all_have_halted():
    calls = []

    class Counted(nnx.Module):
        def __call__(self, x, *, mask, rng):
            jax.debug.callback(lambda: calls.append(1))
            return x

    layer = AdaptiveDepth(Counted(), D, most=MOST, rngs=nnx.Rngs(0))
    layer.halt.kernel.set_value(jnp.zeros((D, 1)))
    layer.halt.bias.set_value(jnp.array([9.0]))
    jax.block_until_ready(layer(X, THERE, mask=None).states)
    jax.effects_barrier()
    assert len(calls) == 1


def test_dropout_is_drawn_anew_in_each_application():
    rates = {"dropout_rate": 0.5}
    block = EncoderBlock(
        D,
        attention={"heads": 2},
        feed_forward={"d_ff": 8},
        residual={"place": "pre", **rates},
        rngs=nnx.Rngs(0),
    )
    layer = AdaptiveDepth(block, D, most=MOST, rngs=nnx.Rngs(1))

    @nnx.jit
    def run(layer, rng):
        return layer(X, THERE, mask=None, rng=rng).states

    one, again, other = (run(layer, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-3
