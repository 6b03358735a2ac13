"""Meshes of devices, and how states and batches get to their places on them."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qkv_jax.ops.axes import LOGICAL_AXES, MESH_AXES, partition_spec, shares

# Axes of parameters that stay whole where a mesh axis does not divide them.
OPTIONAL = ("kv_heads", "vocab")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The shape of the device mesh; one of the numbers may be -1: the devices that are left.

    Attributes:
        data: groups of devices with the whole model each, which share out the batch.
        fsdp: devices that share out both the batch and the parameters' width D.
        context: devices that share out the length of the sequences.
        tensor: devices that share out heads, feed-forward width F and vocabulary V.
    """

    data: int = -1
    fsdp: int = 1
    context: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = {name: getattr(self, name) for name in MESH_AXES}
        for name, size in sizes.items():
            if size < 1 and size != -1:
                raise ValueError(
                    f"{name} must be a positive number of devices, or -1; got {size}."
                )
        rest = [name for name, size in sizes.items() if size == -1]
        if len(rest) > 1:
            raise ValueError(
                f"only one axis can be -1, the devices that are left; got {' and '.join(rest)}."
            )


def make_mesh(config: MeshConfig | None = None, *, devices: Any = None) -> Mesh:
    """A mesh with the axes "data", "fsdp", "context" and "tensor".

    Axis types are Auto (the partitioner propagates shardings) on every jax version.

    Args:
        config: its shape; None: "data" over all devices.
        devices: to take; None: those of all processes.

    Raises:
        ValueError: the shape does not fit the number of devices.
    """
    config = config or MeshConfig()
    devices = list(jax.devices() if devices is None else devices)
    sizes = {name: getattr(config, name) for name in MESH_AXES}
    asked = math.prod(size for size in sizes.values() if size != -1)
    shown = " x ".join(
        f"{name} {size}" for name, size in sizes.items() if size not in (1, -1)
    )
    if asked > len(devices):
        raise ValueError(
            f"the mesh asks for {asked} devices ({shown}); there are {len(devices)}: "
            "make it smaller, or use -1 for one of its axes."
        )
    for name, size in sizes.items():
        if size == -1:
            if len(devices) % asked:
                raise ValueError(
                    f"the mesh's other axes ({shown}) do not divide the {len(devices)} devices, "
                    f"so nothing whole is left for {name!r}."
                )
            sizes[name] = len(devices) // asked
    count = math.prod(sizes.values())
    return jax.make_mesh(
        tuple(sizes.values()),
        MESH_AXES,
        axis_types=(AxisType.Auto,) * len(MESH_AXES),
        devices=devices[:count],
    )


def auto_mesh(mesh: Mesh) -> Mesh:
    """The same mesh with all axes Auto: what the trainer works on, whatever it is given."""
    types = (AxisType.Auto,) * len(mesh.axis_names)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=types)


def logical_sharding(mesh: Mesh, *names: str | None) -> NamedSharding:
    """The sharding of an array whose axes bear these logical names.

    Args:
        mesh: see make_mesh.
        *names: one a leading axis, a key of LOGICAL_AXES or None; further axes are not split.

    Raises:
        ValueError: a name LOGICAL_AXES does not have.
    """
    return NamedSharding(auto_mesh(mesh), partition_spec(mesh, *names))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(auto_mesh(mesh), PartitionSpec())


def batch_shares(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return shares(mesh, "batch")


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """Where each array of a pytree lies: parameters, moments and averages by their axes' names.

    Args:
        state: pytree of arrays or ShapeDtypeStructs; an `nnx.Variable` in it, of a model or of an
            optimizer, names its axes in its metadata "axes". All else lies whole everywhere, and
            so do arrays of one axis, which are small, but for those of heads and F.
        mesh: see make_mesh.

    Returns:
        The pytree with a NamedSharding for each array.

    Raises:
        ValueError: the mesh does not divide an axis; the message has both numbers.
    """

    def of(node: Any) -> Any:
        if not isinstance(node, nnx.Variable):
            return replicated(mesh)
        names = node.get_metadata().get("axes", ())
        return jax.tree.map(lambda x: _sharding(mesh, names, x.shape), node)

    return jax.tree.map(of, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def place_state(state: Any, mesh: Mesh) -> Any:
    """Puts a pytree of arrays on the mesh, see state_shardings."""
    return jax.tree.map(_place, state, state_shardings(state, mesh))


def row_share(mesh: Mesh) -> tuple[int, int]:
    """(i, n): of a batch's rows, this process's devices hold block i of n equal ones.

    All of them, (0, 1), where what they hold is no such block.
    """
    parts = batch_shares(mesh)
    places = logical_sharding(mesh, "batch").addressable_devices_indices_map((parts,))
    own = sorted({at[0].indices(parts)[0] for at in places.values() if at is not None})
    size = len(own)
    in_order = own == list(range(own[0], own[0] + size))
    if in_order and parts % size == 0 and own[0] % size == 0:
        return own[0] // size, parts // size
    return 0, 1


def place_batch(
    batch: dict[str, np.ndarray],
    mesh: Mesh,
    *,
    accumulate: int = 1,
    share: tuple[int, int] = (0, 1),
):
    """Puts a batch on the mesh, its rows split over "data" and "fsdp".

    Args:
        batch: arrays (B, ...), equal B; each process puts just the rows of its own devices there.
        mesh: see make_mesh.
        accumulate: microbatches the step will split the rows into.
        share: (i, n): the arrays are block i of n equal ones of the batch's B rows, as row_share
            says; (0, 1): all, the same in all processes.

    Returns:
        A dict of global arrays.

    Raises:
        ValueError: B does not divide into equal shares.
    """
    sharding = logical_sharding(mesh, "batch")
    parts = batch_shares(mesh)
    for name, array in batch.items():
        rows = array.shape[0] * share[1]
        if rows % (parts * accumulate):
            raise ValueError(
                f"batch[{name!r}] has {rows} rows, which {parts} groups of devices times "
                f"{accumulate} accumulation steps do not divide: use a multiple of "
                f"{parts * accumulate} rows."
            )
    if sharding.is_fully_addressable:
        return {name: _place(array, sharding) for name, array in batch.items()}
    return {
        name: jax.make_array_from_process_local_data(
            sharding, array, (array.shape[0] * share[1], *array.shape[1:])
        )
        for name, array in batch.items()
    }


def _place(array: Any, sharding: NamedSharding) -> jax.Array:
    everywhere = isinstance(array, jax.Array) and not array.is_fully_addressable
    if everywhere or sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    held = np.asarray(array)
    return jax.make_array_from_callback(held.shape, sharding, lambda at: held[at])


def _sharding(
    mesh: Mesh, names: tuple[str, ...], shape: tuple[int, ...]
) -> NamedSharding:
    # (1,) is what Adafactor has where it keeps no moment.
    if len(names) != len(shape) or shape == (1,):
        return replicated(mesh)
    kept: list[str | None] = []
    for name, size in zip(names, shape):
        small = name == "embed" and len(shape) == 1
        uneven = size % shares(mesh, name) != 0
        if uneven and not small and name not in OPTIONAL:
            raise ValueError(
                f"the mesh splits {name!r} into {shares(mesh, name)} parts, which its size of "
                f"{size} in the model does not allow: make the mesh's axis "
                f"{' x '.join(LOGICAL_AXES[name])} a divisor of it."
            )
        kept.append(None if small or uneven else name)
    return logical_sharding(mesh, *kept)
