"""Gates on attention heads that training closes: which heads a model needs is learned."""

import dataclasses
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qkv_jax.compression.prune import gated_product
from qkv_jax.layers import MultiHeadAttention

Array = jax.Array
NAME = "gate_logits"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GateConfig:
    """A gate on each attention head's output, which costs loss while it is open.

    In training a gate is drawn, anew for each row of a batch, from a distribution that has mass at
    exactly 0 and 1 (hard concrete); in evaluation it is one number. Heads whose gate is then 0 are
    closed, and may be removed. Where query heads share a key head, they share a gate.

    Attributes:
        penalty: what an open gate adds to the loss a token, times its probability of being open,
            in all layers; None: there are no gates.
        start: the logit that gates start from; 2 draws 0 in 3 of 100 cases.
        speed: how much faster logits move than parameters: they are speed times what is trained.
        temperature: of the distribution; towards 0, gates are drawn as 0 or 1.
        stretch: how far the distribution reaches beyond 0 and 1 before it is clipped to them.

    Source: Voita et al. 2019, arXiv 1905.09418, section 5; Louizos et al. 2018, arXiv 1712.01312,
    equations 10 to 13. Difference: gates are drawn for each row, where they draw one for all.
    """

    penalty: float | None = None
    start: float = 2.0
    speed: float = 50.0
    temperature: float = 2 / 3
    stretch: float = 0.1

    def __post_init__(self):
        if self.penalty is None:
            for field in dataclasses.fields(self):
                if getattr(self, field.name) != field.default:
                    raise ValueError(f"{field.name} is of gates: give penalty.")
            return
        if not (math.isfinite(self.penalty) and self.penalty >= 0):
            raise ValueError(
                f"penalty must not be negative, or None; got {self.penalty}."
            )
        for name in ("speed", "temperature", "stretch"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}.")
        if not math.isfinite(self.start):
            raise ValueError(f"start must be finite; got {self.start}.")

    @property
    def on(self) -> bool:
        """Whether there are gates."""
        return self.penalty is not None

    def draw(self, logits: Array, rows: int, rng: Array) -> Array:
        """Gates for training: (K,) -> (rows, K) in [0, 1]."""
        tiny = jnp.finfo(jnp.float32).tiny
        u = jax.random.uniform(rng, (rows, *logits.shape), minval=tiny)
        noise = jnp.log(u) - jnp.log1p(-u)
        return self._clip((noise + logits[None]) / self.temperature)

    def value(self, logits: Array) -> Array:
        """Gates for evaluation: (K,) -> (K,) in [0, 1]."""
        return self._clip(logits)

    def open(self, logits: Array) -> Array:
        """The probability that a gate is drawn above 0: (K,) -> (K,)."""
        edge = self.temperature * math.log(self.stretch / (1.0 + self.stretch))
        return jax.nn.sigmoid(logits - edge)

    def _clip(self, logits: Array) -> Array:
        stretched = jax.nn.sigmoid(logits) * (1.0 + 2.0 * self.stretch) - self.stretch
        return jnp.clip(stretched, 0.0, 1.0)


def add_gates(model: nnx.Module, how: GateConfig) -> None:
    """Gives each attention layer the logits of its gates, in place."""
    for _, layer in _layers(model):
        logits = jnp.full(layer.key.kernel.shape[1], how.start / how.speed)
        setattr(layer, NAME, nnx.Param(logits, axes=("kv_heads",)))


def apply_gates(
    model: nnx.Module, how: GateConfig, rows: int, rng: Array | None
) -> Array:
    """Makes a model with gates compute with them, in place, within a loss.

    Args:
        model: see `add_gates`.
        how: its gates.
        rows: B, of the batch.
        rng: draws them; None: they are as in evaluation.

    Returns:
        () float32: the expected number of open gates; with rng None, their number.
    """
    number = jnp.zeros(())
    for name, layer in _layers(model):
        logits = how.speed * getattr(layer, NAME)[...]
        if rng is None:
            gates = jnp.broadcast_to(how.value(logits)[None], (rows, *logits.shape))
            number += (how.value(logits) > 0).sum()
        else:
            drawn = jax.random.fold_in(rng, zlib.crc32(f"{name}.{NAME}".encode()))
            gates = how.draw(logits, rows, drawn)
            number += how.open(logits).sum()
        layer.out.dot_general = gated_product(gates, layer.out.kernel.ndim - 1)
    return number


def fold_gates(model: nnx.Module, how: GateConfig) -> None:
    """Multiplies each head's part of the output projection by its gate, and removes the gates.

    In place. The model computes what it did in evaluation, and is one that never had gates.
    """
    for _, layer in _layers(model):
        gates = how.value(how.speed * getattr(layer, NAME)[...])
        kernel = layer.out.kernel
        each = jnp.repeat(gates, kernel.shape[0] // gates.shape[0])
        kernel[...] = kernel[...] * each[:, None, None]
        delattr(layer, NAME)


def writing_heads(model: nnx.Module) -> dict[str, np.ndarray]:
    """How much each head writes: the norm of its part of the output projection.

    Returns:
        By dotted name of an attention layer (K,), of key heads with their query heads; exactly 0
        where the gate of a head is closed.
    """
    found = {}
    for name, layer in _layers(model):
        kernel = np.asarray(layer.out.kernel[...], np.float64)
        found[name] = np.linalg.norm(
            kernel.reshape(layer.key.kernel.shape[1], -1), axis=1
        )
    return found


def open_heads(norms: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The heads that write anything, of each layer; one where none does.

    Args:
        norms: of `writing_heads`.

    Raises:
        ValueError: all heads do.
    """
    if all(norm.all() for norm in norms.values()):
        count = sum(map(len, norms.values()))
        raise ValueError(
            f"gates: none of the {count} heads is closed: train with gates.penalty, or with a "
            "larger one, or for longer."
        )
    return {
        name: np.flatnonzero(norm) if norm.any() else np.array([0])
        for name, norm in norms.items()
    }


def _layers(model: nnx.Module) -> list[tuple[str, Any]]:
    return [
        (".".join(map(str, path)), module)
        for path, module in nnx.iter_modules(model)
        if isinstance(module, MultiHeadAttention)
    ]
