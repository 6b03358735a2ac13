"""Recurrent layers: the gated recurrent unit over rows of sequences, and attention beside it."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from qkv_jax.layers.linear import Linear
from qkv_jax.ops import (
    Mask,
    additive_attention,
    local_attention,
    luong_dot,
    predictive_centres,
)

Array = jax.Array
Alignment = Literal["additive", "dot", "general", "concat", "local"]
ALIGNMENTS = get_args(Alignment)


class GRU(nnx.Module):
    """h_t = (1 - z) n + z h_{t-1}, with gates r and z and n = tanh(W x + r (U h_{t-1} + b)).

    Source: Cho et al. 2014, arXiv 1406.1078, with r after U as in cuDNN and `nnx.GRUCell`.
    """

    def __init__(
        self,
        d_input: int,
        d_state: int,
        *,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Builds the two maps, each of whose three parts, r, z and n, is drawn for itself.

        Args:
            d_input: C, width of the inputs.
            d_state: H, width of the state.
            dtype: of the products; parameters and the state are float32.
            rngs: stream "params" draws them: Glorot uniform for inputs, orthogonal for states.
        """
        into = nnx.initializers.xavier_uniform()
        over = nnx.initializers.orthogonal()

        def parts(init, width: int) -> Array:
            shapes = [(width, d_state)] * 3
            return jnp.stack([init(rngs.params(), s, jnp.float32) for s in shapes], 1)

        self.kernel = nnx.Param(parts(into, d_input), axes=("embed", None, None))
        self.recurrent = nnx.Param(parts(over, d_state), axes=("embed", None, None))
        self.bias = nnx.Param(jnp.zeros((3, d_state)), axes=(None, None))
        self.state_bias = nnx.Param(jnp.zeros((1, d_state)), axes=(None, None))
        self.dtype = dtype

    def inputs(self, x: Array) -> Array:
        """W x + b of all gates: (..., C) -> (..., 3, H), for all steps at once."""
        kernel, x = self.kernel[...].astype(self.dtype), x.astype(self.dtype)
        product = jnp.einsum("...C,CGH->...GH", x, kernel).astype(jnp.float32)
        return product + self.bias[...].reshape((1,) * (x.ndim - 1) + (3, -1))

    def step(self, state: Array, gates: Array) -> Array:
        """(..., H) and `inputs` (..., 3, H) -> the next state (..., H)."""
        recurrent = self.recurrent[...].astype(self.dtype)
        moved = jnp.einsum("...H,HGK->...GK", state.astype(self.dtype), recurrent)
        moved = moved.astype(jnp.float32)
        reset = jax.nn.sigmoid(gates[..., 0, :] + moved[..., 0, :])
        kept = jax.nn.sigmoid(gates[..., 1, :] + moved[..., 1, :])
        bias = self.state_bias[...].reshape((1,) * (state.ndim - 1) + (-1,))
        new = jnp.tanh(gates[..., 2, :] + reset * (moved[..., 2, :] + bias))
        return (1.0 - kept) * new + kept * state

    def __call__(
        self, x: Array, starts: Array, initial: Array, *, reverse: bool = False
    ) -> Array:
        """States (B, T, H) float32 after each input of x (B, T, C).

        Args:
            x: (B, T, C).
            starts: (B, T) bool: where a sequence begins, in the direction of time.
            initial: (B, T, H), or (B, 1, H) for all: the state before an input at a start.
            reverse: whether time goes from the last input to the first.
        """
        gates = self.inputs(x)
        B, T = x.shape[:2]
        initial = jnp.broadcast_to(initial, (B, T, gates.shape[-1]))

        def step(state: Array, now: tuple[Array, Array, Array]):
            gates, start, initial = now
            state = self.step(jnp.where(start[:, None], initial, state), gates)
            return state, state

        rows = (gates.swapaxes(0, 1), starts.T, initial.swapaxes(0, 1))
        zeros = jnp.zeros_like(initial[:, 0])
        return jax.lax.scan(step, zeros, rows, reverse=reverse)[1].swapaxes(0, 1)


class RecurrentAttention(nnx.Module):
    """A decoder's state looks at the encoder's states: Bahdanau's score, or one of Luong's."""

    def __init__(
        self,
        d_model: int,
        *,
        kind: Alignment = "additive",
        half_width: int = 10,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Builds what the kind of score needs.

        Args:
            d_model: D, width of the states on both sides.
            kind: see `ops.additive_attention` ("additive"; "concat" is the same score, in Luong's
                place for it) and `ops.luong_dot`; "general": with a matrix; "local": "general"
                within `half_width` of a predicted position, see `ops.local_attention`.
            half_width: keys on each side of the position.
            dtype: of the computation; parameters are float32.
            rngs: stream "params" draws the parameters (Glorot uniform).
        """

        def project(bias: bool) -> nnx.Linear:
            return Linear(
                d_model,
                d_model,
                use_bias=bias,
                dtype=dtype,
                kernel_init=nnx.initializers.xavier_uniform(),
                kernel_metadata={"axes": ("embed", None)},
                bias_metadata={"axes": (None,)},
                rngs=rngs,
            )

        def vector() -> nnx.Param:
            init = nnx.initializers.normal(stddev=d_model**-0.5)
            return nnx.Param(init(rngs.params(), (d_model,), jnp.float32), axes=(None,))

        self.kind: Alignment = kind
        self.half_width = half_width
        self.key = project(False) if kind != "dot" else None
        self.query = project(True) if kind in ("additive", "concat") else None
        self.weight = vector() if kind in ("additive", "concat") else None
        self.centre = project(False) if kind == "local" else None
        self.centre_weight = vector() if kind == "local" else None

    def remember(self, memory: Array) -> Array:
        """Keys (B, S, D) of the encoder's states (B, S, D)."""
        return memory if self.key is None else self.key(memory)

    def __call__(
        self, query: Array, keys: Array, values: Array, mask: Mask, lengths: Array
    ) -> Array:
        """What queries (B, T, D) find: (B, T, E).

        Args:
            query: (B, T, D), the decoder's states.
            keys: (B, S, D), see `remember`.
            values: (B, S, E).
            mask: who may attend, over (B, 1, T, S).
            lengths: (B,) int32, real keys.
        """
        asks = query if self.query is None else self.query(query)
        heads = (asks[:, :, None], keys[:, :, None], values[:, :, None])
        if self.weight is not None:
            found = additive_attention(*heads, self.weight[...][None], mask=mask)
        elif self.centre is None or self.centre_weight is None:
            found = luong_dot(*heads, mask=mask)
        else:
            kernel, weight = self.centre.kernel[...], self.centre_weight[...]
            centres = predictive_centres(query, kernel, weight, lengths)
            found = local_attention(
                *heads, centres, half_width=self.half_width, mask=mask
            )
        return found[:, :, 0]

    def weights(self, query: Array, keys: Array, mask: Mask, lengths: Array) -> Array:
        """The weights (B, 1, T, S), float32: what is found where each value is its own place."""
        B, S = keys.shape[:2]
        places = jnp.broadcast_to(jnp.eye(S, dtype=keys.dtype), (B, S, S))
        found = self(query, keys, places, mask, lengths)
        return found[:, None].astype(jnp.float32)
