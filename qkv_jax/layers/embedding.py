"""Token embeddings with positions, whose table can serve as the output projection too."""

import jax
import jax.numpy as jnp
from flax import nnx

from qkv_jax.ops import dropout, pin, sinusoids

Array = jax.Array


class Embedding(nnx.Module):
    """A table of V vectors of width D, drawn from a normal of variance 1 / D."""

    def __init__(
        self,
        vocabulary: int,
        d_model: int,
        *,
        dropout_rate: float = 0.0,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Builds the table; dropout_rate applies to the sum of token and position."""
        init = nnx.initializers.normal(stddev=d_model**-0.5)
        self.table = nnx.Param(
            init(rngs.params(), (vocabulary, d_model), jnp.float32),
            axes=("vocab", "embed"),
        )
        self.dropout_rate = dropout_rate
        self.dtype = dtype

    def __call__(
        self, tokens: Array, positions: Array, *, rng: Array | None = None
    ) -> Array:
        """Tokens (B, T) at positions that broadcast to (B, T): (B, T, D), scaled by sqrt(D).

        Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.4.
        """
        width = self.table.shape[1]
        # Looked up by rows, so its columns are put together first where they are spread out.
        table = pin(self.table[...], "vocab", None)
        x = pin(table[tokens], "batch", "length") * width**0.5
        x = x + sinusoids(positions, width)
        x = dropout(x.astype(self.dtype), self.dropout_rate, rng)
        return pin(x, "batch", "stream")

    def logits(self, x: Array) -> Array:
        """Scores of every token: x (..., D) times the table's transpose, (..., V)."""
        table = self.table[...].astype(self.dtype)
        return jnp.einsum("...D,VD->...V", x.astype(self.dtype), table)
