"""Convolutions over the length of a sequence, as products and sums that any backend does well."""

import jax
import jax.numpy as jnp
from flax import nnx

from qkv_jax.layers.linear import Linear
from qkv_jax.layers.norm import make_norm

Array = jax.Array


def windows(x: Array, size: int, stride: int) -> Array:
    """Every stride-th run of `size` neighbours, side by side: a convolution is a product with it.

    Args:
        x: (B, T, C).
        size, stride: positive; equal ones stack frames, a larger size overlaps.

    Returns:
        (B, ceil(T / stride), size * C); zeros stand beyond both ends.
    """
    T = x.shape[1]
    count = -(-T // stride)
    before = max(size - stride, 0) // 2
    after = max((count - 1) * stride + size - before - T, 0)
    x = jnp.pad(x, ((0, 0), (before, after), (0, 0)))
    last = (count - 1) * stride + 1
    shifts = [x[:, k : k + last : stride] for k in range(size)]
    return jnp.concatenate(shifts, axis=2)


class Convolution(nnx.Module):
    """Gate, a convolution of each channel by itself, norm, SiLU, projection: (B, T, D) -> (B, T, D).

    Source: the convolution module of the Conformer, Gulati et al. 2020, arXiv 2005.08100, figure
    2. Difference: a layer norm in place of the batch norm.
    """

    def __init__(
        self, d_model: int, size: int, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs
    ):
        """Builds the layer; size: neighbours that reach a position, odd, itself included."""
        if size < 1 or size % 2 == 0:
            raise ValueError(f"size must be odd and positive; got {size}.")

        def linear(wide: int, narrow: int, axes: tuple[str, str]) -> nnx.Linear:
            return Linear(
                wide,
                narrow,
                dtype=dtype,
                kernel_init=nnx.initializers.xavier_uniform(),
                kernel_metadata={"axes": axes},
                bias_metadata={"axes": axes[1:]},
                rngs=rngs,
            )

        self.up = linear(d_model, 2 * d_model, ("embed", "ff"))
        self.down = linear(d_model, d_model, ("ff", "embed"))
        init = nnx.initializers.normal(stddev=size**-0.5)
        kernel = init(rngs.params(), (size, d_model), jnp.float32)
        self.kernel = nnx.Param(kernel, axes=(None, "embed"))
        self.norm = make_norm(d_model, "layer", 1e-5, dtype, rngs)

    def __call__(self, x: Array, valid: Array) -> Array:
        """x (B, T, D); valid (B, T) bool: what stands elsewhere reaches no neighbour."""
        value, gate = jnp.split(self.up(x), 2, axis=-1)
        x = jnp.where(valid[..., None], value * jax.nn.sigmoid(gate), 0.0)
        kernel = self.kernel[...].astype(x.dtype)
        T, size = x.shape[1], kernel.shape[0]
        x = jnp.pad(x, ((0, 0), (size // 2, size // 2), (0, 0)))
        mixed = jnp.zeros_like(x[:, :T])
        for k in range(size):
            mixed = mixed + x[:, k : k + T] * kernel[k][None, None]
        return self.down(jax.nn.silu(self.norm(mixed)))
