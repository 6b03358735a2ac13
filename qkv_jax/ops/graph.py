"""Attention along the arcs of a graph: GAT, GATv2 and scaled dot products, from edge lists.

Axes: P nodes that ask (receivers), S nodes that are looked at (senders; P and S may be the same
nodes), A arcs, N heads, H size, E value size. An arc a lets node `receivers[a]` look at node
`senders[a]`; arcs that are listed twice count twice, and are dropped together. An arc with an index
out of range, such as -1, is not there. Cost: O(A N H) time and memory.

Graphs in a batch are one graph of several components; or `jax.vmap` over arrays filled up with
arcs that `arc_mask` rules out.
"""

from dataclasses import dataclass

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
        segments: (A,) int, 0 .. count - 1; an arc of another one has weight 0.
        count: of segments.
        where: (A,) bool; False has weight 0. None: all count.

    Returns:
        (A, ...), float32 at least.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    segments, allowed = _within(segments, count)
    allowed = allowed if where is None else allowed & where
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
        source: (S, N, H), dtype of target, of the nodes looked at; also the values.
        a_target, a_source: (N, H), the two halves of the paper's vector a.
        receivers, senders: (A,) int, see above.
        arc_mask: (A,) bool; False: the arc is not there. Its sender may hold NaN.
        negative_slope: of the leaky ReLU.
        dropout_rate: probability that a weight is dropped, in [0, 1); the pattern depends on
            (rng, head, receiver, sender) alone.
        dropout_rng: a `jax.random` key; needed when dropout_rate > 0.

    Returns:
        (P, N, H), dtype of source; a node without arcs gets exactly 0.

    Raises:
        ValueError, TypeError: an argument's shape or dtype does not fit; the message says which.

    Source: Velickovic et al. 2018, arXiv 1710.10903, eq. 1 to 4.
    """
    _check_nodes(target=target, source=source)
    _expect("a_target", a_target, target.shape[1:])
    _expect("a_source", a_source, source.shape[1:])
    arcs = _arcs(target, source, receivers, senders, arc_mask)
    # A number a node, not a vector an arc. What no arc touches must not reach a's gradients.
    asked = jnp.sum(_touched(target, arcs.receivers, arcs.there) * a_target[None], -1)
    seen = jnp.sum(_touched(source, arcs.senders, arcs.there) * a_source[None], -1)
    pair = asked[arcs.receivers] + seen[arcs.senders]
    logits = jax.nn.leaky_relu(pair, negative_slope)
    return _average(logits, source, target.shape[0], arcs, dropout_rate, dropout_rng)


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
    _check_nodes(target=target, source=source)
    _expect("a", a, target.shape[1:])
    arcs = _arcs(target, source, receivers, senders, arc_mask)
    pair = arcs.take(target, arcs.receivers) + arcs.take(source, arcs.senders)
    logits = jnp.sum(a[None] * jax.nn.leaky_relu(pair, negative_slope), -1)
    return _average(logits, source, target.shape[0], arcs, dropout_rate, dropout_rng)


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
    _check_nodes(query=query, key=key)
    if value.ndim != 3 or value.shape[:2] != key.shape[:2]:
        raise ValueError(
            f"value must be (S, N, E) with key's S and N; got {value.shape}, "
            f"key has {key.shape}."
        )
    if value.dtype != query.dtype:
        raise TypeError(
            f"value must be of query's dtype {query.dtype}; got {value.dtype}."
        )
    arcs = _arcs(query, key, receivers, senders, arc_mask)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    asked, seen = arcs.take(query, arcs.receivers), arcs.take(key, arcs.senders)
    logits = jnp.sum(asked * seen, -1) * scale
    if bias is not None:
        _expect("bias", bias, logits.shape)
        logits = logits + bias
    return _average(logits, value, query.shape[0], arcs, dropout_rate, dropout_rng)


@dataclass(frozen=True, kw_only=True)
class _Arcs:
    """receivers and senders, (A,) within range, and which arcs are there, (A,) bool."""

    receivers: Array
    senders: Array
    there: Array

    def take(self, nodes: Array, at: Array) -> Array:
        """(A, N, size), float32 at least; 0 for arcs that are not there."""
        return jnp.where(self.there[:, None, None], _wide(nodes)[at], 0.0)


def _average(
    logits: Array, value: Array, count: int, arcs: _Arcs, rate: float, rng: Array | None
) -> Array:
    """The senders' values averaged by the softmax of logits (A, N): (P, N, E)."""
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"dropout_rate must be in [0, 1); got {rate}.")
    weights = segment_softmax(logits, arcs.receivers, count, where=arcs.there)
    if rate > 0.0:
        if rng is None:
            raise ValueError(
                "dropout_rng must be a jax.random key when dropout_rate > 0; got None."
            )
        head = jnp.arange(logits.shape[1], dtype=jnp.int32)[None]
        kept = keep(rng, rate, head, arcs.receivers[:, None], arcs.senders[:, None])
        weights = jnp.where(kept, weights / (1.0 - rate), 0.0)
    values = arcs.take(value, arcs.senders)
    out = jax.ops.segment_sum(weights[..., None] * values, arcs.receivers, count)
    return out.astype(value.dtype)


def _arcs(
    target: Array,
    source: Array,
    receivers: Array,
    senders: Array,
    arc_mask: Array | None,
) -> _Arcs:
    for name, array in (("receivers", receivers), ("senders", senders)):
        if array.ndim != 1 or not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(
                f"{name} must be (A,) int; got shape {array.shape}, {array.dtype}."
            )
    _expect("senders", senders, receivers.shape)
    receivers, known = _within(receivers, target.shape[0])
    senders, there = _within(senders, source.shape[0])
    there = there & known
    if arc_mask is not None:
        _expect("arc_mask", arc_mask, receivers.shape)
        if arc_mask.dtype != bool:
            raise TypeError(f"arc_mask must be bool; got {arc_mask.dtype}.")
        there = there & arc_mask
    return _Arcs(receivers=receivers, senders=senders, there=there)


def _within(index: Array, count: int) -> tuple[Array, Array]:
    """The indices brought within 0 .. count - 1, and which of them were."""
    index = jnp.asarray(index).astype(jnp.int32)
    inside = jnp.clip(index, 0, count - 1)
    return inside, inside == index


def _touched(nodes: Array, at: Array, there: Array) -> Array:
    """The nodes (P, N, H), float32 at least, 0 where no arc that is there touches them."""
    touched = jnp.zeros(nodes.shape[0], bool).at[at].max(there)
    return jnp.where(touched[:, None, None], _wide(nodes), 0.0)


def _wide(x: Array) -> Array:
    return jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))


def _check_nodes(**nodes: Array) -> None:
    """Raises where the two arrays are not (nodes, N, H) of one floating dtype."""
    first, target = next(iter(nodes.items()))
    for name, array in nodes.items():
        if array.ndim != 3 or array.shape[1:] != target.shape[1:]:
            raise ValueError(
                f"{name} must be (nodes, N, H) with {first}'s N and H; got {array.shape}, "
                f"{first} has {target.shape}."
            )
        if not jnp.issubdtype(array.dtype, jnp.floating) or array.dtype != target.dtype:
            raise TypeError(
                f"{name} must be floating, of {first}'s dtype {target.dtype}; "
                f"got {array.dtype}."
            )


def _expect(name: str, array: Array, shape: tuple[int, ...]) -> None:
    if jnp.shape(array) != shape:
        raise ValueError(f"{name} must have shape {shape}; got {jnp.shape(array)}.")
