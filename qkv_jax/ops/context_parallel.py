"""Attention whose sequences are shared out over the devices of a mesh axis.

Each device holds an equal part of the queries and of the keys. In a ring, the keys go round, and a
device looks at the parts that come by; zigzag is a ring in which each device holds one part from
the front and one from the back, so that a causal mask gives all the same work; Ulysses swaps the
sharing of the length for one of the heads. Masks and scores keep their meaning: their indices are
those of the whole. Axes: see reference.py.

Source: ring: Liu et al. 2023, arXiv 2310.01889; zigzag: Brandon et al. 2023, arXiv 2311.09431
(striped), in the layout of Llama 3, arXiv 2407.21783, section 3.3.2; Ulysses: Jacobs et al. 2023,
arXiv 2309.14509.
"""

import functools
import math
from typing import Any, Literal, get_args, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from qkv_jax.ops import blockwise
from qkv_jax.ops.attention import (
    DENSE_PAIRS,
    check_arguments,
    check_dropout,
    dot_product_attention,
    explain,
    static_scale,
)
from qkv_jax.ops.axes import vary
from qkv_jax.ops.block_loops import block_ranks
from qkv_jax.ops.masks import Blocks, Mask, as_mask
from qkv_jax.ops.parts import (
    Inputs,
    Part,
    Plan,
    Softmax,
    cotangents,
    logsumexp,
    merged,
    rows_of,
    zero_slopes,
)
from qkv_jax.ops.scores import Score, supported

Array = jax.Array
ContextMethod = Literal["ring", "zigzag", "ulysses"]


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
            which the mesh axis has to divide those of a device.
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
    if method not in get_args(ContextMethod):
        raise ValueError(
            f"method must be one of {list(get_args(ContextMethod))}; got {method!r}."
        )
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
    key, value = (_enough_heads(x, N, shares if heads else 1) for x in (key, value))
    if method == "ulysses" and N // (shares if heads else 1) % devices:
        raise ValueError(
            f"ulysses shares out the {N // (shares if heads else 1)} query heads of a device over "
            f"the {devices} devices of {axis!r}, which does not go: use 'ring' or 'zigzag'."
        )
    limits = blockwise.choose_limits(mask, (B, N, T, S))
    parts = devices * (2 if method == "zigzag" and devices > 1 else 1)
    chunks = [_chunk(n, parts, limit) for n, limit in zip((T, S), limits)]
    length = axis if devices > 1 else None
    spec = PartitionSpec(rows or None, length, heads, None)
    arrays = [
        _laid_out(_filled(x, parts * chunk), mesh, spec)
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
    parts = devices * (2 if method == "zigzag" else 1)
    chunks = [_chunk(n, parts, limit) for n, limit in zip(shape[2:], limits)]
    size = tuple(_block(n, limit) for n, limit in zip(chunks, limits))
    each = tuple(n // width for n, width in zip(chunks, size))
    grid = Blocks(shape, (size[0], size[1]), (parts * each[0], parts * each[1]))
    some = np.ones((1, 1, 1, 1), bool) if mask is None else mask.blocks(grid)[0]
    if not isinstance(some, np.ndarray):
        raise TypeError("the mask must have no arrays, for its blocks to be known.")
    some = np.broadcast_to(some, (*shape[:2], *grid.count)).sum((0, 1))
    cut = some.reshape(parts, each[0], parts, each[1]).sum((1, 3))
    held = np.arange(devices)[:, None]
    if method == "zigzag":
        held = np.concatenate([held, 2 * devices - 1 - held], axis=1)
    return np.array(
        [
            [
                cut[np.ix_(held[d], held[(d - hop) % devices])].sum()
                for hop in range(devices)
            ]
            for d in range(devices)
        ]
    )


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
        swap = functools.partial(_zigzag, axis=axis, devices=devices)
        inputs = inputs._replace(
            query=swap(inputs.query), key=swap(inputs.key), value=swap(inputs.value)
        )
    halves = 2 if method == "zigzag" else 1
    chunks = (T // halves, key.shape[1] // halves)
    size: Any = tuple(_block(n, limit) for n, limit in zip(chunks, plan.size))
    each = tuple(n // width for n, width in zip(chunks, size))
    total: Any = tuple(n * halves * devices for n in each)
    plan = plan._replace(size=size, blocks=total, dense=T * key.shape[1] <= DENSE_PAIRS)
    here = jax.lax.axis_index(axis)
    places = (_held(here, n, devices, halves) for n in each)
    part = vary(Part(row, head, *places), inputs)
    inputs = vary(blockwise.filled(*inputs[:6], plan, part), inputs)
    out, residual = _ring(inputs, plan, axis, devices)
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _ring(inputs: Inputs, plan: Plan, axis: str, devices: int) -> tuple[Array, Array]:
    """Attention of the queries here to the keys that go round, once."""
    return _ring_forward(inputs, plan, axis, devices)[0]


def _ring_forward(inputs: Inputs, plan: Plan, axis: str, devices: int):
    B, T, N, _ = inputs.query.shape
    wide = jnp.promote_types(inputs.query.dtype, jnp.float32)
    ranks = block_ranks(inputs, plan)

    def hop(carry, _):
        found, keys, places = carry
        here, here_ranks = _with_keys(inputs, ranks, keys, places)

        def look():
            return merged(found, blockwise.look(here, plan, here_ranks, wide))

        found = _unless_empty(here_ranks, look, found)
        return (found, *_pass_on((keys, places), axis, devices)), None

    line = jnp.full((B, T, N, 1), -jnp.inf, wide)
    out = jnp.zeros((B, T, N, inputs.value.shape[3]), wide)
    nothing = vary(Softmax(out, line, jnp.ones_like(line)), inputs)
    carry = (nothing, _joined(*inputs[1:3]), inputs.part.keys)
    (found, *_), _ = jax.lax.scan(hop, carry, length=devices)
    found = found._replace(out=found.out.astype(inputs.query.dtype))
    return (found.out, logsumexp(found)), (inputs, found)


def _ring_backward(plan: Plan, axis: str, devices: int, saved, slopes):
    """The keys go round once more, and take along the sums of their slopes."""
    inputs, found = saved
    wide = found.top.dtype
    ranks = block_ranks(inputs, plan)
    rows = vary(rows_of(found, slopes, inputs.mask is not None), inputs)

    def hop(carry, _):
        d_query, d_score, d_keys, keys, places = carry
        here, here_ranks = _with_keys(inputs, ranks, keys, places)

        def look():
            new, *d_pair, d_rule = blockwise.look_back(
                here, rows, plan, here_ranks, wide
            )
            return jax.tree.map(
                jnp.add, (d_query, d_score, d_keys), (new, d_rule, _joined(*d_pair))
            )

        sums = _unless_empty(here_ranks, look, (d_query, d_score, d_keys))
        passed = _pass_on((sums[2], keys, places), axis, devices)
        return (*sums[:2], *passed), None

    keys = _joined(*inputs[1:3])
    sums = jnp.zeros(inputs.query.shape, wide), zero_slopes(inputs.score)
    zeros = vary((*sums, jnp.zeros(keys.shape, wide)), inputs)
    carry: Any = (*zeros, keys, inputs.part.keys)
    (d_query, d_score, d_keys, *_), _ = jax.lax.scan(hop, carry, length=devices)
    d_key, d_value = _parted(d_keys, inputs)
    return (cotangents(inputs, d_query, d_key, d_value, d_score),)


_ring.defvjp(_ring_forward, _ring_backward)


def _joined(key: Array, value: Array) -> Array:
    """(B, S, K, H + E): so that one message a hop takes both."""
    return jnp.concatenate([key, value], axis=-1)


def _parted(keys: Array, inputs: Inputs) -> tuple[Array, Array]:
    size = inputs.key.shape[3]
    return keys[..., :size], keys[..., size:]


def _held(device: Array, each: int, devices: int, halves: int) -> Array:
    """Which of the whole's blocks a device holds, (halves * each,) int32."""
    parts = [device, 2 * devices - 1 - device][:halves]
    blocks = jnp.arange(each, dtype=jnp.int32)
    return jnp.concatenate([part * each + blocks for part in parts])


def _with_keys(
    inputs: Inputs, ranks: Any, keys: Any, places: Any
) -> tuple[Inputs, Any]:
    """The inputs with the keys that are here now, and the ranks of just their blocks."""
    key, value = _parted(keys, inputs)
    part = inputs.part._replace(keys=places)
    ranks = None if ranks is None else jnp.asarray(ranks)[..., places]
    return inputs._replace(key=key, value=value, part=part), ranks


def _unless_empty(ranks: Any, look: Any, found: Any) -> Any:
    """look(), or what was found if all blocks are empty."""
    if ranks is None:
        return look()
    return jax.lax.cond(jnp.any(ranks < 2), look, lambda: found)


def _pass_on(arrays: Any, axis: str, devices: int) -> Any:
    ring = [(i, (i + 1) % devices) for i in range(devices)]
    return jax.lax.ppermute(arrays, axis, ring)


def _zigzag(x: Array, *, axis: str, devices: int, back: bool = False) -> Array:
    """Chunks 2i and 2i + 1 of the length on device i -> chunks i and 2n - 1 - i; or back."""
    # Device i's two chunks go each to one device, and no two of a kind to the same.
    owner = [min(c, 2 * devices - 1 - c) for c in range(2 * devices)]
    roads = [[(i, owner[2 * i + odd]) for i in range(devices)] for odd in (0, 1)]
    one, other = jnp.split(x, 2, axis=1)
    even = jax.lax.axis_index(axis) % 2 == 0

    def swap(one, other):
        return jnp.where(even, one, other), jnp.where(even, other, one)

    if back:
        # Of chunks i and 2n - 1 - i, the even one was a first half.
        halves = swap(one, other)
        roads = [[(there, here) for here, there in road] for road in roads]
        halves = (jax.lax.ppermute(*pair) for pair in _with(halves, axis, roads))
        return jnp.concatenate(list(halves), axis=1)
    halves = (jax.lax.ppermute(*pair) for pair in _with((one, other), axis, roads))
    return jnp.concatenate(swap(*halves), axis=1)


def _with(halves: Any, axis: str, roads: Any) -> Any:
    return ((half, axis, road) for half, road in zip(halves, roads))


def _enough_heads(x: Array, heads: int, shares: int) -> Array:
    """Keys or values (B, S, K, size), their heads repeated until `shares` divides them."""
    K = x.shape[2]
    repeats = (r for r in range(1, heads // K + 1) if heads // K % r == 0)
    fitting = [r for r in repeats if K * r % shares == 0]
    return jnp.repeat(x, fitting[0], axis=2) if fitting[0] > 1 else x


def _chunk(length: int, parts: int, limit: int) -> int:
    """The length of each of so many equal parts, which even blocks of at most `limit` fill."""
    part = -(-length // parts)
    if part <= limit:
        return part
    size = blockwise.even_block(part, limit)
    return -(-part // size) * size


def _block(length: int, limit: int) -> int:
    """The largest block of at most `limit` that divides a length."""
    return next(n for n in range(min(length, limit), 0, -1) if length % n == 0)


def _filled(x: Array, length: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)))


def _laid_out(x: Array, mesh: Mesh | AbstractMesh, spec: PartitionSpec) -> Array:
    """With Explicit axes, the array is put as the spec says; with Auto ones, shard_map does it."""
    if AxisType.Explicit not in mesh.axis_types:
        return x
    return jax.sharding.reshard(x, jax.sharding.NamedSharding(mesh, spec))
