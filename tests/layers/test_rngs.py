import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qkv_jax.layers import init_rngs


def drawn(make):
    rngs = make(3)
    keys = [rngs.params(), rngs.params(), rngs.dropout(), rngs(), rngs.fork().params()]
    return jnp.stack([jax.random.key_data(key) for key in keys])


def test_the_keys_are_those_of_flax_in_a_trace_too():
    keys = np.asarray(drawn(init_rngs))
    np.testing.assert_array_equal(keys, drawn(nnx.Rngs))
    np.testing.assert_array_equal(keys, jax.jit(lambda: drawn(init_rngs))())
    assert len(np.unique(keys, axis=0)) == len(keys)


def test_counting_is_no_part_of_the_program():
    def draw():
        rngs = init_rngs(0)
        return [jax.random.key_data(rngs.params()) for _ in range(3)]

    names = {eqn.primitive.name for eqn in jax.make_jaxpr(draw)().eqns}
    assert "random_fold_in" in names
    assert not {"add", "scatter"} & names
