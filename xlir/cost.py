"""Cost of one compiled step on a TPU chip: arithmetic, memory traffic, network and estimated time.

Arithmetic is counted from the jaxpr; `hlo.py` counts bytes.
"""

import dataclasses
import math

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


@dataclasses.dataclass(frozen=True)
class Chip:
    """Memory and peak rates of one chip; `network` is all links together, in one direction."""

    hbm: float  # bytes
    flops: float  # FLOP/s, bfloat16
    bandwidth: float  # HBM, bytes/s
    network: float  # inter-chip interconnect (ICI), bytes/s


# From "System architecture" on https://docs.cloud.google.com/tpu/docs/ v4, v5e, v5p, v6e. The ICI
# rates there are for both directions together (v5e 400, v5p 1200, v6e 800 GB/s; earlier editions
# print 1600 Gbit/s for v5e and 4800 for v5p), so this table has half of them. v5e's HBM has 819
# GB/s, or 800 GiB/s in a later edition. The page of v4 gives 32 GiB of HBM and no ICI rate; a v4
# chip has six links of 50 GB/s each way (Jouppi et al. 2023, arXiv 2304.01433). A v4 topology
# lists the two TensorCores of a chip as two devices, unless it is described with
# `chip_config_name="megacore"`.
CHIPS = {
    "v4": Chip(hbm=34.4e9, flops=275e12, bandwidth=1200e9, network=300e9),
    "v5e": Chip(hbm=16e9, flops=197e12, bandwidth=819e9, network=200e9),
    "v5p": Chip(hbm=95e9, flops=459e12, bandwidth=2765e9, network=600e9),
    "v6e": Chip(hbm=32e9, flops=918e12, bandwidth=1638e9, network=400e9),
}


def chip(topology: str) -> Chip:
    """The chip of a topology, such as v5e:16x16."""
    return CHIPS[topology.partition(":")[0]]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of one step at the chip's peak rates: lower bounds, not measurements."""

    compute: float
    memory: float
    network: float

    @property
    def overlapped(self) -> float:
        """Step time if compute, memory and network overlap perfectly: the largest of the three."""
        return max(self.compute, self.memory, self.network)

    @property
    def serial(self) -> float:
        """Step time if nothing overlaps: the sum."""
        return self.compute + self.memory + self.network


def estimate(flops: float, hbm_bytes: float, network_bytes: float, chip: Chip) -> Estimate:
    """Times of one step, from one chip's share of the work.

    The network rate is that of all links together. A collective over one axis of the torus uses
    only that axis's links, so its true lower bound is up to two (2-D) or three (3-D) times higher.
    """
    return Estimate(flops / chip.flops, hbm_bytes / chip.bandwidth, network_bytes / chip.network)


# --- Arithmetic, from the jaxpr ---


def flops(jaxpr: ClosedJaxpr | Jaxpr) -> float:
    """Floating point operations of one call, over all devices: `flops(step.trace(...).jaxpr)`.

    Only matrix products and convolutions count, with two operations per multiply-add. Recomputed
    (rematerialised) operations count again. The body of a `scan` counts `length` times, and the
    body of a `while` counts once (its trip count is unknown). A `cond` counts as its costliest
    branch. A Pallas kernel counts once for each point of its grid, and the body of a `shard_map`
    once for each device along its manual axes.
    """
    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, parameters = equation.primitive.name, equation.params
        inner = [flops(each) for each in _jaxprs(parameters)]
        if name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * math.prod(shape[i] for i in contracted)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval
            features = kernel.shape[parameters["dimension_numbers"].rhs_spec[0]]
            # A dilated input is mostly zeros, which need not be multiplied.
            zeros = math.prod(parameters["lhs_dilation"])
            total += 2 * equation.outvars[0].aval.size * kernel.size / features / zeros
        elif name == "cond":
            total += max(inner)
        elif name == "scan":
            total += parameters["length"] * sum(inner)
        elif name == "pallas_call":
            total += math.prod(parameters["grid_mapping"].grid) * sum(inner)
        elif name == "shard_map":
            mesh, axes = parameters["mesh"], parameters["newly_manual_axes"]
            total += math.prod(mesh.shape[axis] for axis in axes) * sum(inner)
        else:
            total += sum(inner)
    return float(total)


def _jaxprs(parameters: dict) -> list[ClosedJaxpr | Jaxpr]:
    leaves = jax.tree.leaves(list(parameters.values()))
    return [leaf for leaf in leaves if isinstance(leaf, ClosedJaxpr | Jaxpr)]
