"""Attention along the arcs of a graph: GAT, GATv2 and scaled dot products, from edge lists.

Axes: P nodes that ask (receivers), S nodes that are looked at (senders; P and S may be the same
nodes), A arcs, N heads, H size. An arc a lets node `receivers[a]` look at node `senders[a]`; arcs
that are listed twice count twice. Cost: O(A N H) time and memory.

Graphs in a batch are one graph of several components; or `jax.vmap` over arrays filled up with
arcs that `arc_mask` rules out.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from qkv_jax.ops.dropout import keep

Array = jax.Array


def segment_softmax(
    logits: Array, segments: Array, count: int, *, where: Array | None = None
) -> Array:
    """The softmax of logits (A, ...) among the arcs of each segment, over the first axis.

    Args:
        logits: (A, ...) floating.
        segments: (A,) int, 0 .. count - 1.
        count: of segments.
        where: (A,) bool; False has weight 0. None: all count.

    Returns:
        (A, ...), float32 at least.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    allowed = jnp.ones(logits.shape[:1], bool) if where is None else where
    allowed = allowed.reshape(-1, *(1,) * (logits.ndim - 1))
    logits = jnp.where(allowed, logits, -jnp.inf)
    top = jax.ops.segment_max(jax.lax.stop_gradient(logits), segments, count)
    top = jnp.where(top == -jnp.inf, 0.0, top)
    weights = jnp.where(allowed, jnp.exp(logits - top[segments]), 0.0)
    total = jax.ops.segment_sum(weights, segments, count)
    return weights / jnp.where(total == 0.0, 1.0, total)[segments]


def gat_attention(
    target: Array,
    source: Array,
    a_target: Array,
    a_source: Array,
    *,
    receivers: Array,
    senders: Array,
    arc_mask: Array | None = None,
    negative_slope: float = 0.2,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
) -> Array:
    """Graph attention: weights by leaky_relu(a_target . target + a_source . source).

    Args:
        target: (P, N, H) floating, projected features of the nodes that ask.
        source: (S, N, H), projected features of the nodes looked at; also the values.
        a_target, a_source: (N, H), the two halves of the paper's vector a.
        receivers, senders: (A,) int, see above.
        arc_mask: (A,) bool; False: the arc is not there. Its sender may hold NaN.
        negative_slope: of the leaky ReLU.
        dropout_rate: probability that a weight is dropped, in [0, 1); the pattern depends on
            (rng, head, receiver, sender) alone.
        dropout_rng: a `jax.random` key; needed when dropout_rate > 0.

    Returns:
        (P, N, H), dtype of source; a node without arcs gets exactly 0.

    Source: Velickovic et al. 2018, arXiv 1710.10903, eq. 1 to 4.
    """
    _expect("a_target", a_target, target.shape[1:])
    _expect("a_source", a_source, source.shape[1:])

    def score(target: Array, source: Array) -> Array:
        pair = jnp.sum(target * a_target[None], -1) + jnp.sum(
            source * a_source[None], -1
        )
        return jax.nn.leaky_relu(pair, negative_slope)

    return _attend(
        target,
        source,
        source,
        score,
        (receivers, senders, arc_mask),
        (dropout_rate, dropout_rng),
    )


def gatv2_attention(
    target: Array,
    source: Array,
    a: Array,
    *,
    receivers: Array,
    senders: Array,
    arc_mask: Array | None = None,
    negative_slope: float = 0.2,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
) -> Array:
    """Dynamic graph attention: weights by a . leaky_relu(target + source).

    Args:
        a: (N, H).
        target, source, and the others: as for `gat_attention`.

    Returns:
        (P, N, H), dtype of source; a node without arcs gets exactly 0.

    Source: Brody et al. 2022, arXiv 2105.14491, eq. 7.
    """
    _expect("a", a, target.shape[1:])

    def score(target: Array, source: Array) -> Array:
        return jnp.sum(a[None] * jax.nn.leaky_relu(target + source, negative_slope), -1)

    return _attend(
        target,
        source,
        source,
        score,
        (receivers, senders, arc_mask),
        (dropout_rate, dropout_rng),
    )


def arc_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    receivers: Array,
    senders: Array,
    arc_mask: Array | None = None,
    bias: Array | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
) -> Array:
    """Scaled dot-product attention along arcs: what a dense mask of the graph would give.

    Args:
        query: (P, N, H) floating.
        key: (S, N, H), dtype of query.
        value: (S, N, E), dtype of query.
        bias: (A, N) floating, added to the scaled scores, differentiable.
        scale: default H ** -0.5.
        receivers, senders, arc_mask, dropout_rate, dropout_rng: as for `gat_attention`.

    Returns:
        (P, N, E), dtype of value; a node without arcs gets exactly 0.
    """
    if bias is not None:
        _expect("bias", bias, (receivers.shape[0], query.shape[1]))
    size = query.shape[-1] ** -0.5 if scale is None else scale

    def score(query: Array, key: Array) -> Array:
        scores = jnp.sum(query * key, -1) * size
        return scores if bias is None else scores + bias

    return _attend(
        query,
        key,
        value,
        score,
        (receivers, senders, arc_mask),
        (dropout_rate, dropout_rng),
    )


def _attend(
    target: Array,
    source: Array,
    value: Array,
    score: Callable[[Array, Array], Array],
    arcs: tuple[Array, Array, Array | None],
    dropout: tuple[float, Array | None],
) -> Array:
    (receivers, senders, arc_mask), (rate, rng) = arcs, dropout
    _check(target, source, value, *arcs)
    if rate > 0.0 and rng is None:
        raise ValueError(
            "dropout_rng must be a jax.random key when dropout_rate > 0; got None."
        )
    count, heads = target.shape[:2]
    wide = jnp.promote_types(value.dtype, jnp.float32)
    asked, seen, values = (
        x.astype(wide)[at]
        for x, at in ((target, receivers), (source, senders), (value, senders))
    )
    if arc_mask is not None:
        there = arc_mask[:, None, None]
        asked, seen, values = (jnp.where(there, x, 0.0) for x in (asked, seen, values))
    weights = segment_softmax(score(asked, seen), receivers, count, where=arc_mask)
    if rate > 0.0 and rng is not None:
        head = jnp.arange(heads, dtype=jnp.int32)[None]
        kept = keep(rng, rate, head, receivers[:, None], senders[:, None])
        weights = jnp.where(kept, weights / (1.0 - rate), 0.0)
    out = jax.ops.segment_sum(weights[..., None] * values, receivers, count)
    return out.astype(value.dtype)


def _check(target, source, value, receivers, senders, arc_mask) -> None:
    for name, array in (("target", target), ("source", source), ("value", value)):
        if array.ndim != 3 or array.shape[1] != target.shape[1]:
            raise ValueError(
                f"{name} must be (nodes, N, H) with target's N; got shape {array.shape}, "
                f"target has {target.shape}."
            )
    if target.shape[2] != source.shape[2]:
        raise ValueError(
            f"target and source must agree in H; got {target.shape} and {source.shape}."
        )
    _expect("value's nodes", value[:, 0, 0], source.shape[:1])
    for name, array in (("receivers", receivers), ("senders", senders)):
        if array.ndim != 1 or not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(
                f"{name} must be (A,) int; got shape {array.shape}, {array.dtype}."
            )
    _expect("senders", senders, receivers.shape)
    if arc_mask is not None:
        _expect("arc_mask", arc_mask, receivers.shape)


def _expect(name: str, array: Array, shape: tuple[int, ...]) -> None:
    if jnp.shape(array) != shape:
        raise ValueError(f"{name} must have shape {shape}; got {jnp.shape(array)}.")
