"""Models by their parts, whoever trained them, and the same models stated in other ways."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx

from qkv_jax.interop.errors import InteropError
from qkv_jax.interop.pretrained import abstract_model, flatten
from qkv_jax.models.seq2seq import Config, Model

TABLES = {"source_embedding.table", "target_embedding.table", "output.table"}
KEYS = ("key", "value")


class Weights(Protocol):
    """What is exported: a `Pretrained` or a `Trained`."""

    @property
    def config(self) -> Config: ...
    @property
    def params(self) -> Any: ...
    @property
    def start(self) -> int: ...
    @property
    def eos(self) -> int: ...
    @property
    def first(self) -> int | None: ...
    def model(self) -> Model: ...


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A model trained here.

    Attributes:
        config: of `seq2seq.Model`, vocabulary included.
        params: its `nnx.Param` state.
        start: id that every target starts from.
        eos: id that ends a target.
        first: id that every target has to begin with; None: any.
    """

    config: Config
    params: Any
    start: int = 1
    eos: int = 2
    first: int | None = None

    def model(self) -> Model:
        """The module with these weights."""
        graph = nnx.split(abstract_model(self.config), nnx.Param)[0]
        return nnx.merge(graph, self.params)


def named_arrays(model: Weights) -> dict[str, np.ndarray]:
    """Copies of its parameters by dotted name; the row of padding 0 where it counts as 0."""
    named = {
        name: np.array(jax.device_get(x), np.float32)
        for name, x in flatten(model.params).items()
    }
    if model.config.zero_pad:
        for name in TABLES & named.keys():
            named[name][model.config.pad] = 0.0
    return named


def with_all_key_heads(
    config: Config, named: Mapping[str, np.ndarray]
) -> tuple[Config, dict[str, np.ndarray]]:
    """The same computation with a key and value head for every query head.

    Raises:
        InteropError: heads differ by layer.
    """
    if config.heads_by_layer is not None:
        raise InteropError(
            "the layers have different numbers of heads, and the formats of transformers and "
            "CTranslate2 have one number a side: prune with --even-heads."
        )
    named = dict(named)
    for side in ("encoder", "decoder"):
        heads, kv_heads, _, _ = config.side(side)
        for name, x in named.items():
            if name.startswith(f"{side}.") and name.split(".")[-2] in KEYS:
                named[name] = np.repeat(x, heads // kv_heads, axis=-2)
    return dataclasses.replace(config, kv_heads=None), named
