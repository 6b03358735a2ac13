"""Token embeddings, whose table can serve as the output projection, and positions added to them."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from qkv_jax.layers.norm import Normalisation, make_norm
from qkv_jax.ops import dropout, pin, pin_stream, sinusoids

Array = jax.Array
Positions = Literal["sinusoid", "sinusoid_inclusive", "learned", "relative"]


class Embedding(nnx.Module):
    """A table of V vectors of width D, drawn from a normal distribution."""

    def __init__(
        self,
        vocabulary: int,
        d_model: int,
        *,
        scale: bool = True,
        stddev: float | None = None,
        zero: int | None = None,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Builds the table.

        Args:
            vocabulary: V.
            d_model: D.
            scale: whether vectors are multiplied by sqrt(D).
            stddev: of the table as it is drawn; None: D ** -0.5.
            zero: a token whose vector is 0, and stays so in training; None: none.
            dtype: of the computation; the table is float32.
            rngs: stream "params" draws the table.
        """
        stddev = d_model**-0.5 if stddev is None else stddev
        init = nnx.initializers.normal(stddev=stddev)
        table = init(rngs.params(), (vocabulary, d_model), jnp.float32)
        if zero is not None:
            table = table.at[zero].set(0.0)
        self.table = nnx.Param(table, axes=("vocab", "embed"))
        self.scale = scale
        self.zero = zero
        self.dtype = dtype

    def __call__(self, tokens: Array) -> Array:
        """Tokens (B, T) -> vectors (B, T, D), float32.

        Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.4.
        """
        # Looked up by rows, so its columns are put together first where they are spread out.
        table = pin(self.weights(), "vocab", None)
        x = pin(table[tokens], "batch", "length")
        return x * self.table.shape[1] ** 0.5 if self.scale else x

    def weights(self) -> Array:
        """The table (V, D), through which the vector that is 0 has no gradient."""
        if self.zero is None:
            return self.table[...]
        tokens = jax.lax.broadcasted_iota(jnp.int32, self.table.shape, 0)
        return jnp.where(tokens == self.zero, 0.0, self.table[...])

    def logits(self, x: Array) -> Array:
        """Scores of every token: x (..., D) times the table's transpose, (..., V)."""
        table = self.weights().astype(self.dtype)
        return jnp.einsum("...D,VD->...V", x.astype(self.dtype), table)


class AddPositions(nnx.Module):
    """What comes between token vectors and the first block: positions, a norm, dropout."""

    def __init__(
        self,
        d_model: int,
        *,
        positions: Positions = "sinusoid",
        offset: int = 0,
        longest: int = 1024,
        norm: Normalisation | None = None,
        epsilon: float = 1e-5,
        dropout_rate: float = 0.0,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Builds what has parameters.

        Args:
            d_model: D.
            positions: "sinusoid", wavelengths 2 pi 10000 ** (2 i / D) (Vaswani et al. 2017);
                "sinusoid_inclusive", 2 pi 10000 ** (i / (D / 2 - 1)), so that the last is
                2 pi 10000 (tensor2tensor, fairseq); "learned": a table; "relative": nothing is
                added here.
            offset: what the first position counts as.
            longest: positions of the learned table, past the offset.
            norm: of the sum; None: none.
            epsilon: of the norm.
            dropout_rate: after all.
            dtype: of the output.
            rngs: stream "params" draws the table of positions.
        """
        self.positions: Positions = positions
        self.offset = offset
        if positions == "learned":
            init = nnx.initializers.normal(stddev=d_model**-0.5)
            shape = (longest + offset, d_model)
            table = init(rngs.params(), shape, jnp.float32)
            self.table = nnx.Param(table, axes=(None, "embed"))
        self.norm = norm and make_norm(d_model, norm, epsilon, dtype, rngs)
        self.dropout_rate = dropout_rate
        self.dtype = dtype

    def __call__(self, x: Array, places: Array, *, rng: Array | None = None) -> Array:
        """Token vectors (B, T, D) at places that broadcast to (B, T): (B, T, D)."""
        if self.positions == "learned":
            x = x + self.table[...][places + self.offset]
        elif self.positions != "relative":
            inclusive = self.positions == "sinusoid_inclusive"
            x = x + sinusoids(
                places + self.offset, x.shape[-1], inclusive=inclusive
            ).astype(x.dtype)
        x = x.astype(self.dtype)
        x = x if self.norm is None else self.norm(x)
        return pin_stream(dropout(x, self.dropout_rate, rng))
