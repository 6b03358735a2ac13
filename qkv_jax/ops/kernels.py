"""Calls into other people's kernels: cuDNN through jax.nn, and tokamax.

They take a few masks and scores, and raise `NotImplementedError` for the rest. What they leave open
is settled here as in reference.py: rows that may attend to nothing are 0, and where a masked key
or value is not finite, `blockwise` runs in their place, for theirs would hand it on.
"""

import importlib.util
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qkv_jax.ops.blockwise import blockwise_attention
from qkv_jax.ops.masks import And, Causal, Dense, Lengths, Mask, Prefix, Window
from qkv_jax.ops.scores import Bias, Chain, Score, SoftCap

Array = jax.Array
# Of a head, that cuDNN takes on every GPU that it has attention for.
CUDNN_SIZES = range(8, 129, 8)
# Of tokamax's kernels, the first that can; its "xla" has a T x S matrix, and is not asked.
TOKAMAX = ("mosaic", "triton", "xla_chunked")


class Band(NamedTuple):
    """A mask in the terms of the kernels.

    Attributes:
        left, right: admitted are q - left <= k <= q + right; None: no bound.
        query, key: the first so many queries and keys of each row, (B,) int32; None: all.
        dense: an array of bool besides; None: none.
    """

    left: int | None = None
    right: int | None = None
    query: Array | None = None
    key: Array | None = None
    dense: Array | None = None

    def sees(self, queries: int, keys: int) -> Array | None:
        """Which rows may attend to anything, broadcasts to (B, T, N); None: all of them."""
        if all(x is None for x in self):
            return None
        q = jnp.arange(queries, dtype=jnp.int32)[None]
        first = jnp.zeros_like(q) if self.left is None else q - self.left
        last = jnp.full_like(q, keys - 1)
        last = last if self.right is None else jnp.minimum(last, q + self.right)
        last = last if self.key is None else jnp.minimum(last, self.key[:, None] - 1)
        some = jnp.maximum(first, 0) <= last
        some = some if self.query is None else some & (q < self.query[:, None])
        some = some[..., None]
        if self.dense is None:
            return some
        admitted = self.dense
        if any(x is not None for x in self[:4]):
            k = jnp.arange(keys, dtype=jnp.int32)[None, None, None]
            inside = (k >= first[:, None, :, None]) & (k <= last[:, None, :, None])
            admitted = admitted & inside
        return some & admitted.any(-1).swapaxes(1, 2)


def band(mask: Mask | None, rows: int) -> Band | None:
    """The mask of `rows` batch rows as a `Band`; None: it is not one."""
    match mask:
        case None:
            return Band()
        case Causal():
            return Band(right=mask.offset)
        case Window():
            return Band(left=mask.left, right=mask.right)
        case Prefix():
            return Band(key=jnp.full((rows,), mask.length, jnp.int32))
        case Lengths():
            return Band(query=_int32(mask.query), key=_int32(mask.key))
        case Dense():
            return Band(dense=mask.array)
        case And():
            one, other = band(mask.left, rows), band(mask.right, rows)
            if one is None or other is None:
                return None
            least = [jnp.minimum] * 2 + [jnp.logical_and]
            return Band(
                *(_both(a, b, min) for a, b in zip(one[:2], other[:2])),
                *(_both(a, b, how) for a, b, how in zip(one[2:], other[2:], least)),
            )
    return None


def why_not_cudnn(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: Mask | None,
    score: Score | None,
    dropout_rate: float,
    return_residuals: bool,
) -> str | None:
    """What cuDNN cannot do of this; None: it can do it all."""
    B, _, _, H = query.shape
    if jax.default_backend() != "gpu":
        return f"needs a GPU; JAX runs on {jax.default_backend()!r}"
    if query.dtype not in (jnp.float16, jnp.bfloat16):
        return f"takes float16 and bfloat16; got {query.dtype}"
    if H not in CUDNN_SIZES or value.shape[3] != H:
        return (
            f"takes H = E, a multiple of 8 up to 128; got H = {H}, E = {value.shape[3]}"
        )
    if query.size * key.size == 0:
        return "takes no empty arrays"
    if dropout_rate > 0.0:
        return "drops weights by a pattern of its own"
    if return_residuals:
        return "gives no gradient to the log-sum-exp"
    if score is not None:
        return "takes no rule on scores"
    known = band(mask, B)
    lengths_and_band = "takes masks of lengths, causal(), window(n, 0), and their `&`"
    if known is None or known.dense is not None:
        return lengths_and_band
    causal = known.right == 0 and (known.left is None or known.left >= 0)
    if not causal and (known.left, known.right) != (None, None):
        return lengths_and_band
    return None


def cudnn_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: Mask | None,
    score: Score | None,
    scale: float,
    dropout_rate: float,
    dropout_rng: Array | None,
) -> tuple[Array, Array | None]:
    """Attention by cuDNN, without the log-sum-exp. `why_not_cudnn` has said that it can.

    Source: `jax.nn.dot_product_attention(implementation="cudnn")`.
    """
    known = _known(mask, query, key)

    def kernel(query, key, value):
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            scale=scale,
            is_causal=known.right == 0,
            query_seq_lengths=known.query,
            key_value_seq_lengths=known.key,
            local_window_size=None if known.left is None else (known.left, 0),
            implementation="cudnn",
        )

    return _settled(kernel, query, key, value, mask, score, scale, known), None


def why_not_tokamax(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: Mask | None,
    score: Score | None,
    dropout_rate: float,
    return_residuals: bool,
) -> str | None:
    """What tokamax cannot do of this; None: it can do it all."""
    if importlib.util.find_spec("tokamax") is None:
        return "is not installed: pip install 'qkv_jax[kernels]'"
    if query.size * key.size * value.size == 0:
        return "takes no empty arrays"
    if query.dtype == jnp.float64:
        return "takes no float64"
    if dropout_rate > 0.0:
        return "drops weights by a pattern of its own"
    if return_residuals:
        return "gives no log-sum-exp"
    if _bias_and_cap(score) is None:
        return "takes bias(array), soft_cap(number), or the two chained, and no other score"
    known = band(mask, query.shape[0])
    if known is None or any(x is not None and x < 0 for x in known[:2]):
        return "takes dense masks, lengths, causal(), window(m, n), and their `&`"
    return None


def tokamax_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: Mask | None,
    score: Score | None,
    scale: float,
    dropout_rate: float,
    dropout_rng: Array | None,
) -> tuple[Array, Array | None]:
    """Attention by tokamax, without the log-sum-exp. `why_not_tokamax` has said that it can.

    Source: `tokamax.dot_product_attention`.
    """
    import tokamax
    from absl import flags

    if not flags.FLAGS.is_parsed():
        # Else tokamax reads the program's own command line, and fails on what it does not know.
        flags.FLAGS.mark_as_parsed()
    known = _known(mask, query, key)
    bias, cap = _bias_and_cap(score) or (None, None)

    def kernel(query, key, value, bias):
        far = query.shape[1] + key.shape[1]
        window = tuple(far if x is None else x for x in known[:2])
        return tokamax.dot_product_attention(
            query,
            key,
            value,
            bias,
            known.dense,
            scale=scale,
            is_causal=known[:2] == (None, 0),
            query_seq_lengths=known.query,
            key_value_seq_lengths=known.key,
            local_window_size=None
            if known[:2] in ((None, None), (None, 0))
            else window,
            logits_soft_cap=cap,
            implementation=TOKAMAX,
        )

    return _settled(kernel, query, key, value, mask, score, scale, known, bias), None


def _known(mask: Mask | None, query: Array, key: Array) -> Band:
    """The mask as a band, its arrays' shapes checked."""
    (B, T, N, _), S = query.shape, key.shape[1]
    if mask is not None:
        jax.eval_shape(lambda: mask.materialise((B, N, T, S)))
    known = band(mask, B)
    assert known is not None
    return known


def _settled(
    kernel: Any,
    query: Array,
    key: Array,
    value: Array,
    mask: Mask | None,
    score: Score | None,
    scale: float,
    known: Band,
    *more: Any,
) -> Array:
    """What a kernel gives, with this package's meaning of empty rows and of NaN behind a mask."""

    def theirs(query, key, value, more):
        out = kernel(query, key, value, *more).astype(query.dtype)
        sees = known.sees(query.shape[1], key.shape[1])
        return out if sees is None else jnp.where(sees[..., None], out, 0)

    def ours(query, key, value, more):
        return blockwise_attention(
            query,
            key,
            value,
            mask=mask,
            score=score,
            scale=scale,
            dropout_rate=0.0,
            dropout_rng=None,
        )[0]

    query, key, value = map(jnp.asarray, (query, key, value))
    if mask is None:
        return theirs(query, key, value, more)
    clean = jnp.all(jnp.isfinite(key)) & jnp.all(jnp.isfinite(value))
    return jax.lax.cond(clean, theirs, ours, query, key, value, more)


def _bias_and_cap(score: Score | None) -> tuple[Array | None, float | None] | None:
    """The bias that is added and the cap that follows; None: the rule is another."""
    match score:
        case None:
            return None, None
        case Bias():
            return score.array, None
        case SoftCap() if not isinstance(score.value, jax.core.Tracer):
            return None, float(score.value)
        case Chain(rules=(Bias() as bias, SoftCap() as cap)):
            both = _bias_and_cap(cap)
            return None if both is None else (bias.array, both[1])
    return None


def _int32(lengths: Array | None) -> Array | None:
    return None if lengths is None else lengths.astype(jnp.int32)


def _both(one: Any, other: Any, how: Any) -> Any:
    """The stricter of two bounds, either of which may be None."""
    if one is None or other is None:
        return other if one is None else one
    return how(one, other)
