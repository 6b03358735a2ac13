"""Other people's kernels: what is asked of them, and what is settled around them.

cuDNN itself needs a GPU; here jax.nn's dense form stands in for it, behind the same call.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax.ops import dot_product_attention, explain, kernels, masks, scores
from tests.ops.cases import CASES, ints
from tests.ops.test_attention import close, expected

Q = jax.ShapeDtypeStruct((2, 16, 4, 8), jnp.bfloat16)
CUDNN_CASES = [
    case for case in CASES if case.bf16 and case.E == case.H and case.scale is None
]


@pytest.fixture
def stand_in(monkeypatch):
    """A GPU whose cuDNN is jax.nn's dense form, and takes any size."""
    theirs = jax.nn.dot_product_attention
    asked = []

    @functools.wraps(theirs)
    def dense(*args, implementation, **options):
        assert implementation == "cudnn"
        asked.append(options)
        return theirs(*args, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", dense)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    return asked


BANDS = [
    masks.causal(),
    masks.causal(-2),
    masks.window(2, -1),
    masks.window(1, 3) & masks.causal(1),
    masks.prefix(0),
    masks.lengths(ints(3, 5), ints(0, 4)) & masks.window(1, 0),
    masks.lengths(ints(3, 5)) & masks.lengths(ints(4, 2)),
    masks.dense(np.eye(5, 6, 2, dtype=bool)[None, None]) & masks.causal(2),
    masks.prefix(4) & masks.dense(np.tri(5, 6, -1, bool)[None, None]),
]


@pytest.mark.parametrize("mask", BANDS)
def test_a_band_knows_the_rows_that_see_nothing(mask):
    shape = (2, 3, 5, 6)
    rows = np.broadcast_to(mask.materialise(shape), shape).any(-1).swapaxes(1, 2)
    sees = kernels.band(mask, 2).sees(5, 6)
    np.testing.assert_array_equal(np.broadcast_to(sees, (2, 5, 3)), rows)


def test_without_a_mask_all_rows_see_something():
    assert kernels.band(None, 2).sees(5, 6) is None


@pytest.mark.parametrize(
    "mask",
    [masks.segments(ints([1], [2])), ~masks.causal(), masks.causal() | masks.prefix(2)],
)
def test_other_masks_are_no_bands(mask):
    assert kernels.band(mask & masks.causal(), 2) is None


def test_cudnn_needs_a_gpu():
    with pytest.raises(
        NotImplementedError, match="cudnn needs a GPU; JAX runs on 'cpu'"
    ):
        explain(Q, Q, Q, implementation="cudnn")


@pytest.mark.parametrize(
    "reason, options",
    [
        ("a pattern of its own", {"dropout_rate": 0.1}),
        ("no gradient to the log-sum-exp", {"return_residuals": True}),
        ("no rule on scores", {"score": scores.soft_cap(3.0)}),
        ("masks of lengths", {"mask": masks.window(3, 1)}),
        ("masks of lengths", {"mask": masks.causal(1)}),
        ("masks of lengths", {"mask": masks.segments(ints([1] * 16, [2] * 16))}),
        ("masks of lengths", {"mask": np.ones((1, 1, 16, 16), bool)}),
    ],
)
def test_cudnn_says_what_it_cannot_do(stand_in, reason, options):
    with pytest.raises(NotImplementedError, match=f"cudnn .*{reason}"):
        explain(Q, Q, Q, implementation="cudnn", **options)
    assert explain(Q, Q, Q, **options).implementation == "reference"


@pytest.mark.parametrize(
    "shape, dtype, reason",
    [
        ((2, 16, 4, 8), jnp.float32, "takes float16 and bfloat16; got float32"),
        ((2, 16, 4, 12), jnp.bfloat16, "a multiple of 8 up to 128; got H = 12"),
        ((2, 0, 4, 8), jnp.bfloat16, "takes no empty arrays"),
    ],
)
def test_cudnn_says_which_arrays_it_cannot_take(stand_in, shape, dtype, reason):
    array = jax.ShapeDtypeStruct(shape, dtype)
    assert reason in explain(array, array, array).reasons["cudnn"]


def test_a_gpu_chooses_cudnn_where_it_can(stand_in):
    found = explain(Q, Q, Q, mask=masks.causal() & masks.lengths(key=ints(3, 5)))
    assert found.implementation == "cudnn"
    query = jnp.ones(Q.shape, Q.dtype)
    dot_product_attention(query, query, query, mask=masks.causal())
    assert stand_in[0]["is_causal"] and stand_in[0]["query_seq_lengths"] is None


@pytest.mark.parametrize("case", CUDNN_CASES, ids=lambda case: case.name)
def test_what_cudnn_can_do_equals_the_oracle(stand_in, monkeypatch, case):
    monkeypatch.setattr(kernels, "CUDNN_SIZES", range(1, 129))
    arrays = case.arrays(jnp.bfloat16)
    query, key, value = (jnp.asarray(x) for x in arrays[:3])
    mask, score = case.mask(), case.score()
    reason = explain(query, key, value, mask=mask, score=score).reasons["cudnn"]
    if not reason.startswith("can"):
        pytest.skip(f"cudnn {reason}")

    @jax.jit
    def run(query, key, value, d_out, mask):
        options = {"mask": mask, "implementation": "cudnn"}
        out, back = jax.vjp(
            lambda *x: dot_product_attention(*x, **options), query, key, value
        )
        return out, *back(d_out)

    arrays[4][:] = 0.0
    truth = expected(arrays, case)
    for got, want in zip(run(*arrays[:4], mask), (truth.out, *truth.gradients)):
        close(got, want, "bfloat16")


def test_nan_behind_a_mask_stays_there(stand_in):
    rng = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(rng.normal(size=(2, 16, 4, 8)), jnp.bfloat16) for _ in range(3)
    )
    key, value = key.at[:, 9].set(jnp.nan), value.at[:, 12].set(jnp.inf)
    mask = masks.causal() & masks.lengths(key=ints(9, 8))

    def run(implementation):
        def loss(*x):
            out = dot_product_attention(*x, mask=mask, implementation=implementation)
            return jnp.sum(out.astype(jnp.float32)), out

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(query, key, value)

    found, wanted = run("cudnn"), run("reference")
    assert np.isfinite(np.asarray(found[1], np.float32)).all()
    jax.tree.map(
        lambda x, y: close(x, np.asarray(y, np.float64), "bfloat16"), found, wanted
    )
