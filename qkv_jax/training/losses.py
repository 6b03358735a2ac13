"""Losses: sums over real tokens, so that any batching, accumulation or sharding adds up exactly."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp

from qkv_jax.ops import pin

Array = jax.Array
# Of slopes of logits, between -1 and 1, of which most would vanish in float16.
_LIFT = 1024.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Taught:
    """What a teacher predicts, as the factors of its logits, and how much that counts.

    Attributes:
        states: (B, T, W) floating.
        table: (V, W) floating.
        weight: w in [0, 1], of its divergence; the labels' loss has 1 - w.
        temperature: T, positive; both distributions are softmax(logits / T).
    """

    states: Array
    table: Array
    weight: float = field(default=0.5, metadata={"static": True})
    temperature: float = field(default=1.0, metadata={"static": True})


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def projected_cross_entropy(
    states: Array,
    table: Array,
    labels: Array,
    weights: Array,
    smoothing: float = 0.0,
    chunks: int = 1,
    r_drop: float = 0.0,
    taught: Taught | None = None,
) -> tuple[Array, Array, Array]:
    """Label-smoothed cross-entropy of the logits `states table^T`, summed over weighted tokens.

    Projection and loss are one function because their gradients need each other's largest array:
    the slope of the logits is made once, while they are in cache, and is used for both gradients
    at once. No one-hot array is made, and with `chunks` > 1 the (B, T, V) logits never stand
    whole. The target distribution is (1 - smoothing) on the label plus smoothing / V on every
    class; all reductions are float32. No scale of the loss reaches slopes that are made so early:
    in float16 they are lifted by one of their own.

    Args:
        states: (B, T, D) floating.
        table: (V, D) floating, the output embedding.
        labels: (B, T) int in [0, V).
        weights: (B, T) float32; 0 for padding.
        smoothing: in [0, 1).
        chunks: the time axis is cut in at most this many parts; not where a mesh is around.
        r_drop: alpha of R-Drop. Not 0: rows 2i and 2i + 1 are one sentence, seen by the model
            under two dropouts, P and Q; each adds alpha / 4 (KL(P || Q) + KL(Q || P)) to its
            loss, so that both together have equation 4, their losses and alpha / 2 times the two
            divergences.
        taught: by a teacher: a token's smoothed loss becomes (1 - w) times it, plus
            w T^2 KL(teacher || student). None: there is no teacher.

    Returns:
        Weighted sums, float32 scalars: the smoothed loss, the plain negative log-likelihood, and
        the number of labels that are the most likely class. Only the first has gradients, with
        respect to states and table; what is taught is constant.

    Source: Szegedy et al. 2016, arXiv 1512.00567, eq. 7 (the smoothing; torch's convention);
    gradients within the forward pass: Hsu et al. 2024, arXiv 2410.10989; R-Drop: Liang et al.
    2021, arXiv 2106.14448; the teacher: Hinton et al. 2015, arXiv 1503.02531, section 2, a token at
    a time as in Kim and Rush 2016, arXiv 1606.07947, section 3.1.
    """
    states, table = pin(states, "batch", "length"), pin(table, "vocab", None)
    parts = (
        _chunk(*part, table, smoothing, r_drop)[0]
        for part in _split(states, labels, weights, taught, chunks)
    )
    return functools.reduce(_add, parts)


def _forward(states, table, labels, weights, smoothing, chunks, r_drop, taught):
    # Put together along D: else each device would have a part of every logit's sum.
    table = pin(table, "vocab", None)
    # Whole along T for each share of V: else it is the logits that are exchanged.
    states = pin(states, "batch", "length")
    sums, slopes_states, slopes_table = [], [], []
    for part in _split(states, labels, weights, taught, chunks):
        part_sums, slope = _chunk(*part, table, smoothing, r_drop)
        sums.append(part_sums)
        if states.dtype == jnp.float16:
            slope = slope * _LIFT
        slope = slope.astype(states.dtype)
        slope_part = jnp.einsum(
            "BTV,VD->BTD",
            slope,
            table.astype(states.dtype),
            preferred_element_type=jnp.float32,
        ).astype(states.dtype)
        slopes_states.append(pin(slope_part, "batch", "length"))
        # (D, V), so that the small operand is the one that a backend has to transpose.
        slope_table = jnp.einsum(
            "BTD,BTV->DV", part[0], slope, preferred_element_type=jnp.float32
        )
        # Summed over the devices whole: else they would exchange the slopes of the logits.
        slopes_table.append(pin(slope_table, None, "vocab"))
    slope_states = jnp.concatenate(slopes_states, axis=1)
    slope_table = functools.reduce(jnp.add, slopes_table)
    if states.dtype != jnp.float32:
        # XLA on CPU folds the transpose into a bfloat16 product that it then cannot run.
        slope_table = jax.lax.optimization_barrier(slope_table)
    slope_table = slope_table.T.astype(table.dtype)
    return functools.reduce(_add, sums), (slope_states, slope_table)


def _backward(smoothing, chunks, r_drop, saved, cotangents):
    slope_states, slope_table = saved
    along = cotangents[0]
    if slope_states.dtype == jnp.float16:
        # The product in float32: neither of a large scale and a lift need fit into float16.
        along = along / _LIFT
        slope_states = (slope_states.astype(jnp.float32) * along).astype(jnp.float16)
    else:
        slope_states = slope_states * along.astype(slope_states.dtype)
    slope_table = slope_table * along.astype(slope_table.dtype)
    return slope_states, slope_table, None, None, None


projected_cross_entropy.defvjp(_forward, _backward)


def _chunk(states, labels, weights, taught, table, smoothing, r_drop):
    """The three sums of a chunk, and the slope of the first with respect to its logits."""
    table = table.astype(states.dtype)
    logits = jnp.einsum(
        "BTD,VD->BTV", states, table, preferred_element_type=jnp.float32
    )
    V = logits.shape[-1]
    top = logits.max(axis=-1)
    logsumexp = jnp.log(jnp.exp(logits - top[..., None]).sum(axis=-1)) + top
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    mean = logits.mean(axis=-1)
    nll = logsumexp - picked
    loss = logsumexp - (1.0 - smoothing) * picked - smoothing * mean
    classes = jax.lax.broadcasted_iota(labels.dtype, logits.shape, 2)
    target = (
        jnp.where(classes == labels[..., None], 1.0 - smoothing, 0.0) + smoothing / V
    )
    slope = jnp.exp(logits - logsumexp[..., None]) - target
    if taught is not None:
        apart, slope_apart = _from_teacher(logits, taught)
        share = taught.weight
        loss = (1.0 - share) * loss + share * apart
        slope = (1.0 - share) * slope + share * slope_apart
    if r_drop:
        apart, slope_apart = _divergence(logits - logsumexp[..., None])
        loss = loss + r_drop / 4.0 * apart
        slope = slope + r_drop / 2.0 * slope_apart
    sums = (loss * weights, nll * weights, (picked >= top) * weights)
    return tuple(map(jnp.sum, sums)), slope * weights[..., None]


def _from_teacher(logits: Array, taught: Taught) -> tuple[Array, Array]:
    """T^2 KL(teacher || student) of logits (B, T, V), (B, T), and its slope (B, T, V)."""
    states, table, temperature = taught.states, taught.table, taught.temperature
    theirs = jnp.einsum(
        "BTW,VW->BTV",
        pin(states, "batch", "length"),
        pin(table.astype(states.dtype), "vocab", None),
        preferred_element_type=jnp.float32,
    )
    log_p = jax.nn.log_softmax(theirs / temperature)
    log_q = jax.nn.log_softmax(logits / temperature)
    p = jnp.exp(log_p)
    apart = (p * (log_p - log_q)).sum(axis=-1)
    return temperature**2 * apart, temperature * (jnp.exp(log_q) - p)


def _divergence(log_p: Array) -> tuple[Array, Array]:
    """KL(P || Q) + KL(Q || P) of each row and its neighbour, and its slope.

    Args:
        log_p: (2 B, T, V), rows 2i and 2i + 1 are neighbours.

    Returns:
        (2 B, T), the same for both rows of a pair; and (2 B, T, V), its slope with respect to the
        row's own logits.
    """

    def neighbours(x: Array) -> Array:
        return jnp.flip(x.reshape(-1, 2, *x.shape[1:]), axis=1).reshape(x.shape)

    p, log_q = jnp.exp(log_p), neighbours(log_p)
    apart = log_p - log_q
    own = (p * apart).sum(axis=-1)
    slope = p * (apart - own[..., None]) + p - jnp.exp(log_q)
    return own + neighbours(own), slope


def _split(
    states: Array, labels: Array, weights: Array, taught: Taught | None, chunks: int
) -> Iterator[tuple[Array, Array, Array, Taught | None]]:
    """Parts along time; just one on a mesh, where each device has few rows, and each part's slope
    of the table would be summed over the devices by itself."""
    length, mesh = labels.shape[1], jax.sharding.get_abstract_mesh()
    chunks = chunks if mesh.empty or mesh.size == 1 else 1
    size = -(-length // max(1, min(chunks, length)))
    for at in range(0, length, size):
        end = min(at + size, length)
        part = None
        if taught is not None:
            part = replace(taught, states=taught.states[:, at:end])
        yield states[:, at:end], labels[:, at:end], weights[:, at:end], part


def _add(left, right):
    return tuple(a + b for a, b in zip(left, right))
