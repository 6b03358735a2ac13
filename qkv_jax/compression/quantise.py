"""Weights and activations as integers of 8 or 4 bits, by qwix.

How qwix is used. Its `quantize_model` traces one method of a module and converts the parameters
that it meets there. A model that generates has several methods, looks its table up by rows as
well as multiplying by it, and is taken apart into a graph and parameters that the loops are handed.
So the arrays, scales and products are qwix's (`QArray`, `quantize`, `dot_general`), and they reach
the layers through the `dot_general` and `promote_dtype` that flax's linear layers take.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import qwix
from flax import nnx

from qkv_jax.layers import Embedding
from qkv_jax.layers.linear import product
from qkv_jax.ops.axes import input_axes

Array = jax.Array
GROUP = 32
LINEAR = (nnx.Linear, nnx.LinearGeneral)


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """Which numbers of a model are integers.

    Attributes:
        weights: of linear layers and embeddings, "int8" or "int4", with a float32 scale for each
            output and, in groups, for each group of inputs; None: they stay float32. Norms,
            biases and tables of positions always do.
        activations: "int8": what enters a product with a weight is rounded too, with a scale for
            each token that is found as it comes, and the products are of integers.
        group: inputs that share a scale, or fewer where it does not divide them; None: 32 of int4
            weights, and all inputs of an output of int8.
    """

    weights: Literal["int8", "int4"] | None = None
    activations: Literal["int8"] | None = None
    group: int | None = None

    def __post_init__(self):
        if self.weights not in (None, "int8", "int4"):
            raise ValueError(
                f"weights must be 'int8', 'int4' or None; got {self.weights!r}."
            )
        if self.activations not in (None, "int8"):
            raise ValueError(
                f"activations must be 'int8' or None; got {self.activations!r}."
            )
        if self.weights is None and (self.activations or self.group):
            raise ValueError("activations and group are beside weights: give weights.")
        if self.group is not None and self.group < 2:
            raise ValueError(f"group must be at least 2; got {self.group}.")
        if self.activations and (self.weights == "int4" or self.group):
            raise ValueError(
                "activations 'int8' need weights 'int8' without groups: a product of integers has "
                "one scale an output, and one with groups is made in floating point."
            )

    @property
    def dtype(self) -> Any:
        """Of the weights."""
        return jnp.int4 if self.weights == "int4" else jnp.int8


def quantise(model: nnx.Module, how: Quantisation) -> None:
    """Makes a model's weights integers, in place; it then computes with them.

    Weights lie whole on each device: they lose the names of their axes.

    Args:
        model: of layers of this package; real or abstract.
        how: its `weights` are not None.
    """
    product = _integer_product if how.activations else qwix.dot_general
    for module, name in _weights(model):
        weight = getattr(module, name)
        setattr(module, name, nnx.Param(_quantised(weight, how, weight[...])))
        if isinstance(module, LINEAR):
            module.dot_general = product
            module.promote_dtype = _promote  # type: ignore[assignment]
        else:
            module.__class__ = (
                IntegerEmbedding if how.activations else QuantisedEmbedding
            )


def imitate(model: nnx.Module, how: Quantisation) -> None:
    """Makes a model compute with what `quantise` would round, and pass slopes on as if it had not.

    In place, of a float model, within a loss: quantisation-aware training. What is trained are the
    float32 weights. The output projection's activations are not rounded here.

    Source: straight-through gradients, Jacob et al. 2017, arXiv 1712.05877, section 3.
    """
    for module, name in _weights(model):
        weight = getattr(module, name)
        weight[...] = _rounded(weight[...], functools.partial(_quantised, weight, how))
        if how.activations and isinstance(module, LINEAR):
            module.dot_general = _imitated_product


def dequantised(params: Any) -> Any:
    """Parameters with float32 in place of integers and scales; what is float already stays."""
    return jax.tree.map(
        lambda x: qwix.dequantize(x) if isinstance(x, qwix.QArray) else x,
        params,
        is_leaf=lambda x: isinstance(x, qwix.QArray),
    )


def pack(x: Array) -> Array:
    """Integers of 4 bits, two a byte: (ceil(n / 2),) uint8, the first in the low half."""
    flat = x.reshape(-1).astype(jnp.int8)
    flat = jnp.pad(flat, (0, flat.size % 2)).astype(jnp.uint8) & 0xF
    return flat[::2] | (flat[1::2] << 4)


def unpack(packed: Any, shape: tuple[int, ...]) -> Array:
    """What `pack` made: int4 of this shape."""
    packed = jnp.asarray(packed)
    flat = jnp.stack([packed & 0xF, packed >> 4], axis=1).reshape(-1)
    signed = flat.astype(jnp.int8)
    signed = jnp.where(signed > 7, signed - 16, signed)
    return signed[: math.prod(shape)].reshape(shape).astype(jnp.int4)


class QuantisedEmbedding(Embedding):
    """An embedding whose table is a QArray, with a scale a token or more."""

    def __call__(self, tokens: Array) -> Array:
        table: Any = self.table[...]
        x = qwix.dequantize(table[tokens])
        return x * self.table.shape[1] ** 0.5 if self.scale else x

    def weights(self) -> Array:
        table: Any = self.table[...]
        return qwix.dequantize(table)

    def logits(self, x: Array) -> Array:
        return self._product(x, qwix.dot_general)

    def _product(self, x: Array, product: Callable[..., Array]) -> Array:
        table = self.table[...].astype(self.dtype)
        axes = (((x.ndim - 1,), (1,)), ((), ()))
        return product(x.astype(self.dtype), table, axes)


class IntegerEmbedding(QuantisedEmbedding):
    """One whose logits are products of integers."""

    def logits(self, x: Array) -> Array:
        return self._product(x, _integer_product)


def _weights(model: nnx.Module) -> Iterator[tuple[Any, str]]:
    """Each layer that multiplies by a weight, and the weight's name."""
    for _, module in list(nnx.iter_modules(model)):
        if isinstance(module, LINEAR):
            yield module, "kernel"
        elif isinstance(module, Embedding):
            yield module, "table"


def _quantised(weight: nnx.Param, how: Quantisation, x: Array) -> qwix.QArray:
    """A weight's array x, with a scale for each output; in groups, for each group of inputs too."""
    axes = weight.get_metadata()["axes"]
    # A table's rows are outputs, or tokens looked up: what is summed over is its width.
    inputs = [1] if axes[0] == "vocab" else list(range(input_axes(axes)))
    group = how.group or (GROUP if how.weights == "int4" else None)
    if group is None:
        outputs = [i for i in range(x.ndim) if i not in inputs]
        return qwix.quantize(x, how.dtype, channelwise_axes=outputs)
    width = x.shape[inputs[-1]]
    size = max(n for n in range(1, min(group, width) + 1) if width % n == 0)
    return qwix.quantize(
        x,
        how.dtype,
        channelwise_axes=[i for i in range(x.ndim) if i != inputs[-1]],
        tiled_axes={inputs[-1]: size},
    )


def _rounded(x: Array, quantised: Callable[[Array], qwix.QArray]) -> Array:
    """What is left of x after rounding, whose slope is 1."""
    y = qwix.dequantize(quantised(jax.lax.stop_gradient(x)))
    return x + jax.lax.stop_gradient(y - x)


def _integers(x: Array, axes: Any) -> qwix.QArray:
    """Activations with a scale for each row that a product sums over."""
    (summed, _), _ = axes
    rows = [i for i in range(x.ndim) if i not in {a % x.ndim for a in summed}]
    return qwix.quantize(x, jnp.int8, channelwise_axes=rows)


def _integer_product(x: Array, weight: qwix.QArray, axes: Any, **options) -> Array:
    return qwix.dot_general(_integers(x, axes), weight, axes, **options)


def _imitated_product(x: Array, weight: Array, axes: Any, **options) -> Array:
    x = _rounded(x, lambda y: _integers(y, axes))
    return product(x, weight, axes, **options)


def _promote(arrays: tuple[Array, qwix.QArray, Array | None], *, dtype: Any) -> Any:
    """In place of flax's, which knows no QArray: all in the dtype of the computation."""
    return tuple(None if x is None else x.astype(dtype) for x in arrays)
