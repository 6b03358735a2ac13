"""FlexAttention's functions, each said as a mask or a score, against the oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax.ops import blockwise, dot_product_attention, scores
from tests.ops import oracle
from tests.ops.flex_rows import ARRAYS, INDIRECT, ROWS, H, T
from tests.ops.test_attention import close

# Each program runs once, on little: all of the time is the compiler's.
FAST = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}


def loss(row, arrays):
    """What the pull-back in `pulled` is of."""
    result = expected(row, arrays)
    seen = np.isfinite(result.logsumexp)
    return np.sum(result.out * ARRAYS[3]) + result.logsumexp[seen] @ ARRAYS[4][seen]


def expected(row, arrays):
    def curve(score, b, h, q, k):
        return row.curve(score, b, h, q, k, *arrays)

    return oracle.attention(*ARRAYS, rule=row.rule, curve=curve, scale=None)


@functools.cache
def truth(row):
    """Of a row: the oracle's result, a direction of its captured arrays, and the slope along it."""
    rng = np.random.default_rng(1)
    direction = [rng.normal(size=x.shape) for x in row.arrays]
    up, down = (
        loss(row, [x + step * d for x, d in zip(row.arrays, direction)])
        for step in (1e-5, -1e-5)
    )
    return expected(row, row.arrays), direction, (up - down) / 2e-5


def pulled(form, arrays, implementation):
    """Output, log-sum-exp, and gradients of query, key, value and the captured arrays."""

    @functools.partial(jax.jit, compiler_options=FAST)
    def run(inputs, captured, cotangents):
        def attend(inputs, captured):
            options = form(*captured) | {"implementation": implementation}
            return dot_product_attention(*inputs, return_residuals=True, **options)

        result, back = jax.vjp(attend, inputs, captured)
        return result, back(cotangents)

    return run(ARRAYS[:3], arrays, ARRAYS[3:])


def fast(number, row):
    """The form of a row that `make test` has: by turns the modifier of scores and the predicate."""
    written_out = [name for name in row.forms if name != "built in"] or list(row.forms)
    return written_out[number % len(written_out)]


FORMS = [
    pytest.param(
        row,
        form,
        id=f"{row.name}-{name}",
        marks=[] if name == fast(number, row) else [pytest.mark.slow],
    )
    for number, row in enumerate(ROWS)
    for name, form in row.forms.items()
]


@pytest.mark.parametrize("row, form", FORMS)
def test_values_and_gradients_equal_the_oracle(row, form, monkeypatch):
    monkeypatch.setattr(blockwise, "choose_blocks", lambda *_: (3, 3))
    wanted, direction, slope = truth(row)
    captured = []
    with jax.enable_x64(True):
        for implementation in ("reference", "blockwise"):
            (out, logsumexp), (gradients, slopes) = pulled(
                form, row.arrays, implementation
            )
            close(out, wanted.out, "float64")
            close(logsumexp, wanted.logsumexp, "float64")
            for got, want in zip(gradients, wanted.gradients):
                close(got, want, "float64")
            captured.append(slopes)
    for dense, blocked, way in zip(*captured, direction):
        close(blocked, np.asarray(dense), "float64")
    along = sum(np.sum(np.asarray(x) * way) for x, way in zip(captured[0], direction))
    np.testing.assert_allclose(along, slope, rtol=1e-6, atol=1e-8)


def test_numpy_integers_are_captured_within_a_compiled_gradient():
    def loss(query):
        rule = scores.modifier(lambda s, b, h, q, k, at: s + at[q], INDIRECT)
        return jnp.sum(
            dot_product_attention(
                query, query, query, score=rule, implementation="blockwise"
            )
        )

    assert jax.jit(jax.grad(loss))(jnp.ones((1, T, 1, H))).shape == (1, T, 1, H)
