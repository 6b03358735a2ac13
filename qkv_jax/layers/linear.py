"""Flax's linear layers, whose biases are added, and their gradients summed, in float32."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Array = jax.Array


def _promote(arrays: Any, *, dtype: Any) -> Any:
    """All in the dtype of the computation but the bias, whose gradient is a sum over all tokens."""
    *products, bias = arrays
    return *(x.astype(dtype) for x in products), bias


# Flax's type for it has more arguments than it is ever given.
PROMOTE: Any = _promote


def product(x: Array, kernel: Array, dimensions: Any, **options: Any) -> Array:
    """A layer's `lax.dot_general`, and those of its gradients, of 16-bit numbers with float32 sums.

    XLA's own gradients of a product whose sums come back as float32 multiply float32 numbers; and on
    a CPU a product of 16-bit numbers that rounds its sums is several times slower than one that
    does not.

    Args:
        x: (..., *in) floating.
        kernel: (*in, *out), of x's dtype.
        dimensions: of a contraction of x's last axes with the kernel's first.
        options: as of `lax.dot_general`.

    Returns:
        (..., *out), float32 where x has 16 bits.
    """
    (axes, _), _ = dimensions
    own = axes == tuple(range(x.ndim - len(axes), x.ndim))
    if not own or x.dtype.itemsize > 2 or options.get("out_sharding") is not None:
        return jax.lax.dot_general(x, kernel, dimensions, **options)
    return _product(len(axes), x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(summed: int, x: Array, kernel: Array) -> Array:
    return _sum(x, kernel, range(x.ndim - summed, x.ndim), range(summed))


def _saved(summed: int, x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(summed, x, kernel), (x, kernel)


def _slopes(summed: int, saved: tuple[Array, Array], slope: Array) -> Any:
    x, kernel = saved
    slope = slope.astype(x.dtype)
    rows, out = range(x.ndim - summed), kernel.ndim - summed
    last = range(slope.ndim - out, slope.ndim)
    slope_x = _sum(slope, kernel, last, range(summed, kernel.ndim))
    slope_kernel = _sum(x, slope, rows, rows)
    return slope_x.astype(x.dtype), slope_kernel.astype(kernel.dtype)


_product.defvjp(_saved, _slopes)


def _sum(left: Array, right: Array, left_axes: Any, right_axes: Any) -> Array:
    dimensions = ((tuple(left_axes), tuple(right_axes)), ((), ()))
    return jax.lax.dot_general(
        left, right, dimensions, preferred_element_type=jnp.float32
    )


class Linear(nnx.Linear):
    """`nnx.Linear`; its `dtype` is that of the product and of what comes back."""

    def __init__(self, *sizes: Any, dtype: Any, **options: Any):
        """Arguments as for `nnx.Linear`."""
        super().__init__(*sizes, dtype=dtype, dot_general=product, promote_dtype=PROMOTE, **options)

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """x (..., C) -> (..., F)."""
        return super().__call__(inputs, out_sharding).astype(self.dtype)


class LinearGeneral(nnx.LinearGeneral):
    """`nnx.LinearGeneral`; its `dtype` is that of the product and of what comes back."""

    def __init__(self, *sizes: Any, dtype: Any, **options: Any):
        """Arguments as for `nnx.LinearGeneral`."""
        super().__init__(*sizes, dtype=dtype, dot_general=product, promote_dtype=PROMOTE, **options)

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """x (..., *in) -> (..., *out)."""
        return super().__call__(inputs, out_sharding).astype(self.dtype)
