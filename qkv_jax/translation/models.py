"""The models that translate: what each configuration builds."""

import functools
import hashlib
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from qkv_jax import training
from qkv_jax.compression import (
    GateConfig,
    Quantisation,
    add_gates,
    fold_gates,
    quantise,
)
from qkv_jax.layers import init_rngs
from qkv_jax.models import recurrent, seq2seq

ModelConfig = seq2seq.Config | recurrent.Config
FLOAT = Quantisation()
UNGATED = GateConfig()


def new_model(config: ModelConfig, *, seed: int) -> Any:
    """The module of a configuration, with new parameters."""
    kind: Any = recurrent if isinstance(config, recurrent.Config) else seq2seq
    return kind.Model(config, rngs=init_rngs(seed))


def init_params(config: ModelConfig, *, seed: int) -> Any:
    """The parameters of a new model."""
    return nnx.state(new_model(config, seed=seed), nnx.Param)


def model_graph(
    config: ModelConfig, how: Quantisation = FLOAT, gates: GateConfig = UNGATED
) -> nnx.GraphDef:
    """The static half of the model, quantised or gated so; its parameters are not made."""
    return _halves(config, how, gates)[0]


def model_shapes(
    config: ModelConfig, how: Quantisation = FLOAT, gates: GateConfig = UNGATED
) -> Any:
    """The parameters of the model, quantised or gated so, as shapes and dtypes."""
    return _halves(config, how, gates)[1]


def param_count(config: ModelConfig) -> int:
    """Numbers that the model learned."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(model_shapes(config)))


def params_digest(params: Any) -> str:
    """SHA-256 of the names, kinds and values of parameters, which are fetched to the host."""
    whole = hashlib.sha256()
    for name, x in training.flatten(params).items():
        whole.update(f"{name} {x.dtype} {x.shape}\n".encode())
        whole.update(np.ascontiguousarray(x).tobytes())
    return whole.hexdigest()


def quantised_params(config: ModelConfig, params: Any, how: Quantisation) -> Any:
    """Float parameters of the model -> those of the quantised one."""
    if how.weights is None:
        return params

    @jax.jit
    def convert(params: Any) -> Any:
        model = nnx.merge(model_graph(config), params)
        quantise(model, how)
        return nnx.state(model, nnx.Param)

    return convert(params)


def gated_params(config: ModelConfig, params: Any, gates: GateConfig) -> Any:
    """Parameters of the model -> the same and those of its gates."""
    if not gates.on:
        return params
    model = nnx.merge(model_graph(config), params)
    add_gates(model, gates)
    return nnx.state(model, nnx.Param)


def folded_params(config: ModelConfig, params: Any, gates: GateConfig) -> Any:
    """What `gated_params` made, trained -> parameters of the model, which then does as gated."""
    if not gates.on:
        return params

    @jax.jit
    def fold(params: Any) -> Any:
        model = nnx.merge(model_graph(config, gates=gates), params)
        fold_gates(model, gates)
        return nnx.state(model, nnx.Param)

    return fold(params)


def check_mesh(config: ModelConfig, mesh: Mapping[str, int]) -> None:
    """Raises ValueError where a mesh, given by its axes' sizes, does not fit the model."""
    kind: Any = recurrent if isinstance(config, recurrent.Config) else seq2seq
    kind.check_mesh(config, mesh)


@functools.cache
def _halves(
    config: ModelConfig, how: Quantisation, gates: GateConfig
) -> tuple[nnx.GraphDef, Any]:
    def make() -> Any:
        model = new_model(config, seed=0)
        if how.weights is not None:
            quantise(model, how)
        if gates.on:
            add_gates(model, gates)
        return model

    return nnx.split(nnx.eval_shape(make), nnx.Param)
