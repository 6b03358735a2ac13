"""Attention whose sequences are shared out over the devices of a mesh axis.

Each device holds an equal part of the queries and of the keys. In a ring, the keys go round, and a
device looks at the parts that come by; zigzag is a ring in which each device holds one part from
the front and one from the back, so that a causal mask gives all the same work; Ulysses swaps the
sharing of the length for one of the heads; to gather is to give each device all keys for its
queries. Masks and scores keep their meaning: their indices are those of the whole. Axes: see
reference.py.

Source: ring: Liu et al. 2023, arXiv 2310.01889; zigzag: Brandon et al. 2023, arXiv 2311.09431
(striped), in the layout of Llama 3, arXiv 2407.21783, section 3.3.2, which gathers keys; Ulysses:
Jacobs et al. 2023, arXiv 2309.14509.
"""

import functools
import math
from typing import Any, Literal, get_args, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from qkv_jax.ops import blockwise, context_layout
from qkv_jax.ops.attention import (
    DENSE_PAIRS,
    check_arguments,
    check_dropout,
    dot_product_attention,
    explain,
    static_scale,
)
from qkv_jax.ops.axes import vary
from qkv_jax.ops.masks import Blocks, Mask, as_mask
from qkv_jax.ops.parts import Inputs, Part, Plan, filled_up
from qkv_jax.ops.ring import ring
from qkv_jax.ops.scores import Score, supported

Array = jax.Array
ContextMethod = Literal["auto", "ring", "zigzag", "ulysses", "gather"]


@overload
def context_parallel_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: Mask | Array | None = None,
    score: Score | None = None,
    scale: float | Array | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    method: ContextMethod = "ring",
    mesh: Mesh | AbstractMesh | None = None,
    axis: str = "context",
    batch_axes: tuple[str, ...] = ("data", "fsdp"),
    head_axis: str = "tensor",
    check_vma: bool = True,
    return_residuals: Literal[False] = False,
) -> Array: ...


@overload
def context_parallel_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: Mask | Array | None = None,
    score: Score | None = None,
    scale: float | Array | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    method: ContextMethod = "ring",
    mesh: Mesh | AbstractMesh | None = None,
    axis: str = "context",
    batch_axes: tuple[str, ...] = ("data", "fsdp"),
    head_axis: str = "tensor",
    check_vma: bool = True,
    return_residuals: Literal[True],
) -> tuple[Array, Array]: ...


def context_parallel_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: Mask | Array | None = None,
    score: Score | None = None,
    scale: float | Array | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    method: ContextMethod = "ring",
    mesh: Mesh | AbstractMesh | None = None,
    axis: str = "context",
    batch_axes: tuple[str, ...] = ("data", "fsdp"),
    head_axis: str = "tensor",
    check_vma: bool = True,
    return_residuals: bool = False,
) -> Array | tuple[Array, Array]:
    """`dot_product_attention` of whole arrays, shared out over a mesh: rows, lengths and heads.

    O((T + S) / n) memory a device. Call it under jit. Lengths need not divide: they are filled up.
    A mesh axis that does not divide the rows or the heads leaves them whole.

    Args:
        query: (B, T, N, H) floating.
        key: (B, S, K, H), dtype of query; K divides N.
        value: (B, S, K, E), dtype of query.
        mask, score, scale, dropout_rate, dropout_rng, return_residuals: as there; indices are
            those of the whole, and so is dropout's pattern. Their arrays lie whole on each device.
        method: "ring": keys go round, and parts that the mask rules out are not looked at;
            "zigzag": the same with equal work under a causal mask, lengths are permuted inside
            and come back in order; "ulysses": heads are shared out in place of the length, for
            which the mesh axis has to divide those of a device; "gather": all keys come to each
            device at once, in O(T / n + S) memory; "auto": where the pairs of a device are so few
            that it computes them at once, "ulysses" if that goes, else "gather"; else "ring".
        mesh: None: that of `jax.set_mesh`.
        axis: the mesh axis that shares out T and S; one that the mesh lacks counts as of size 1.
        batch_axes: those that share out B.
        head_axis: that which shares out N and K.
        check_vma: see `jax.shard_map`.

    Returns:
        As `dot_product_attention`.

    Raises:
        ValueError, TypeError: as there; no mesh; "ulysses" with heads that do not divide.
    """
    check_arguments(query, key, value, score)
    check_dropout(dropout_rate, dropout_rng)
    score, scale = static_scale(query, score, scale)
    mask = supported(as_mask(mask), score)
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    if mesh.empty:
        raise ValueError(
            "context_parallel_attention needs a mesh: pass mesh=, or call it under jax.set_mesh."
        )
    (B, T, N, _), S = query.shape, key.shape[1]
    devices = mesh.shape.get(axis, 1)
    rows = tuple(name for name in batch_axes if mesh.shape.get(name, 1) > 1)
    if B % math.prod(mesh.shape[name] for name in rows):
        rows = ()
    shares = mesh.shape.get(head_axis, 1)
    heads = head_axis if shares > 1 and N % shares == 0 else None
    shares = shares if heads else 1
    check_method(method, heads=N // shares, devices=devices)
    method = _chosen(method, T // devices * S, heads=N // shares, devices=devices)
    key, value = (_enough_heads(x, N, shares) for x in (key, value))
    limits = blockwise.choose_limits(mask, (B, N, T, S))
    parts = devices * context_layout.halves(method)
    chunks = [context_layout.chunk(n, parts, limit) for n, limit in zip((T, S), limits)]
    length = axis if devices > 1 else None
    spec = PartitionSpec(rows or None, length, heads, None)
    arrays = [
        _laid_out(filled_up(x, parts * chunk), mesh, spec)
        for x, chunk in zip((query, key, value), (chunks[0], chunks[1], chunks[1]))
    ]

    def of_a_device(query, key, value, mask, score, seed):
        return _attend_here(
            Inputs(query, key, value, mask, score, seed, Part()),
            Plan((B, N, T, S), limits, scale, dropout_rate),
            method,
            axis=length,
            devices=devices,
            rows=rows,
            heads=heads,
        )

    of_all: Any = jax.shard_map(
        of_a_device,
        mesh=mesh,
        in_specs=(spec,) * 3 + (PartitionSpec(),) * 3,
        out_specs=(spec, PartitionSpec(*spec[:3])),
        check_vma=check_vma,
    )
    seed = blockwise.seed_of(dropout_rate, dropout_rng)
    found = of_all(*arrays, mask, score, seed)
    if T < found[0].shape[1]:
        whole = PartitionSpec(rows or None, None, heads)
        found = [_laid_out(x, mesh, whole)[:, :T] for x in found]
    out, residual = found
    return (out, residual) if return_residuals else out


def mesh_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: Mask | None = None,
    score: Score | None = None,
    scale: float | Array | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    method: ContextMethod = "ring",
) -> Array:
    """`dot_product_attention` on the mesh of `jax.set_mesh`, if there is one: what layers call.

    Over a mesh axis "context", and where whole lengths are looked at in blocks, each device is
    given its part by `context_parallel_attention`: of a loop over blocks, the partitioner makes
    one over all rows and heads on each device. All else is left to the partitioner.

    Args: as for `context_parallel_attention`.
    """
    options: dict[str, Any] = {
        "mask": mask,
        "score": score,
        "scale": scale,
        "dropout_rate": dropout_rate,
        "dropout_rng": dropout_rng,
    }
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or not mesh.are_all_axes_auto:
        return dot_product_attention(query, key, value, **options)
    if mesh.shape.get("context", 1) == 1:
        chosen = explain(query, key, value, **options).implementation
        if chosen in ("reference", "cudnn"):
            return dot_product_attention(query, key, value, **options)
    return context_parallel_attention(query, key, value, method=method, **options)


def shard_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: Mask | Array | None = None,
    score: Score | None = None,
    scale: float | Array | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    method: ContextMethod = "ring",
    axis: str = "context",
    batch_axes: tuple[str, ...] = (),
    head_axis: str | None = None,
) -> tuple[Array, Array]:
    """`context_parallel_attention` for a device's part, to be called within `jax.shard_map`.

    Gradients of the arrays of a mask or score, and of whatever else is equal on all devices, are
    those of the whole where the gradient is taken outside of the shard_map.

    Args:
        query: (B, T, N, H), a device's rows, queries and heads, in order: device i of n has part i
            of n of each. So for key (B, S, K, H) and value (B, S, K, E); for "zigzag", T and S
            are even.
        mask, score, dropout_rate, dropout_rng: over the whole, and the same on all devices.
        scale, method: as there.
        axis, batch_axes, head_axis: mesh axes that share out lengths, rows and heads.

    Returns:
        out (B, T, N, E) and logsumexp (B, T, N) of the device's queries.

    Raises:
        ValueError, TypeError: as there; odd lengths with "zigzag".
    """
    check_arguments(query, key, value, score)
    check_dropout(dropout_rate, dropout_rng)
    score, scale = static_scale(query, score, scale)
    mask = supported(as_mask(mask), score)
    (B, T, N, _), S = query.shape, key.shape[1]
    devices = jax.lax.axis_size(axis)
    check_method(method, heads=N, devices=devices)
    method = _chosen(method, T * S * devices, heads=N, devices=devices)
    if method == "zigzag" and (T % 2 or S % 2):
        raise ValueError(
            f"zigzag needs an even number of queries and keys on a device; got {T} and {S}."
        )
    whole = (
        B * math.prod(jax.lax.axis_size(name) for name in batch_axes),
        N * (1 if head_axis is None else jax.lax.axis_size(head_axis)),
        T * devices,
        S * devices,
    )
    seed = blockwise.seed_of(dropout_rate, dropout_rng)
    limits = blockwise.choose_limits(mask, whole)
    return _attend_here(
        Inputs(query, key, value, mask, score, seed, Part()),
        Plan(whole, limits, scale, dropout_rate),
        method,
        axis=axis,
        devices=devices,
        rows=batch_axes,
        heads=head_axis,
    )


def blocks_looked_at(
    mask: Mask | None,
    shape: tuple[int, int, int, int],
    devices: int,
    method: Literal["ring", "zigzag"] = "ring",
    limits: tuple[int, int] | None = None,
) -> np.ndarray:
    """How much work each device has at each hop of the keys: (devices, hops) blocks.

    Args:
        mask: without arrays, so that its blocks are known.
        shape: (B, N, T, S) of the whole, of which T and S are filled up as the attention does.
        devices: in the ring.
        method: of sharing out.
        limits: queries and keys in a block at most; None: as the attention chooses.
    """
    limits = limits or blockwise.choose_limits(mask, shape)
    halves = context_layout.halves(method)
    parts = halves * devices
    chunks = [
        context_layout.chunk(n, parts, limit) for n, limit in zip(shape[2:], limits)
    ]
    size, each = context_layout.cut(chunks, limits)
    grid = Blocks(shape, size, (parts * each[0], parts * each[1]))
    some = np.ones((1, 1, 1, 1), bool) if mask is None else mask.blocks(grid)[0]
    if not isinstance(some, np.ndarray):
        raise TypeError("the mask must have no arrays, for its blocks to be known.")
    some = np.broadcast_to(some, (*shape[:2], *grid.count)).sum((0, 1))
    queries, keys = (
        [
            np.asarray(context_layout.held(device, n, devices, halves))
            for device in range(devices)
        ]
        for n in each
    )
    return np.array(
        [
            [some[np.ix_(queries[d], keys[d - hop])].sum() for hop in range(devices)]
            for d in range(devices)
        ]
    )


def check_method(method: str, *, heads: int, devices: int) -> None:
    """Raises ValueError if a method is unknown, or cannot share out the heads of a device.

    Args:
        method: a ContextMethod.
        heads: query heads of a device.
        devices: that share out the length.
    """
    if method not in get_args(ContextMethod):
        raise ValueError(
            f"method must be one of {list(get_args(ContextMethod))}; got {method!r}."
        )
    if method == "ulysses" and heads % devices:
        raise ValueError(
            f"ulysses shares out the {heads} query heads of a device over the {devices} devices "
            "that share out the length, which does not go: use 'ring' or 'zigzag'."
        )


def _chosen(
    method: ContextMethod, pairs: int, *, heads: int, devices: int
) -> ContextMethod:
    """A method for so many pairs of a device's queries and all keys, and for a device's heads.

    By the CPU time of short ones on simulated devices, see `python -m benchmarks.scaling`.
    """
    if method != "auto":
        return method
    if pairs > DENSE_PAIRS:
        return "ring"
    return "gather" if heads % devices else "ulysses"


def _attend_here(
    inputs: Inputs,
    plan: Plan,
    method: ContextMethod,
    *,
    axis: str | None,
    devices: int,
    rows: tuple[str, ...],
    heads: str | None,
) -> tuple[Array, Array]:
    """Attention of a device's queries to all keys; `plan.size` are limits, as yet."""
    query, key, value = inputs[:3]
    B, T, N, _ = query.shape
    row = jax.lax.axis_index(rows) * B if rows else None
    head = jax.lax.axis_index(heads) * N if heads else None
    names = (*rows, *filter(None, (axis, heads)))
    inputs = vary(inputs, inputs, *names)
    if 0 in (*query.shape, *key.shape, *value.shape):
        wide = jnp.promote_types(query.dtype, jnp.float32)
        out = jnp.zeros((B, T, N, value.shape[3]), query.dtype)
        return vary((out, jnp.full((B, T, N), -jnp.inf, wide)), inputs)
    if axis is None or method == "ulysses":
        return _with_all_keys(inputs, plan, axis, devices, row, head)
    if method == "zigzag":
        swap = functools.partial(context_layout.zigzag, axis=axis, devices=devices)
        inputs = inputs._replace(
            query=swap(inputs.query), key=swap(inputs.key), value=swap(inputs.value)
        )
    halves = context_layout.halves(method)
    size, each = context_layout.cut((T // halves, key.shape[1] // halves), plan.size)
    total = halves * devices * each[0], halves * devices * each[1]
    here = jax.lax.axis_index(axis)
    places: list[Any] = [context_layout.held(here, n, devices, halves) for n in each]
    if method == "gather":
        gather = functools.partial(jax.lax.all_gather, axis_name=axis, tiled=True)
        inputs = inputs._replace(key=gather(key, axis=1), value=gather(value, axis=1))
        places[1] = None
    dense = T * inputs.key.shape[1] <= DENSE_PAIRS
    plan = plan._replace(size=size, blocks=total, dense=dense)
    part = vary(Part(row, head, *places), inputs)
    inputs = vary(blockwise.filled(*inputs[:6], plan, part), inputs)
    if method == "gather":
        return blockwise.attend(inputs, plan)
    out, residual = ring(inputs, plan, axis, devices)
    if method == "zigzag":
        out, residual = (swap(x, back=True) for x in (out, residual))
    return out, residual


def _with_all_keys(
    inputs: Inputs, plan: Plan, axis: str | None, devices: int, row: Any, head: Any
) -> tuple[Array, Array]:
    """All of the lengths, and a share of the heads where an axis shares out the lengths."""
    query, key, value = inputs[:3]
    if axis is not None:
        key, value = (_enough_heads(x, query.shape[2], devices) for x in (key, value))
        swap = functools.partial(jax.lax.all_to_all, axis_name=axis, tiled=True)
        query, key, value = (
            swap(x, split_axis=2, concat_axis=1) for x in (query, key, value)
        )
        first = jax.lax.axis_index(axis) * query.shape[2]
        head = first if head is None else head + first
    size: Any = tuple(
        blockwise.even_block(x.shape[1], limit)
        for x, limit in zip((query, key), plan.size)
    )
    count: Any = tuple(-(-x.shape[1] // width) for x, width in zip((query, key), size))
    dense = query.shape[1] * key.shape[1] <= DENSE_PAIRS
    plan = plan._replace(size=size, blocks=count, dense=dense)
    part = vary(Part(row, head), inputs)
    filled = blockwise.filled(query, key, value, *inputs[3:6], plan, part)
    out, residual = (
        x[:, : query.shape[1]] for x in blockwise.attend(vary(filled, inputs), plan)
    )
    if axis is None:
        return out, residual
    return swap(out, split_axis=1, concat_axis=2), swap(
        residual, split_axis=1, concat_axis=2
    )


def _enough_heads(x: Array, heads: int, shares: int) -> Array:
    """Keys or values (B, S, K, size), their heads repeated until `shares` divides them."""
    K = x.shape[2]
    repeats = (r for r in range(1, heads // K + 1) if heads // K % r == 0)
    fitting = [r for r in repeats if K * r % shares == 0]
    return jnp.repeat(x, fitting[0], axis=2) if fitting[0] > 1 else x


def _laid_out(x: Array, mesh: Mesh | AbstractMesh, spec: PartitionSpec) -> Array:
    """With Explicit axes, the array is put as the spec says; with Auto ones, shard_map does it."""
    if AxisType.Explicit not in mesh.axis_types:
        return x
    return jax.sharding.reshard(x, jax.sharding.NamedSharding(mesh, spec))
