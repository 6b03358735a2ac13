"""Which mesh axis each array axis is split over, and how arrays get there."""

import dataclasses

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Logical axis name -> mesh axis, or None for an axis that every device holds whole.
LOGICAL_AXES: dict[str, str | None] = {
    "batch": "data",
    "length": None,
    "embed": None,
    "heads": None,
    "kv_heads": None,
    "head_dim": None,
    "ff": None,
    "vocab": None,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The shape of the device mesh.

    Attributes:
        data: devices the batch is split over; -1: all there are.
    """

    data: int = -1

    def __post_init__(self):
        if self.data < 1 and self.data != -1:
            raise ValueError(
                f"data must be a positive number of devices, or -1; got {self.data}."
            )


def make_mesh(config: MeshConfig | None = None) -> Mesh:
    """A mesh with the axis "data" over the devices of all processes.

    Axis types are Auto (the partitioner propagates shardings) on every jax version.

    Raises:
        ValueError: more devices are asked for than there are.
    """
    config = config or MeshConfig()
    devices = jax.devices()
    data = len(devices) if config.data == -1 else config.data
    if data > len(devices):
        raise ValueError(
            f"the mesh asks for {data} devices on its axis 'data'; there are {len(devices)}: "
            "lower data, or use -1 for all."
        )
    return jax.make_mesh(
        (data,), ("data",), axis_types=(AxisType.Auto,), devices=devices[:data]
    )


def logical_sharding(mesh: Mesh, *names: str | None) -> NamedSharding:
    """The sharding of an array whose axes bear these logical names.

    Args:
        mesh: see make_mesh.
        *names: one a leading axis, a key of LOGICAL_AXES or None; further axes are not split.

    Raises:
        ValueError: a name LOGICAL_AXES does not have.
    """
    for name in names:
        if name is not None and name not in LOGICAL_AXES:
            raise ValueError(
                f"unknown logical axis {name!r}; known: {', '.join(sorted(LOGICAL_AXES))}."
            )
    axes = [None if name is None else LOGICAL_AXES[name] for name in names]
    return NamedSharding(mesh, PartitionSpec(*axes))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole: under data parallelism, the state."""
    return logical_sharding(mesh)


def place_state(state, mesh: Mesh):
    """Puts a pytree of arrays on the mesh, whole on every device."""
    return jax.device_put(state, replicated(mesh))


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh, *, accumulate: int = 1):
    """Puts a batch on the mesh, its rows split over "data".

    Args:
        batch: arrays (B, ...), equal B. With several processes: this process's rows.
        mesh: see make_mesh.
        accumulate: microbatches the step will split the rows into.

    Returns:
        A dict of global arrays.

    Raises:
        ValueError: B does not divide into equal shares.
    """
    sharding = logical_sharding(mesh, "batch")
    shares = mesh.shape["data"] * accumulate
    for name, array in batch.items():
        rows = array.shape[0] * jax.process_count()
        if rows % shares:
            raise ValueError(
                f"batch[{name!r}] has {rows} rows, which {mesh.shape['data']} devices times "
                f"{accumulate} accumulation steps do not divide: use a multiple of {shares} rows."
            )
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }
