"""Flax's linear layers, whose biases are added, and their gradients summed, in float32."""

from typing import Any

import jax
from flax import nnx

Array = jax.Array


def _promote(arrays: Any, *, dtype: Any) -> Any:
    """All in the dtype of the computation but the bias, whose gradient is a sum over all tokens."""
    *products, bias = arrays
    return *(x.astype(dtype) for x in products), bias


# Flax's type for it has more arguments than it is ever given.
PROMOTE: Any = _promote


class Linear(nnx.Linear):
    """`nnx.Linear`; its `dtype` is that of the product and of what comes back."""

    def __init__(self, *sizes: Any, dtype: Any, **options: Any):
        """Arguments as for `nnx.Linear`."""
        super().__init__(*sizes, dtype=dtype, promote_dtype=PROMOTE, **options)

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """x (..., C) -> (..., F)."""
        return super().__call__(inputs, out_sharding).astype(self.dtype)


class LinearGeneral(nnx.LinearGeneral):
    """`nnx.LinearGeneral`; its `dtype` is that of the product and of what comes back."""

    def __init__(self, *sizes: Any, dtype: Any, **options: Any):
        """Arguments as for `nnx.LinearGeneral`."""
        super().__init__(*sizes, dtype=dtype, promote_dtype=PROMOTE, **options)

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """x (..., *in) -> (..., *out)."""
        return super().__call__(inputs, out_sharding).astype(self.dtype)
