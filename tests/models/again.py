"""Whether a model whose blocks are a loop, or computed again, is the model that it was."""

from typing import Any

import jax
import numpy as np
from flax import nnx

from tests.jaxprs import equations


def compute_the_same(plain: Any, other: Any, batch: Any) -> None:
    """Asserts that two models have the same loss and gradients, without dropout."""
    found, expected = (
        jax.jit(jax.value_and_grad(_loss(model)))(nnx.split(model)[1], batch)
        for model in (other, plain)
    )
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
        found,
        expected,
    )


def count(model: Any, batch: Any, *names: str) -> int:
    """How many equations of its gradient have one of these names."""
    program = jax.make_jaxpr(jax.grad(_loss(model)))(nnx.split(model)[1], batch)
    return sum(e.primitive.name in names for e in equations(program.jaxpr))


def _loss(model: Any) -> Any:
    graph = nnx.split(model)[0]
    return lambda params, batch: nnx.merge(graph, params).loss(batch, rng=None)[0]
