"""Analyses a run from shapes alone: its shardings, and the cost of a training step on a TPU.

The step is the one that `xlir.train` runs. The TPU's compiler, libtpu, compiles it without a TPU.
Checkpoints of known architectures need not be downloaded (see `towers.describe_published`).
"""

import dataclasses
import importlib.util
import logging
import math
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from ml_collections import ConfigDict

from input_pipeline import packing
from xlir import cost, hlo, initial, losses, partition, train_step
from xlir.embed import Parameters, split, start_of
from xlir.models import towers

log = logging.getLogger(__name__)

PyTree = Any
GIB = 2**30
LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}
# Share of a chip's memory that must stay free, for memory use that the compiler does not count.
SPARE = 0.1
# Number of instructions that the report lists.
HEAVIEST = 10


def abstract(
    config: ConfigDict, devices: int = 1
) -> tuple[nnx.GraphDef, Parameters, dict[str, jax.ShapeDtypeStruct]]:
    """The structure of a model, and the shapes of its parameters and of a global batch.

    The shape of packed texts (`config.text.pack`) depends on the number of devices, and on the
    captions, which are not read here: it is that of captions with as many tokens as COCO's.
    """
    specs = towers.describe_published(config, initial.specs(config))
    model = towers.abstract_model(config, specs)
    graph, parameters = split(config, model)
    size = config.data.batch_size
    batch: dict[str, tuple] = {"image_id": ((size,), jnp.int32)}
    sides = losses.sides(config.loss)
    for side, tower in (("text", model.text_tower), ("image", model.image_tower)):
        if config[side].frozen and side in sides:
            batch[f"{side}_features"] = ((size, tower.dim), jnp.float32)
    if losses.has_teacher(config.loss):
        batch["teacher"] = ((size, config.embedding_dim), jnp.float32)
    if config.text.pack:
        batch |= _packed(config, devices)
    elif not config.text.frozen:
        batch["text_ids"] = ((size, config.text.max_length), jnp.int32)
        batch["text_mask"] = ((size, config.text.max_length), jnp.bool_)
    if not config.image.frozen:
        preprocessing = specs["image"].preprocessing
        batch["image"] = ((size, *preprocessing.shape), preprocessing.dtype)
    shapes = {name: jax.ShapeDtypeStruct(*shape) for name, shape in batch.items()}
    return graph, parameters, shapes


def _packed(config: ConfigDict, devices: int) -> dict[str, tuple]:
    """Shapes and dtypes of the packed texts of a global batch."""
    groups = devices * config.data.microbatches
    group, length = config.data.batch_size // groups, packing.row_length(config.text.max_length)
    shape = (groups, packing.typical_rows(group, length), length)
    return {
        "text_ids": (shape, jnp.int32),
        "text_positions": (shape, jnp.int32),
        "text_starts": ((groups, group), jnp.int32),
    }


def trace(config: ConfigDict, mesh: Mesh) -> jax.stages.Traced:
    """The training step of a configuration on a mesh, to be lowered and compiled."""
    partition.check_batch_size(config.data.batch_size, mesh, config.data.microbatches)
    graph, (params, frozen), batch = abstract(config, mesh.size)
    if config.text.pack:
        log.info(
            "text.pack: %d captions with about %.0f tokens each share %d rows of %d tokens",
            *(batch["text_starts"].shape[1], packing.COCO_TOKENS[0]),
            *batch["text_ids"].shape[1:],
        )
    state, step = train_step.compile_step(config, graph, params, mesh)
    frozen = partition.with_shardings(frozen, partition.shardings(frozen, mesh))
    rows = partition.batch_sharding(mesh)
    batch = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows) for name, x in batch.items()
    }
    with jax.set_mesh(mesh):
        return step.trace(state, frozen, batch)


def sharding_table(config: ConfigDict, devices: int) -> str:
    """A table of how a run is sharded over a number of devices: each parameter, and totals.

    Raises:
      ValueError: the mesh does not fit the devices, or the configuration is not usable.
    """
    config = initial.resolve(config)
    mesh = partition.abstract_mesh(config.mesh, devices)
    _, (params, frozen), _ = abstract(config)
    state = jax.eval_shape(lambda params: train_step.init_state(config, params), params)
    parts = {
        "trained": list(_laid_out(params, mesh)),
        "frozen": list(_laid_out(frozen, mesh)),
        "optimizer state": list(_laid_out(state.optimizer, mesh)),
        "moving average": list(_laid_out(state.ema, mesh)),
    }
    if config.average:
        parts["start of the average"] = list(_laid_out(start_of(config, params), mesh))
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    rows = [("parameter", "shape", "layout", "bytes a device")]
    for part in ("trained", "frozen"):
        for x in parts[part]:
            name = x.path if part == "trained" else f"{x.path} (frozen)"
            rows.append((name, x.describe_shape(), x.describe_layout(), f"{x.bytes_a_device:,}"))
    rows.append(("", "", "", ""))
    rows.append(("total", "", "bytes", "bytes a device"))
    for part, arrays in parts.items():
        whole, share = (sum(getattr(x, n) for x in arrays) for n in ("bytes", "bytes_a_device"))
        rows.append((part, f"{len(arrays)} arrays", f"{whole:,}", f"{share:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"mesh of {devices} devices: {axes}", ""]
    for name, *cells, last in rows:
        left = "  ".join(
            cell.ljust(width) for cell, width in zip((name, *cells), widths[:-1], strict=True)
        )
        lines.append(f"{left}  {last.rjust(widths[-1])}".rstrip())
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class LaidOut:
    """The shape and sharding of an array."""

    path: str
    shape: tuple[int, ...]
    dtype: Any
    sharding: NamedSharding

    @property
    def bytes(self) -> int:
        """Size of the whole array."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def bytes_a_device(self) -> int:
        """Size of one device's shard."""
        return math.prod(self.sharding.shard_shape(self.shape)) * self.dtype.itemsize

    def describe_shape(self) -> str:
        """For example float32[12,768,2304]."""
        return f"{self.dtype.name}[{','.join(map(str, self.shape))}]"

    def describe_layout(self) -> str:
        """The mesh axis that shards each array axis, such as `-,-,fsdp`; `whole` if none does."""
        spec = tuple(self.sharding.spec)
        spec += (None,) * (len(self.shape) - len(spec))
        return ",".join(axis or "-" for axis in spec) if any(spec) else "whole"


def _laid_out(tree: PyTree, mesh: Mesh | AbstractMesh) -> Iterator[LaidOut]:
    shardings = jax.tree.leaves(partition.shardings(tree, mesh))
    for (path, x), sharding in zip(jax.tree.leaves_with_path(tree), shardings, strict=True):
        yield LaidOut(partition.path_name(path), x.shape, jnp.dtype(x.dtype), sharding)


class OutOfMemoryError(ValueError):
    """The compiler found no way to fit a step into a chip's memory.

    Attributes:
      needed: the bytes that the step needs at least; 0 if the compiler does not say.
    """

    def __init__(self, message: str):
        super().__init__(message)
        used = re.search(r"Used ([\d.]+)G of [\d.]+G hbm", message)
        self.needed = int(float(used[1]) * GIB) if used else 0


@dataclasses.dataclass(frozen=True)
class Report:
    """What a training step costs on each chip of a topology.

    Attributes:
      topology, chips, mesh, batch_size: what was compiled.
      arguments, temporaries: bytes of memory; the new state reuses the memory of the old state.
        The arguments include the towers' initial parameters that `config.average` keeps.
      chip: the chip's memory and peak rates.
      flops: floating point operations of the step on one chip.
      traffic: an estimate of what each instruction moves from and to the chip's memory.
      collectives: by kind, how many collectives run, and the bytes that the chip receives.
    """

    topology: str
    chips: int
    mesh: dict[str, int]
    batch_size: int
    arguments: int
    temporaries: int
    chip: cost.Chip
    flops: float
    traffic: list[hlo.Traffic]
    collectives: dict[str, hlo.Collective]

    @property
    def needed(self) -> int:
        """Bytes needed per chip."""
        return self.arguments + self.temporaries

    @property
    def fits(self) -> bool:
        """Whether a tenth of the chip's memory stays free."""
        return self.needed <= (1 - SPARE) * self.chip.hbm

    @property
    def spare(self) -> float:
        """The share of the chip's memory that stays free; negative if it is too small."""
        return 1 - self.needed / self.chip.hbm

    @property
    def hbm_bytes(self) -> float:
        """Bytes that the chip moves from and to its memory."""
        return float(sum(each.bytes for each in self.traffic))

    @property
    def received(self) -> float:
        """Bytes that the chip receives from others."""
        return float(sum(each.bytes for each in self.collectives.values()))

    @property
    def times(self) -> cost.Estimate:
        """Seconds of a step at the chip's peak rates."""
        return cost.estimate(self.flops, self.hbm_bytes, self.received, self.chip)

    def __str__(self) -> str:
        """The report as text."""
        times, spare = self.times, self.spare
        axes = ", ".join(f"{axis}={size}" for axis, size in self.mesh.items())
        lines = [
            f"{self.topology}: {self.chips} chips, mesh {axes}; batch {self.batch_size:,}, "
            f"{self.batch_size // self.chips:,} per chip",
            "",
            "memory per chip             GiB",
            f"  parameters, state, batch{self.arguments / GIB:7.2f}",
            f"  temporaries             {self.temporaries / GIB:7.2f}",
            f"  needed                  {self.needed / GIB:7.2f}  of {self.chip.hbm / GIB:.2f}",
            "",
            "work per chip and step                    time at peak rate",
            _rate("arithmetic", self.flops / 1e12, "TFLOP", times.compute),
            _rate("memory traffic", self.hbm_bytes / 1e9, "GB", times.memory),
            _rate("data received", self.received / 1e9, "GB", times.network),
        ]
        lines += [
            f"    {kind:<20}{each.bytes / 1e9:6.2f} GB     in {each.count:,.0f} messages"
            for kind, each in self.collectives.items()
        ]
        slow, fast = (self.batch_size / seconds for seconds in (times.serial, times.overlapped))
        lines += [
            f"  a step takes {times.overlapped:.3f} s if everything overlaps, {times.serial:.3f} s "
            f"if nothing does: {slow:,.0f} to {fast:,.0f} examples/s at most",
            f"  that is at most {times.compute / times.overlapped:.0%} of the arithmetic peak rate",
            "",
            "largest memory traffic          GB    runs",
            *map(_traffic, self.traffic[:HEAVIEST]),
            "",
            f"the step {'fits' if self.fits else 'does not fit'}: {100 * spare:.0f}% of the memory "
            f"{'is' if spare > 0 else 'would be'} free, {100 * SPARE:.0f}% must be free",
        ]
        return "\n".join(lines)


def _rate(what: str, amount: float, unit: str, seconds: float) -> str:
    return f"  {what:<18}{amount:10.2f} {unit:<6} {1e3 * seconds:12.1f} ms"


def _traffic(each: hlo.Traffic) -> str:
    source = "/".join(each.source.split("/")[-2:])
    return f"  {each.name[:24]:<24}{each.bytes / 1e9:8.2f} {each.runs:7,} {each.shape} {source}"


def compile_for(config: ConfigDict, topology: str) -> Report:
    """Compiles a configuration's training step for a TPU topology.

    Args:
      config: the configuration. Towers and heads whose dtype is "auto" compute in bfloat16, as on
        a TPU.
      topology: generation and shape, such as v5e:16x16.

    Raises:
      ValueError: the topology is unknown, the configuration does not fit it, or libtpu is not
        installed.
      OutOfMemoryError: the step takes so much memory that the compiler gives up.
    """
    chips = devices(topology)
    config = _as_on_tpu(initial.resolve(config))
    mesh = partition.create_mesh(config.mesh, chips)
    traced = trace(config, mesh)
    log.info("compiling a step for %d chips; this takes several minutes", len(chips))
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        fault = str(error).splitlines()[0]
        raise OutOfMemoryError(f"the step does not fit a chip of {topology}: {fault}") from None
    memory, text = compiled.memory_analysis(), compiled.as_text()
    kept = start_of(config, abstract(config)[1].trained)
    return Report(
        topology=topology,
        chips=len(chips),
        mesh=dict(mesh.shape),
        batch_size=config.data.batch_size,
        arguments=memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + sum(x.bytes_a_device for x in _laid_out(kept, mesh)),
        temporaries=memory.temp_size_in_bytes,
        chip=cost.chip(topology),
        flops=cost.flops(traced.jaxpr) / len(chips),
        traffic=hlo.traffic(text),
        collectives=hlo.collectives(text),
    )


def devices(topology: str) -> list[jax.Device]:
    """The devices of a topology, one for each chip. This machine need not have them.

    Raises:
      ValueError: the topology is unknown, or libtpu is not installed.
    """
    generation = topology.partition(":")[0]
    if generation not in cost.CHIPS:
        raise ValueError(
            f"--topology={topology}: the known generations are {', '.join(cost.CHIPS)}, as in "
            "--topology=v5e:4x4"
        )
    # Without these variables, libtpu looks for a TPU on this machine, queries the cloud's metadata
    # server, keeps other processes from using the TPU, and prints errors if there is none.
    for name, value in LIBTPU.items():
        os.environ.setdefault(name, value)
    # One device per chip, not one per core.
    options = {"chip_config_name": "megacore"} if generation == "v4" else {}
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **options
        )
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        if importlib.util.find_spec("libtpu") is None:
            reason = "the TPU's compiler is not installed: pip install 'xlir[tpu]'"
        raise ValueError(f"--topology={topology}: {reason}") from error
    return list(description.devices)


def _as_on_tpu(config: ConfigDict) -> ConfigDict:
    config = config.copy_and_resolve_references()
    for options, field in ((config, "head_dtype"), (config.text, "dtype"), (config.image, "dtype")):
        if options[field] == "auto":
            options[field] = "bfloat16"
    return config
