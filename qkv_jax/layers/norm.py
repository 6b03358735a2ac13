"""Normalisation over the width of the model."""

from typing import Literal

import jax.numpy as jnp
from flax import nnx

Normalisation = Literal["layer", "rms"]


def make_norm(
    d_model: int,
    kind: Normalisation,
    epsilon: float,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
) -> nnx.LayerNorm | nnx.RMSNorm:
    """A norm over D; statistics in float32.

    Args:
        d_model: D.
        kind: "layer": mean and variance, scale and bias (Ba et al. 2016, 1607.06450); "rms":
            root mean square and scale alone (Zhang and Sennrich 2019, 1910.07467).
        epsilon: added to the variance or mean square.
        dtype: of the output.
        rngs: of the parameters, which are ones and zeros.
    """
    if kind == "rms":
        return nnx.RMSNorm(
            d_model,
            epsilon=epsilon,
            dtype=dtype,
            scale_metadata={"axes": ("embed",)},
            rngs=rngs,
        )
    return nnx.LayerNorm(
        d_model,
        epsilon=epsilon,
        dtype=dtype,
        scale_metadata={"axes": ("embed",)},
        bias_metadata={"axes": ("embed",)},
        rngs=rngs,
    )
