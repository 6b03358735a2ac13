"""Fewer heads, feed-forward units and layers: the arrays shrink, so the model is really faster."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qkv_jax.layers import FeedForward, MultiHeadAttention
from qkv_jax.layers.linear import product

Array = jax.Array
# A module and a batch -> the sum of the losses of its rows.
Loss = Callable[[Any, Mapping[str, Array]], Array]


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """What is removed of a model.

    Attributes:
        heads: share of the heads of all attention layers, the least important first wherever they
            are; one stays in each layer. Where query heads share key heads, they go together.
        even_heads: whether each layer loses the same share.
        norm_in_layer: whether the importance of heads has norm 1 in each layer, as its paper has
            it; else a layer that matters little loses more of them. See `importance`.
        gates: heads that write nothing, which training with gates closed, see `GateConfig`; one
            stays in each layer. Nothing that the model computes changes.
        feed_forward: share of the units of each feed-forward layer.
        encoder_layers, decoder_layers: how many blocks stay; None: all.
    """

    heads: float = 0.0
    even_heads: bool = False
    norm_in_layer: bool = False
    gates: bool = False
    feed_forward: float = 0.0
    encoder_layers: int | None = None
    decoder_layers: int | None = None

    def __post_init__(self):
        for name in ("heads", "feed_forward"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(
                    f"{name} must be in [0, 1); got {getattr(self, name)}."
                )
        for name in ("encoder_layers", "decoder_layers"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1, or None; got {count}.")
        if self.even_heads and not self.heads:
            raise ValueError("even_heads is of heads: give a share of them.")
        if self.norm_in_layer and (self.even_heads or not self.heads):
            raise ValueError(
                "norm_in_layer weighs the heads of layers against each other: give a share of "
                "heads, without even_heads."
            )
        if self.gates and self.heads:
            raise ValueError(
                "gates and heads both say which heads go: give one of them."
            )
        if not any(vars(self).values()):
            raise ValueError(
                "heads, gates, feed_forward, encoder_layers or decoder_layers must be given: "
                "nothing is removed."
            )

    @property
    def measured(self) -> bool:
        """Whether it takes text to say what goes."""
        return any(x for name, x in vars(self).items() if name != "gates")


def importance(
    graph: nnx.GraphDef,
    params: Any,
    batches: Iterable[Mapping[str, Array]],
    loss: Loss,
    *,
    norm_in_layer: bool = False,
) -> dict[str, np.ndarray]:
    """How much the loss of a sentence moves with a gate on each head and feed-forward unit.

    The mean over rows of |d loss / d gate|, to first order what a row's loss changes by when the
    gate is closed.

    Args:
        graph, params: of the model, in float.
        batches: arrays whose first axis is B.
        loss: a sum over rows, of which each depends on its own row alone.
        norm_in_layer: divides by the Euclidean norm in the layer. Then no layer as a whole matters
            more than another.

    Returns:
        By dotted name: of an attention layer (K,), its key heads with their query heads; of a
        feed-forward layer (F,).

    Source: Michel et al. 2019, arXiv 1905.10650, equation 2, and section 4.1 for norm_in_layer.
    """

    @jax.jit
    def slopes(params: Any, batch: Mapping[str, Array]) -> dict[str, Array]:
        rows = len(next(iter(batch.values())))

        def gated(gates: dict[str, Array]) -> Array:
            model = nnx.merge(graph, params)
            for name, module in prunable(model).items():
                last = _last(module)
                last.dot_general = gated_product(gates[name], last.kernel.ndim - 1)
            return loss(model, batch)

        gates = {
            name: jnp.ones((rows, _units(module)))
            for name, module in prunable(nnx.merge(graph, params)).items()
        }
        return jax.tree.map(lambda x: jnp.abs(x).sum(0), jax.grad(gated)(gates))

    total: dict[str, Any] = {}
    rows = 0
    for batch in batches:
        rows += len(next(iter(batch.values())))
        found = jax.device_get(slopes(params, batch))
        total = {name: total.get(name, 0.0) + x for name, x in found.items()}
    if norm_in_layer:
        return {name: x / max(np.linalg.norm(x), 1e-30) for name, x in total.items()}
    return {name: x / rows for name, x in total.items()}


def choose(
    scores: Mapping[str, np.ndarray], share: float, *, even: bool
) -> dict[str, np.ndarray]:
    """The units that stay, in order, of each layer: the most important; at least one.

    Args:
        scores: of `importance`.
        share: of all units, is removed.
        even: whether each layer loses as large a share, or the least important go wherever they
            are.

    Raises:
        ValueError: with one in each layer, more than that share stays.
    """
    if even:
        counts = {n: max(1, round((1 - share) * len(x))) for n, x in scores.items()}
        return {n: np.sort(np.argsort(-x)[: counts[n]]) for n, x in scores.items()}
    units = [(float(s), name, i) for name, x in scores.items() for i, s in enumerate(x)]
    removed = round(share * len(units))
    if len(units) - removed < len(scores):
        raise ValueError(
            f"heads = {share} leaves {len(units) - removed} heads to {len(scores)} layers: "
            "remove fewer, or layers."
        )
    stay = {name: set(range(len(x))) for name, x in scores.items()}
    for _, name, i in sorted(units):
        if removed and len(stay[name]) > 1:
            stay[name].remove(i)
            removed -= 1
    return {name: np.array(sorted(kept)) for name, kept in stay.items()}


def keep_units(model: nnx.Module, kept: Mapping[str, np.ndarray]) -> None:
    """Leaves only these units to the named layers, in place."""
    layers = prunable(model)
    for name, units in kept.items():
        module = layers[name]
        if isinstance(module, FeedForward):
            for wide in (module.up, module.gate):
                _take(wide, units, kernel_axis=1, bias_axis=0)
            _take(module.down, units, kernel_axis=0)
            continue
        group = module.query.kernel.shape[1] // module.key.kernel.shape[1]
        queries = (units[:, None] * group + np.arange(group)).reshape(-1)
        _take(module.query, queries, kernel_axis=1, bias_axis=0)
        for shared in (module.key, module.value):
            _take(shared, units, kernel_axis=1, bias_axis=0)
        _take(module.out, queries, kernel_axis=0)


def keep_layers(
    model: Any,
    side: str,
    count: int,
    batches: Iterable[Mapping[str, Array]],
    loss: Loss,
) -> list[int]:
    """Removes blocks of a side until `count` are left, in place: each time the one whose absence
    costs least loss.

    Args:
        model: with a list of blocks of the side's name.
        side: "encoder" or "decoder".
        count: blocks that stay.
        batches, loss: see `importance`.

    Returns:
        The places of the blocks that stay.
    """
    batches = list(batches)
    places = list(range(len(getattr(model, side))))
    if not 1 <= count <= len(places):
        raise ValueError(
            f"{side}_layers must be in 1 .. {len(places)}, those of the model; got {count}."
        )
    while len(places) > count:
        blocks = list(getattr(model, side))
        costs = []
        for i in range(len(blocks)):
            setattr(model, side, nnx.List(blocks[:i] + blocks[i + 1 :]))
            graph, params = nnx.split(model, nnx.Param)
            costs.append(sum(float(_loss(graph, params, x, loss)) for x in batches))
        least = min(
            range(len(blocks)),
            key=lambda i: math.inf if math.isnan(costs[i]) else costs[i],
        )
        setattr(model, side, nnx.List(blocks[:least] + blocks[least + 1 :]))
        del places[least]
    return places


@functools.partial(jax.jit, static_argnames=("graph", "loss"))
def _loss(graph: nnx.GraphDef, params: Any, batch: Any, loss: Loss) -> Array:
    return loss(nnx.merge(graph, params), batch)


def prunable(model: nnx.Module) -> dict[str, Any]:
    """The attention and feed-forward layers by dotted name."""
    return {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, MultiHeadAttention | FeedForward)
    }


def _last(module: Any) -> Any:
    return module.down if isinstance(module, FeedForward) else module.out


def _units(module: Any) -> int:
    if isinstance(module, FeedForward):
        return module.up.kernel.shape[1]
    return module.key.kernel.shape[1]


def gated_product(gate: Array, axes: int) -> Callable[..., Array]:
    """A product whose input (B, T, F) or (B, T, N, H) has a gate (B, units) for F or N."""

    def gated(x: Array, kernel: Array, dimensions: Any, **options) -> Array:
        each = jnp.repeat(gate, x.shape[2] // gate.shape[1], axis=1)
        each = each.reshape(len(gate), 1, -1, *[1] * (axes - 1))
        return product((x * each).astype(x.dtype), kernel, dimensions, **options)

    return gated


def _take(
    layer: Any, units: np.ndarray, *, kernel_axis: int, bias_axis: int | None = None
) -> None:
    if layer is None:
        return
    for name, axis in (("kernel", kernel_axis), ("bias", bias_axis)):
        param = getattr(layer, name)
        if param is not None and axis is not None:
            taken = jnp.take(param[...], units, axis=axis)
            setattr(layer, name, nnx.Param(taken, axes=param.get_metadata()["axes"]))
    side = "in_features" if kernel_axis == 0 else "out_features"
    size = getattr(layer, side)
    new = len(units)
    setattr(layer, side, (new, *size[1:]) if isinstance(size, tuple) else new)
