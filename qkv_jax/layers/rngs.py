"""The random keys that a model's parameters are drawn with."""

import jax
from flax import nnx


def init_rngs(seed: int) -> nnx.Rngs:
    """nnx.Rngs(seed), which count the keys they give in Python.

    The keys are the same. Flax counts in an array: where a model is made under jit or eval_shape each
    key costs a look at the whole program so far, so that tracing takes time that is quadratic in
    the number of parameters.
    """
    rngs = nnx.Rngs(seed)
    for tag in list(rngs):
        setattr(rngs, tag, _Stream(seed, tag=tag))
    return rngs


class _Stream(nnx.RngStream):
    def __init__(self, key: jax.Array | int, *, tag: str):
        super().__init__(key, tag=tag)
        self.given = 0

    def __call__(self) -> jax.Array:
        key = jax.random.fold_in(self.key[...], self.given)
        self.given += 1
        return key
