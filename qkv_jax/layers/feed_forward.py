"""The position-wise feed-forward layer, plain or gated."""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from qkv_jax.layers.linear import Linear
from qkv_jax.ops import dropout

Array = jax.Array
Activation = Literal["relu", "gelu", "gelu_tanh", "silu"]
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": jax.nn.gelu,
    "silu": jax.nn.silu,
}


class FeedForward(nnx.Module):
    """act(x W + b) V + c; gated: (act(x W + b) * (x U + d)) V + c (Shazeer 2020, 2002.05202)."""

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        *,
        activation: Activation = "relu",
        gated: bool = False,
        bias: bool = True,
        dropout_rate: float = 0.0,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Builds the layer; dropout_rate applies after the activation; without bias, b, c, d are 0."""
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {list(ACTIVATIONS)}; got {activation!r}."
            )

        def linear(wide: int, narrow: int, axes: tuple[str, str]) -> nnx.Linear:
            return Linear(
                wide,
                narrow,
                use_bias=bias,
                dtype=dtype,
                kernel_init=nnx.initializers.xavier_uniform(),
                kernel_metadata={"axes": axes},
                bias_metadata={"axes": axes[1:]},
                rngs=rngs,
            )

        self.up = linear(d_model, d_ff, ("embed", "ff"))
        self.gate = linear(d_model, d_ff, ("embed", "ff")) if gated else None
        self.down = linear(d_ff, d_model, ("ff", "embed"))
        self.activation = activation
        self.dropout_rate = dropout_rate

    def __call__(self, x: Array, *, rng: Array | None = None) -> Array:
        """x (..., D) -> (..., D); rng draws the dropout, None: none."""
        hidden = ACTIVATIONS[self.activation](self.up(x))
        if self.gate is not None:
            hidden = hidden * self.gate(x)
        return self.down(dropout(hidden, self.dropout_rate, rng))
