"""The device mesh and how batches lie on it."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def create_mesh() -> Mesh:
    """One axis, `data`, over all devices of all processes."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis is split over every mesh axis, so that no two devices repeat work."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def global_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch -> the global batch, sharded by rows.

    Args:
      batch: arrays whose first axis is this process's share of the global batch.
      mesh: the mesh to lay it on.
    """
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()
    }


def check_batch_size(size: int, mesh: Mesh, microbatches: int = 1) -> None:
    """Raises ValueError where a global batch, in parts, does not divide over the devices."""
    unit = mesh.size * microbatches
    if size % unit:
        parts = f" in {microbatches} microbatches" if microbatches > 1 else ""
        raise ValueError(
            f"config.data.batch_size={size} does not divide over {mesh.size} devices{parts}; "
            f"the nearest sizes that do are {size // unit * unit or unit} and "
            f"{-(-size // unit) * unit}"
        )
