"""The device mesh, and how parameters and batches lie on it.

The mesh has two axes. Along `data` devices hold the same parameters; along `fsdp` each holds a
part of them, and gathers a layer's when the layer runs (fully sharded data parallelism: ZeRO stage
3, Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054). Rows of a batch are split over both
axes, so that no two devices repeat work.
"""

import contextlib
import glob
import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.extend.backend
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int
from ml_collections import ConfigDict

log = logging.getLogger(__name__)

PyTree = Any
# Devices along each axis, as in config.mesh.
Sizes = Mapping[str, int] | ConfigDict
AXES = ("data", "fsdp")

# What the path of a parameter matches -> its axes that may be split over `fsdp`, in the order in
# which they are tried; the first match counts. Optimizer state and moving averages end in the path
# of their parameter, and lie as it does.
RULES: tuple[tuple[str, tuple[int, ...]], ...] = (
    # The vectors of all layers of a stack are one matrix.
    (r"(scale|bias|offset|mean)$", ()),
    # Matrices and tables, by output first. Never by the first axis of a stack of layers: the scan
    # over it takes one layer at a time. Vocabularies seldom divide, their columns do.
    (r"", (-1, -2)),
)
# Elements; what is smaller is not split either.
SMALLEST = 1024


def _pass_over_absent_tpu() -> None:
    """Keeps JAX from starting libtpu, which prints errors, where it is installed without a TPU.

    `jax[tpu]` is installed on such machines too, to compile for TPUs. Where no platform was chosen
    JAX tries all that it knows. It has chosen the TPU's by now where it has seen one on the PCI
    bus; one that it may not know by its number still has device files.
    """
    if jax.config.jax_platforms or glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"):
        return

    def absent() -> None:
        raise RuntimeError("this machine has no TPU")

    with contextlib.suppress(RuntimeError):  # JAX has started already
        jax.extend.backend.register_backend_factory("tpu", absent, priority=0, fail_quietly=True)


_pass_over_absent_tpu()


def check_platforms() -> None:
    """Raises ValueError where JAX_PLATFORMS names devices that are not there.

    It starts JAX: where there are several processes they have to be joined before.
    """
    asked = jax.config.jax_platforms
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter of CUDA without a GPU
        if not asked:
            raise
        jax.config.update("jax_platforms", None)
        _pass_over_absent_tpu()
        there = ", ".join(sorted({device.platform for device in jax.devices()}))
        raise ValueError(
            f"JAX_PLATFORMS={asked}: JAX finds no such devices here, but {there}; set "
            "JAX_PLATFORMS to these, or unset it"
        ) from error


def create_mesh(options: Sizes | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh that `config.mesh` asks for.

    Devices are ordered so that neighbours on the mesh are neighbours in the machine; where they
    are of several TPU slices, `data` goes across the slices.

    Args:
      options: devices along "data" and along "fsdp"; one of them may be -1, all that are left.
        Default: all along "data".
      devices: default: those of all processes.

    Raises:
      ValueError: the numbers do not multiply to that of the devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(options or {"data": -1, "fsdp": 1}, len(devices))
    slices = _slices(devices)
    if slices > 1:
        if shape[0] % slices:
            raise ValueError(
                f"config.mesh.data={shape[0]} does not divide over {slices} TPU slices"
            )
        within = (shape[0] // slices, shape[1])
        grid = mesh_utils.create_hybrid_device_mesh(
            within, (slices, 1), devices, allow_split_physical_axes=True
        )
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _slices(devices: Sequence[Any]) -> int:
    """How many TPU slices the devices are of. (GPUs have the index of their host there.)"""
    # Devices that are only described, to compile for, have none.
    of = {getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}
    return max(len(of), 1)


def fitting_mesh(options: Sizes) -> Mesh:
    """A mesh of all devices, whatever their number, along `fsdp` up to as many as asked for.

    For evaluation: a run is looked at on other machines than it was trained on.
    """
    within = jax.device_count() // _slices(jax.devices())
    fsdp = within if options["fsdp"] == -1 else math.gcd(options["fsdp"], within)
    return create_mesh({"data": -1, "fsdp": fsdp})


def abstract_mesh(options: Sizes, devices: int) -> AbstractMesh:
    """As `create_mesh`, of so many devices that need not exist."""
    return AbstractMesh(mesh_shape(options, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_shape(options: Sizes, devices: int) -> tuple[int, int]:
    """Devices along `data` and along `fsdp`, -1 resolved.

    Raises:
      ValueError: they do not multiply to the number of devices.
    """
    sizes = [options[axis] for axis in AXES]
    known = math.prod(size for size in sizes if size != -1)
    asked = ", ".join(f"config.mesh.{axis}={options[axis]}" for axis in AXES)
    if sizes.count(-1) > 1 or min(sizes) < -1 or 0 in sizes:
        raise ValueError(f"{asked}: numbers of devices, of which one may be -1 (all that are left)")
    shape = tuple(devices // known if size == -1 else size for size in sizes)
    if math.prod(shape) != devices:
        raise ValueError(f"{asked} does not fit the {devices} devices")
    return shape


def single_device_mesh() -> Mesh:
    """This process's first device alone."""
    return create_mesh(devices=jax.local_devices()[:1])


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def layout(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """How a parameter lies on the mesh, by RULES.

    Args:
      path: names joined with dots.
      shape: of the whole array.
      mesh: the mesh.
    """
    size = mesh.shape["fsdp"]
    for axis in _splittable(path, shape, mesh):
        if -axis <= len(shape) and shape[axis] % size == 0:
            place = len(shape) + axis
            return PartitionSpec(*(None,) * place, "fsdp")
    return PartitionSpec()


def _splittable(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> tuple[int, ...]:
    """The axes that are tried, none where an array stays whole by intent.

    Vectors stay whole: a message each would cost more than the memory that they take.
    """
    if mesh.shape["fsdp"] == 1 or len(shape) < 2 or math.prod(shape) < SMALLEST:
        return ()
    return next(axes for pattern, axes in RULES if re.search(pattern, path))


def shardings(tree: PyTree, mesh: Mesh | AbstractMesh) -> PyTree:
    """The layout of every array of a tree; the tree may be one of shapes.

    What the rules would split and can't, since no axis divides, is logged.
    """
    unsplit: dict[str, int] = {}

    def sharding(path: tuple, x: Any) -> NamedSharding:
        name = path_name(path)
        spec = layout(name, x.shape, mesh)
        if _splittable(name, x.shape, mesh) and not spec:
            unsplit[name] = math.prod(x.shape) * x.dtype.itemsize
        return NamedSharding(mesh, spec)

    result = jax.tree.map_with_path(sharding, tree)
    if unsplit:
        log.info(
            "%d arrays (%.1f MB) are whole on every device, as no axis divides by %d: %s",
            *(len(unsplit), sum(unsplit.values()) / 1e6, mesh.shape["fsdp"], ", ".join(unsplit)),
        )
    return result


def with_shardings(shapes: PyTree, shardings: PyTree) -> PyTree:
    """A tree of shapes that says where each array lies."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def path_name(path: tuple) -> str:
    """The keys of a path in a tree, joined with dots; of an NNX state without its `value`."""
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def shard(tree: PyTree, mesh: Mesh) -> PyTree:
    """Lays a tree of arrays out on the mesh. Every process has all of the same arrays on its host.

    Each device is sent its part alone.
    """

    def put(x: Array | np.ndarray, sharding: NamedSharding) -> jax.Array:
        whole = np.asarray(x)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(put, tree, shardings(tree, mesh))


def gather(x: Array | np.ndarray) -> np.ndarray:
    """A whole array on this host. All processes have to call it for the same array."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def wait_for_all() -> None:
    """Returns when every process has come here."""
    agree_minimum(0)


def agree_minimum(value: int) -> int:
    """The smallest of the processes' values."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.process_allgather(np.int64(value)).min())


def on_host() -> contextlib.AbstractContextManager:
    """New arrays are made in the host's memory, where a model too large for one device fits."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        return contextlib.nullcontext()


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The first axis is split over every mesh axis, so that no two devices repeat work."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def split_rows(x: Array) -> Array:
    """Keeps the first axis of an activation split as a batch's is, under `jax.set_mesh`.

    Without it the compiler may prefer to move activations to where a layer's parameters are.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, batch_sharding(mesh))


def local_rows(size: int, mesh: Mesh) -> Int[np.ndarray, " rows"]:
    """Which rows of a global batch lie on this process's devices, in ascending order.

    Raises:
      ValueError: the batch does not divide over the devices.
    """
    if size % mesh.size:
        raise ValueError(f"a batch of {size} does not divide over {mesh.size} devices")
    parts = batch_sharding(mesh).addressable_devices_indices_map((size,)).values()
    rows = np.unique(np.concatenate([np.arange(size)[part] for part in parts]))
    assert len(rows) == size // mesh.size * len(parts), "two devices would repeat rows"
    return rows


def global_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch -> the global batch, sharded by rows.

    Args:
      batch: arrays of the rows that `local_rows` names.
      mesh: the mesh to lay it on.
    """
    sharding = batch_sharding(mesh)
    size = len(next(iter(batch.values()))) * mesh.size // len(mesh.local_devices)
    rows = local_rows(size, mesh)

    def lay(array: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(size)
            first = np.searchsorted(rows, start)
            return array[first : first + stop - start]

        return jax.make_array_from_callback((size, *array.shape[1:]), sharding, part)

    return {name: lay(array) for name, array in batch.items()}


def check_batch_size(size: int, mesh: Mesh | AbstractMesh, microbatches: int = 1) -> None:
    """Raises ValueError where a global batch, in parts, does not divide over the devices."""
    unit = mesh.size * microbatches
    if size % unit:
        nearest = " and ".join(str(n * unit) for n in (size // unit, size // unit + 1) if n)
        parts = f" in {microbatches} microbatches" if microbatches > 1 else ""
        raise ValueError(
            f"config.data.batch_size={size} does not divide over {mesh.size} devices{parts}; "
            f"the nearest sizes that do are {nearest}"
        )
