"""Starts JAX, in one process or as one of several."""

import logging
import os

from absl.flags import FlagValues

from xlir.commands.errors import UsageError
from xlir.commands.flags import Flags

# Seconds after which the other processes notice that a process has ended.
HEARTBEAT = 30
# Seconds that the other processes wait at the end, at most, for the first one to write results.
REPORTING = 3600


def define(flags: Flags) -> None:
    """Declares the flags for running as one of several processes."""
    flags.switch(
        "distributed",
        "Run as one of several processes on a Cloud TPU or under SLURM; JAX finds the others.",
    )
    flags.string(
        "coordinator",
        "HOST:PORT on which the first of several processes listens. Needs "
        "--processes and --process.",
    )
    flags.integer("processes", "Number of processes.", least=1)
    flags.integer("process", "Number of this process, counted from 0.", least=0)


def start_jax(values: FlagValues) -> None:
    """Joins the other processes, if there are any, and caches compiled programs on disk.

    Raises:
      UsageError: the flags of `define` contradict each other. (Some verbs lack these flags.)
      ValueError: the devices that $JAX_PLATFORMS names do not exist.
    """
    joins = "distributed" in values and _is_one_of_several(values)
    from xlir import partition, programs

    if joins:
        _join(values)
    else:
        partition.check_platforms()
    programs.keep_on_disk()


def _is_one_of_several(values: FlagValues) -> bool:
    """Whether to join other processes; raises UsageError if flags contradict each other."""
    together = (values.coordinator, values.processes, values.process)
    if len({value is None for value in together}) > 1:
        raise UsageError("--coordinator, --processes and --process must be given together")
    if values.process is not None and values.process >= values.processes:
        raise UsageError(
            f"--process={values.process} must be less than --processes={values.processes}: "
            "processes are counted from 0"
        )
    joins = values.distributed or values.coordinator is not None
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and not joins:
        raise UsageError("SLURM runs this step as several tasks: add --distributed")
    return joins


def _join(values: FlagValues) -> None:
    """Makes this one of several processes."""
    import jax

    jax.distributed.initialize(
        coordinator_address=values.coordinator,
        num_processes=values.processes,
        process_id=values.process,
        heartbeat_timeout_seconds=HEARTBEAT,
        shutdown_timeout_seconds=REPORTING,
    )
    if jax.process_index():
        # Only the first process logs its progress.
        for package in ("xlir", "input_pipeline"):
            logging.getLogger(package).setLevel(logging.WARNING)
