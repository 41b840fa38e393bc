"""Starting JAX, alone or as one of several processes."""

import contextlib
import logging
import os

from absl.flags import FlagValues

from xlir.commands.errors import UsageError
from xlir.commands.flags import Flags

# Seconds until the other processes notice that one has ended.
HEARTBEAT = 30
# Seconds that they wait at the end for the first process, which writes the results.
REPORTING = 3600


def define(flags: Flags) -> None:
    """Declares the flags that say which of several processes this is."""
    flags.switch(
        "distributed",
        "This is one of several processes of a Cloud TPU or of SLURM, where JAX finds the others.",
    )
    flags.string(
        "coordinator",
        "This is one of several processes: HOST:PORT where the first of them listens. "
        "--processes and --process go with it.",
    )
    flags.integer("processes", "How many processes there are.", least=1)
    flags.integer("process", "Which of them this is, counted from 0.", least=0)


def start_jax(values: FlagValues) -> None:
    """Joins the other processes where there are any, and keeps compiled programs on disk.

    Raises:
      UsageError: the flags of `define`, which the verb may have or not, do not go together.
      ValueError: the devices that $JAX_PLATFORMS names are not there.
    """
    joins = "distributed" in values and _is_one_of_several(values)
    import jax

    from input_pipeline.cache import cache_folder
    from xlir import partition

    if joins:
        _join(values)
    else:
        partition.check_platforms()
    # Not for CPUs: a program that one CPU has compiled may not run on another, or JAX warns at
    # length that it may not (https://github.com/jax-ml/jax/issues/38445).
    if not jax.config.jax_compilation_cache_dir and jax.default_backend() != "cpu":
        folder = cache_folder() / "compiled"
        # Where JAX can't write there, it says so and goes on.
        with contextlib.suppress(OSError):
            folder.mkdir(exist_ok=True, mode=0o700)
        jax.config.update("jax_compilation_cache_dir", str(folder))


def _is_one_of_several(values: FlagValues) -> bool:
    """Whether this process has others to join; raises UsageError where the flags contradict."""
    together = (values.coordinator, values.processes, values.process)
    if len({value is None for value in together}) > 1:
        raise UsageError("--coordinator, --processes and --process go together")
    if values.process is not None and values.process >= values.processes:
        raise UsageError(
            f"--process={values.process} is none of --processes={values.processes}, which are "
            "counted from 0"
        )
    joins = values.distributed or values.coordinator is not None
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and not joins:
        raise UsageError("SLURM runs several tasks of this step: add --distributed")
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
        # Only the first process reports what all of them do.
        for package in ("xlir", "input_pipeline"):
            logging.getLogger(package).setLevel(logging.WARNING)
