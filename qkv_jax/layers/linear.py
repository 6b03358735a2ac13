"""Flax's linear layers; products are summed, biases added, in float32, and so for gradients."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

Array = jax.Array
# What `remat` "dots" finds by name: what layers make of their products.
PRODUCT = "product"


def product(x: Array, kernel: Array, dimensions: Any, **options: Any) -> Array:
    """The product of a layer, and those of its slopes: of 16-bit numbers, summed in float32.

    The slopes of `lax.dot_general` with float32 sums are products of float32 numbers, and without
    them a CPU is several times slower than in float32.

    Args:
        x: (..., *in) floating, of the dtype of the computation.
        kernel: (*in, *out) floating; its slope has its own dtype.
        dimensions: as of `lax.dot_general`: x's last axes with the kernel's first, no batch.
        options: as of `lax.dot_general`, which multiplies numbers of more than 16 bits.

    Returns:
        (..., *out), float32 where x has 16 bits.
    """
    if x.dtype.itemsize > 2:
        return jax.lax.dot_general(x, kernel.astype(x.dtype), dimensions, **options)
    (axes, first), batch = dimensions
    summed = len(first)
    # The slopes' axes are counted from there.
    assert axes == tuple(range(x.ndim - summed, x.ndim)) and batch == ((), ())
    assert first == tuple(range(summed))
    return _product(summed, x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(summed: int, x: Array, kernel: Array) -> Array:
    return _multiply(
        x, kernel.astype(x.dtype), range(x.ndim - summed, x.ndim), range(summed)
    )


def _forward(summed: int, x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(summed, x, kernel), (x, kernel)


def _backward(
    summed: int, saved: tuple[Array, Array], slope: Array
) -> tuple[Array, Array]:
    x, kernel = saved
    slope, rows = slope.astype(x.dtype), range(x.ndim - summed)
    made = range(len(rows), slope.ndim)
    slope_x = _multiply(slope, kernel.astype(x.dtype), made, range(summed, kernel.ndim))
    slope_kernel = _multiply(x, slope, rows, rows)
    return slope_x.astype(x.dtype), slope_kernel.astype(kernel.dtype)


_product.defvjp(_forward, _backward)


def _multiply(left: Array, right: Array, left_axes: range, right_axes: range) -> Array:
    axes = (tuple(left_axes), tuple(right_axes))
    return jax.lax.dot_general(
        left, right, (axes, ((), ())), preferred_element_type=jnp.float32
    )


def _promote(arrays: Any, *, dtype: Any) -> Any:
    """The input in the dtype of the computation; the kernel becomes so in the product, and the
    bias stays as it is: the slopes of both are sums over all tokens."""
    x, *params = arrays
    return x.astype(dtype), *params


# Flax's type for it has more arguments than it is ever given.
PROMOTE: Any = _promote


def finished(y: Array, dtype: Any) -> Array:
    """What a layer gives, of the computation's dtype, under the name by which it is kept."""
    return checkpoint_name(y.astype(dtype), PRODUCT)


class Linear(nnx.Linear):
    """`nnx.Linear`; its `dtype` is that of the product and of what comes back."""

    def __init__(self, *sizes: Any, dtype: Any, **options: Any):
        """Arguments as for `nnx.Linear`."""
        options = {"dot_general": product, "promote_dtype": PROMOTE, **options}
        super().__init__(*sizes, dtype=dtype, **options)

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """x (..., C) -> (..., F)."""
        return finished(super().__call__(inputs, out_sharding), self.dtype)


class LinearGeneral(nnx.LinearGeneral):
    """`nnx.LinearGeneral`; its `dtype` is that of the product and of what comes back."""

    def __init__(self, *sizes: Any, dtype: Any, **options: Any):
        """Arguments as for `nnx.LinearGeneral`."""
        options = {"dot_general": product, "promote_dtype": PROMOTE, **options}
        super().__init__(*sizes, dtype=dtype, **options)

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """x (..., *in) -> (..., *out)."""
        return finished(super().__call__(inputs, out_sharding), self.dtype)
