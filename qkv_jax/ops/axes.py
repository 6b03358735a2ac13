"""The names of array axes, and the one table of which mesh axes each is split over."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

Array = jax.Array

# Of a mesh, from the slowest links to the fastest.
MESH_AXES = ("data", "fsdp", "context", "tensor")
# Logical axis name -> mesh axes that split it.
LOGICAL_AXES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "length": ("context",),
    # Of the residual stream: what tensor parallelism would have all devices repeat, they share.
    # Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.2; there it is lengths that are shared.
    "stream_rows": ("data", "fsdp", "tensor"),
    "stream_length": ("context", "tensor"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "ff": ("tensor",),
    "vocab": ("tensor",),
    "rank": (),
}


def mesh_axes(mesh: Mesh | AbstractMesh, name: str | None) -> tuple[str, ...]:
    """The axes of this mesh that split a logical axis; those of size 1 are left out.

    Raises:
        ValueError: a name that LOGICAL_AXES does not have.
    """
    if name is None:
        return ()
    if name not in LOGICAL_AXES:
        raise ValueError(
            f"unknown logical axis {name!r}; known: {', '.join(sorted(LOGICAL_AXES))}."
        )
    return tuple(axis for axis in LOGICAL_AXES[name] if mesh.shape.get(axis, 1) > 1)


def shares(mesh: Mesh | AbstractMesh, name: str | None) -> int:
    """Into how many parts this mesh splits a logical axis."""
    return math.prod(mesh.shape[axis] for axis in mesh_axes(mesh, name))


def partition_spec(mesh: Mesh | AbstractMesh, *names: str | None) -> PartitionSpec:
    """How an array whose leading axes bear these names lies on the mesh.

    Raises:
        ValueError: see mesh_axes.
    """
    axes = [mesh_axes(mesh, name) for name in names]
    return PartitionSpec(*(part or None for part in axes))


def input_axes(names: Sequence[str | None]) -> int:
    """How many leading axes of a kernel its product sums over; the others are what it gives.

    By the names of its axes: what reads the model's width "embed" has it first, what writes it,
    last. The same for the factors of a kernel, by their "rank".
    """
    return 1 if names[0] in ("embed", "rank") else len(names) - 1


def pin(x: Array, *names: str | None) -> Array:
    """`x`, told to the partitioner to lie as these names of its axes say.

    Without a mesh around (`jax.set_mesh`, `jax.sharding.use_abstract_mesh`), and on axes that are
    Explicit or already mapped over, nothing is said; an axis that the mesh does not divide is
    left whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or not mesh.are_all_axes_auto:
        return x
    fitting = [
        name if size % shares(mesh, name) == 0 else None
        for name, size in zip(names, x.shape)
    ]
    return jax.lax.with_sharding_constraint(x, partition_spec(mesh, *fitting))


def pin_stream(x: Array) -> Array:
    """The residual stream (B, T, D), its rows shared out over "tensor" too, or else its lengths.

    Rows lie one after the other, so that gathering them moves nothing within a device.
    """
    if x.shape[0] % shares(jax.sharding.get_abstract_mesh(), "stream_rows") == 0:
        return pin(x, "stream_rows", "length")
    return pin(x, "batch", "stream_length")


def vary(tree: Any, like: Any, *more: str) -> Any:
    """`tree`, its arrays known to `jax.shard_map` to vary over what any array of `like` varies over.

    Outside of a shard_map, and in one with check_vma=False, nothing is done.

    Args:
        tree: pytree of arrays.
        like: pytree of arrays.
        *more: mesh axes that it shall vary over besides.
    """

    wanted = frozenset(more).union(*map(_varying, jax.tree.leaves(like)))

    def cast(x: Any) -> Any:
        missing = tuple(sorted(wanted - _varying(x)))
        return jax.lax.pcast(jnp.asarray(x), missing, to="varying") if missing else x

    return jax.tree.map(cast, tree) if wanted else tree


def _varying(x: Any) -> frozenset[str]:
    """The mesh axes that an array is known to vary over; jax before 0.10 says `vma`."""
    kind = jax.typeof(x)
    return frozenset(kind.mat.varying if hasattr(kind, "mat") else kind.vma)
