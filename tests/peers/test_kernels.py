"""tokamax as an implementation of ours, on what it can do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("tokamax", reason="needs the extra `peers`")

from qkv_jax.ops import dot_product_attention, explain, masks, scores
from tests.ops.cases import CASES, ints
from tests.ops.test_attention import close, expected, qkv

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]
Q = jax.ShapeDtypeStruct((2, 16, 4, 8), jnp.float32)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_tokamax_can_do_equals_the_oracle(case):
    arrays = case.arrays(np.float32)
    query, key, value = arrays[:3]
    # Built within what is compiled, so that a soft cap is a number.
    reason = explain(query, key, value, mask=case.mask(), score=case.score())
    reason = reason.reasons["tokamax"]
    if not reason.startswith("can"):
        pytest.skip(f"tokamax {reason}")

    @jax.jit
    def run(query, key, value, d_out):
        options = {"mask": case.mask(), "score": case.score(), "scale": case.scale}
        out, back = jax.vjp(
            lambda *x: dot_product_attention(*x, implementation="tokamax", **options),
            query,
            key,
            value,
        )
        return out, *back(d_out)

    with jax.numpy_rank_promotion("allow"):
        found = run(*arrays[:4])
    arrays[4][:] = 0.0
    truth = expected(arrays, case)
    for got, want in zip(found, (truth.out, *truth.gradients)):
        close(got, want)


def test_gradients_reach_a_bias():
    query, key, value = qkv()
    bias = np.random.default_rng(5).normal(size=(1, 4, 5, 7)).astype(np.float32)

    def slope(implementation):
        def loss(bias):
            options = {"score": scores.bias(bias), "implementation": implementation}
            return jnp.sum(dot_product_attention(query, key, value, **options) ** 2)

        return jax.jit(jax.grad(loss))(bias)

    with jax.numpy_rank_promotion("allow"):
        close(slope("tokamax"), slope("reference"))


@pytest.mark.parametrize(
    "reason, options",
    [
        ("a pattern of its own", {"dropout_rate": 0.1}),
        ("no log-sum-exp", {"return_residuals": True}),
        ("and no other score", {"score": scores.alibi(jnp.ones(4))}),
        ("dense masks, lengths", {"mask": masks.segments(ints([1] * 16, [2] * 16))}),
    ],
)
def test_tokamax_says_what_it_cannot_do(reason, options):
    with pytest.raises(NotImplementedError, match=f"tokamax .*{reason}"):
        explain(Q, Q, Q, implementation="tokamax", **options)
