"""Adaptive depth: one block applied to each token as often as the token asks for."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from qkv_jax.layers.transformer import EncoderBlock
from qkv_jax.ops import Mask

Array = jax.Array


class Halted(NamedTuple):
    """What adaptive depth gives.

    Attributes:
        states: (B, T, D), the mean of each token's states, weighted by its chances to halt there.
        ponder: (B, T) float32, what a loss can make smaller: the depth, and what was left to
            halt with at the last application, which alone has a gradient.
        depth: (B, T) int32, how often the block was applied; 0 where there is no token.
    """

    states: Array
    ponder: Array
    depth: Array


class AdaptiveDepth(nnx.Module):
    """Applies a block until every token has halted, at most so many times.

    A token that has halted stays as it is, and is still seen by the others. Once all have, the block
    is not computed any more.

    Source: Graves 2016, arXiv 1603.08983, section 2; Dehghani et al. 2018, arXiv 1807.03819.
    """

    def __init__(self, block: EncoderBlock, d_model: int, *, most: int, rngs: nnx.Rngs):
        """Takes the block.

        Args:
            block: of width D, what is applied.
            d_model: D.
            most: applications of a token, at most.
            rngs: stream "params" draws the chance to halt, which starts near a half.
        """
        self.block = block
        self.most = most
        self.halt = nnx.Linear(
            d_model,
            1,
            kernel_metadata={"axes": ("embed", None)},
            bias_metadata={"axes": (None,)},
            rngs=rngs,
        )

    def __call__(
        self,
        x: Array,
        there: Array,
        *,
        mask: Mask | None,
        rng: Array | None = None,
        epsilon: float = 0.01,
    ) -> Halted:
        """x (B, T, D) of tokens that are there, (B, T) bool.

        Args:
            x: what is read.
            there: where tokens are; the others have depth 0 and state 0.
            mask: who sees whom.
            rng: draws every dropout, anew in each application; None: none.
            epsilon: a token halts once its chances sum to 1 - epsilon.
        """
        zero = jnp.zeros(there.shape, jnp.float32)
        start = (x, jnp.zeros_like(x), zero, zero, jnp.zeros(there.shape, jnp.int32))

        def apply(carry: tuple, step: Array) -> tuple:
            x, mean, chance, left, depth = carry
            runs = there & (chance < 1.0 - epsilon)
            drawn = None if rng is None else jax.random.fold_in(rng, step)
            y = jnp.where(runs[..., None], self.block(x, mask=mask, rng=drawn), x)
            p = jax.nn.sigmoid(self.halt(y)[..., 0].astype(jnp.float32))
            ends = (chance + p >= 1.0 - epsilon) | (step == self.most - 1)
            share = jnp.where(runs, jnp.where(ends, 1.0 - chance, p), 0.0)
            left = jnp.where(runs & ends, 1.0 - chance, left)
            chance = jnp.where(runs, jnp.where(ends, 1.0, chance + p), chance)
            mean = mean + share[..., None].astype(x.dtype) * y
            return y, mean, chance, left, depth + runs

        def step(carry: tuple, number: Array) -> tuple[tuple, None]:
            alive = (there & (carry[2] < 1.0 - epsilon)).any()
            return jax.lax.cond(alive, apply, lambda c, _: c, carry, number), None

        (_, mean, _, left, depth), _ = jax.lax.scan(step, start, jnp.arange(self.most))
        return Halted(mean, jnp.where(there, depth + left, 0.0), depth)
