"""The device mesh, and how parameters and batches are sharded over it.

The mesh has two axes. Along `data`, devices hold the same parameters. Along `fsdp`, each device
holds a shard of the parameters, and gathers a layer's parameters when the layer runs (fully sharded
data parallelism: ZeRO stage 3, Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054). The rows
of a batch are split over both axes, so that no two devices repeat work.
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
# Number of devices along each axis, as in config.mesh.
Sizes = Mapping[str, int] | ConfigDict
AXES = ("data", "fsdp")

# Pattern in a parameter's path -> axes that may be sharded over `fsdp`, in the order in which they
# are tried. The first matching pattern counts. The paths of optimizer state and moving averages end
# in the path of their parameter, so they are sharded in the same way.
RULES: tuple[tuple[str, tuple[int, ...]], ...] = (
    # Vectors stay whole. In a stack of layers, the vectors of all layers form one matrix.
    (r"(scale|bias|offset|mean)$", ()),
    # Matrices and tables: the output axis is tried first. The first axis of a stack of layers is
    # never sharded, because a scan runs over it, one layer at a time. The size of a vocabulary is
    # seldom divisible, but the width of its embedding usually is.
    (r"", (-1, -2)),
)
# Arrays with fewer elements are not sharded either.
SMALLEST = 1024


def _pass_over_absent_tpu() -> None:
    """Keeps JAX from starting libtpu on a machine without a TPU, where libtpu prints errors.

    `jax[tpu]` is installed on such machines to compile for TPUs. Unless a platform is chosen, JAX
    tries all platforms. If JAX found a TPU on the PCI bus, it has already chosen the TPU platform.
    A TPU whose PCI id this version of JAX does not know still has device files.
    """
    if jax.config.jax_platforms or glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"):
        return

    def absent() -> None:
        raise RuntimeError("this machine has no TPU")

    with contextlib.suppress(RuntimeError):  # JAX has started already
        jax.extend.backend.register_backend_factory("tpu", absent, priority=0, fail_quietly=True)


_pass_over_absent_tpu()


def check_platforms() -> None:
    """Raises ValueError if JAX_PLATFORMS names devices that this machine lacks.

    This starts JAX. With several processes, call `jax.distributed.initialize` first.
    """
    asked = jax.config.jax_platforms
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # AssertionError: CUDA without a GPU
        if not asked:
            raise
        jax.config.update("jax_platforms", None)
        _pass_over_absent_tpu()
        there = ", ".join(sorted({device.platform for device in jax.devices()}))
        raise ValueError(
            f"JAX_PLATFORMS={asked}: JAX finds no such devices here, only {there}; set "
            "JAX_PLATFORMS to these, or unset it"
        ) from error


def create_mesh(options: Sizes | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh that `config.mesh` describes.

    Devices are ordered so that neighbours on the mesh are neighbours in the machine. If there are
    several TPU slices, `data` extends across the slices.

    Args:
      options: number of devices along "data" and along "fsdp"; one of them may be -1, for all
        remaining devices. Default: all along "data".
      devices: default: the devices of all processes.

    Raises:
      ValueError: the product of the two numbers is not the number of devices, or "data" is not
        a multiple of the number of slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(options or {"data": -1, "fsdp": 1}, len(devices))
    slices = _slices(devices)
    if slices > 1:
        if shape[0] % slices:
            raise ValueError(
                f"config.mesh.data={shape[0]} is not a multiple of the {slices} TPU slices"
            )
        within = (shape[0] // slices, shape[1])
        grid = mesh_utils.create_hybrid_device_mesh(
            within, (slices, 1), devices, allow_split_physical_axes=True
        )
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _slices(devices: Sequence[Any]) -> int:
    """The number of TPU slices of the devices. (A GPU's slice_index is the index of its host.)"""
    # Devices from the description of a topology (see compile.py) have no slice_index.
    of = {getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}
    return max(len(of), 1)


def fitting_mesh(options: Sizes) -> Mesh:
    """A mesh of all devices for evaluation, which may run on other machines than training.

    The size of `fsdp` is the greatest common divisor of the size in `options` and the number of
    devices in a slice, so that it fits any number of devices.
    """
    within = jax.device_count() // _slices(jax.devices())
    fsdp = within if options["fsdp"] == -1 else math.gcd(options["fsdp"], within)
    return create_mesh({"data": -1, "fsdp": fsdp})


def abstract_mesh(options: Sizes, devices: int) -> AbstractMesh:
    """As `create_mesh`, for a number of devices that need not exist."""
    return AbstractMesh(mesh_shape(options, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_shape(options: Sizes, devices: int) -> tuple[int, int]:
    """The number of devices along `data` and along `fsdp`, with -1 resolved.

    Raises:
      ValueError: the product of the two numbers is not `devices`.
    """
    sizes = [options[axis] for axis in AXES]
    known = math.prod(size for size in sizes if size != -1)
    asked = ", ".join(f"config.mesh.{axis}={options[axis]}" for axis in AXES)
    if sizes.count(-1) > 1 or min(sizes) < -1 or 0 in sizes:
        raise ValueError(f"{asked}: each must be a positive number; one may be -1 (the rest)")
    shape = tuple(devices // known if size == -1 else size for size in sizes)
    if math.prod(shape) != devices:
        raise ValueError(f"{asked} does not fit the {devices} devices")
    return shape


def single_device_mesh() -> Mesh:
    """A mesh of only this process's first device."""
    return create_mesh(devices=jax.local_devices()[:1])


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The sharding in which every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def layout(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """How RULES shard a parameter over the mesh.

    Args:
      path: the keys of the parameter's path, joined with dots.
      shape: the shape of the whole array.
      mesh: the mesh.
    """
    size = mesh.shape["fsdp"]
    for axis in _splittable(path, shape, mesh):
        if -axis <= len(shape) and shape[axis] % size == 0:
            place = len(shape) + axis
            return PartitionSpec(*(None,) * place, "fsdp")
    return PartitionSpec()


def _splittable(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> tuple[int, ...]:
    """The axes to try to shard; none if the array is meant to stay whole.

    Vectors stay whole: a message to gather each would cost more than the saved memory is worth.
    """
    if mesh.shape["fsdp"] == 1 or len(shape) < 2 or math.prod(shape) < SMALLEST:
        return ()
    return next(axes for pattern, axes in RULES if re.search(pattern, path))


def shardings(tree: PyTree, mesh: Mesh | AbstractMesh) -> PyTree:
    """The sharding of every array in a tree of arrays or shapes.

    Arrays that should be sharded stay whole if no axis is divisible; the log lists them.
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
            "%d arrays (%.1f MB) are not sharded, because no axis is a multiple of %d: %s",
            *(len(unsplit), sum(unsplit.values()) / 1e6, mesh.shape["fsdp"], ", ".join(unsplit)),
        )
    return result


def with_shardings(shapes: PyTree, shardings: PyTree) -> PyTree:
    """A tree of shapes, each with its sharding."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def path_name(path: tuple) -> str:
    """The keys of a path in a tree, joined with dots, without the final `value` of NNX states."""
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def shard(tree: PyTree, mesh: Mesh) -> PyTree:
    """Shards a tree of arrays over the mesh. Every process must hold the same whole arrays.

    Each device is sent only its shard. Shapes (`jax.ShapeDtypeStruct`) get their shardings.
    """

    def put(
        x: Array | np.ndarray | jax.ShapeDtypeStruct, sharding: NamedSharding
    ) -> jax.Array | jax.ShapeDtypeStruct:
        if isinstance(x, jax.ShapeDtypeStruct):
            return x.update(sharding=sharding)
        whole = np.asarray(x)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(put, tree, shardings(tree, mesh))


def gather(x: Array | np.ndarray) -> np.ndarray:
    """The whole array, on this host. All processes must call this for the same array."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def wait_for_all() -> None:
    """Returns once every process has called it."""
    agree_minimum(0)


def agree_minimum(value: int) -> int:
    """The smallest of the values that the processes pass. All processes must call this."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.process_allgather(np.int64(value)).min())


def total(value: int) -> int:
    """The sum of the values that the processes pass. All processes must call this."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.process_allgather(np.int64(value)).sum())


def on_host() -> contextlib.AbstractContextManager:
    """A context in which new arrays are in the host's memory, which fits larger models."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS excludes the CPU
        return contextlib.nullcontext()


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Splits the first axis over both mesh axes, so that no two devices repeat work."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def split_rows(x: Array) -> Array:
    """Keeps the first axis of an activation sharded like a batch, under `jax.set_mesh`.

    Without this constraint, the compiler may move activations to the devices that hold a layer's
    parameters, instead of gathering the parameters.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, batch_sharding(mesh))


def gathered(x: Array) -> Array:
    """Keeps the whole of a parameter, or of its gradient, on every device, under `jax.set_mesh`.

    Without this constraint, the compiler may compute a matrix product one shard at a time while it
    passes the shards around, and reads the activations again for each shard.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, replicated(mesh))


def platform() -> str:
    """The devices that run what is traced now: "cpu", "gpu" or "tpu"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def local_rows(size: int, mesh: Mesh) -> Int[np.ndarray, " rows"]:
    """The rows of a global batch that this process's devices hold, in ascending order.

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
      batch: arrays of the rows that `local_rows` names. Their numbers of rows may differ.
      mesh: the mesh to shard the batch over.
    """
    sharding = batch_sharding(mesh)

    def lay(array: np.ndarray) -> jax.Array:
        size = len(array) * mesh.size // len(mesh.local_devices)
        rows = local_rows(size, mesh)

        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(size)
            first = np.searchsorted(rows, start)
            return array[first : first + stop - start]

        return jax.make_array_from_callback((size, *array.shape[1:]), sharding, part)

    return {name: lay(array) for name, array in batch.items()}


def check_batch_size(size: int, mesh: Mesh | AbstractMesh, microbatches: int = 1) -> None:
    """Raises ValueError if the microbatches do not divide evenly over the devices."""
    unit = mesh.size * microbatches
    if size % unit:
        nearest = " and ".join(str(n * unit) for n in (size // unit, size // unit + 1) if n)
        parts = f" in {microbatches} microbatches" if microbatches > 1 else ""
        raise ValueError(
            f"config.data.batch_size={size} does not divide over {mesh.size} devices{parts}; "
            f"the nearest sizes that do are {nearest}"
        )
