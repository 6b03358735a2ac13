"""The models that translate: what each configuration builds."""

import functools
from collections.abc import Mapping
from typing import Any

from flax import nnx

from qkv_jax.models import recurrent, seq2seq

ModelConfig = seq2seq.Config | recurrent.Config


def new_model(config: ModelConfig, *, seed: int) -> Any:
    """The module of a configuration, with new parameters."""
    kind: Any = recurrent if isinstance(config, recurrent.Config) else seq2seq
    return kind.Model(config, rngs=nnx.Rngs(seed))


def init_params(config: ModelConfig, *, seed: int) -> Any:
    """The parameters of a new model."""
    return nnx.state(new_model(config, seed=seed), nnx.Param)


def model_graph(config: ModelConfig) -> nnx.GraphDef:
    """The static half of the model; its parameters are not made."""
    return _halves(config)[0]


def model_shapes(config: ModelConfig) -> Any:
    """The parameters of the model as shapes and dtypes."""
    return _halves(config)[1]


def check_mesh(config: ModelConfig, mesh: Mapping[str, int]) -> None:
    """Raises ValueError where a mesh, given by its axes' sizes, does not fit the model."""
    kind: Any = recurrent if isinstance(config, recurrent.Config) else seq2seq
    kind.check_mesh(config, mesh)


@functools.cache
def _halves(config: ModelConfig) -> tuple[nnx.GraphDef, Any]:
    model = nnx.eval_shape(functools.partial(new_model, config, seed=0))
    return nnx.split(model, nnx.Param)
