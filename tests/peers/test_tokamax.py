"""tokamax's own tests of attention, run on ours, at their own tolerances."""

import functools

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("tokamax", reason="needs the extra `peers`")

from tokamax._src.ops.attention import base, test_base

from qkv_jax.ops import dot_product_attention, masks, scores

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]


def attend(
    q,
    k,
    v,
    *,
    bias=None,
    mask=None,
    is_causal=False,
    logits_scale=None,
    logits_soft_cap=None,
    q_indices=None,
    k_indices=None,
    implementation=None,
):
    """tokamax's call, in our terms: any leading axes, indices and spans as a mask."""
    T, S = q.shape[-3], k.shape[-3]
    if is_causal and not (q_indices is None and k_indices is None):
        mask, is_causal = base.Mask(mask, is_causal=True), False
    if isinstance(mask, base.Mask):
        mask = mask.as_array(
            T if q_indices is None else q_indices, S if k_indices is None else k_indices
        )
    rule = masks.causal() if is_causal else None
    if mask is not None:
        dense = masks.dense(four_axes(mask))
        rule = dense if rule is None else rule & dense
    rules = [] if bias is None else [scores.bias(four_axes(bias))]
    if logits_soft_cap is not None:
        rules.append(scores.soft_cap(logits_soft_cap))
    out = dot_product_attention(
        *(x.reshape(-1, *x.shape[-3:]) for x in (q, k, v)),
        mask=rule,
        score=scores.chain(*rules) if rules else None,
        scale=logits_scale,
        implementation=implementation,
    )
    return out.reshape(*q.shape[:-1], v.shape[-1])


def four_axes(array):
    return (
        array.reshape(-1, *array.shape[-3:])
        if array.ndim > 3
        else array[(None,) * (4 - array.ndim)]
    )


class Theirs(test_base.AttentionTestBase):
    """Left out: dropout masks, quantised arrays, unnormalised and partial outputs, which our
    operator does not take, and their options for the products' precision and the scores' dtype.
    """

    implementation: str | None = None

    def __init__(self, *args):
        super().__init__(
            *args,
            attention_fn=functools.partial(attend, implementation=self.implementation),
            supports_dropout=False,
            supports_precisions=False,
            supports_logits_dtype=False,
        )

    def setUp(self):
        super().setUp()
        self.enterContext(jax.numpy_rank_promotion("allow"))
        # That one program gives the same twice is tested elsewhere, and takes half of the time.
        options = {"test_deterministic": False, "test_vjp_deterministic": False}
        self.enterContext(test_base.override_test_args(**options))

    def test_normalize_output(self):
        self.skipTest("our output is always normalised")

    def test_partial_attention(self):
        self.skipTest("our residual is the log-sum-exp; see ops.merge")

    def _test_quantized_int8(self, *_):
        self.skipTest("our operator takes no quantised arrays")

    _test_quantized_int4 = _test_quantized_int8


class TestChosen(Theirs):
    """With the implementation that the dispatcher chooses: blocks, at their lengths."""


del Theirs, test_base.AttentionTestBase


def test_the_adapter_runs_ours():
    q = jnp.ones((2, 3, 4, 8))
    assert attend(q, q, q, is_causal=True).shape == q.shape
