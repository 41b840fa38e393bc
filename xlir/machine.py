"""The machine and the versions that a run was trained with, kept in its folder for the report."""

import json
import logging
import os
import pathlib
import platform
import resource
import sys
from importlib import metadata
from typing import Any

import jax

from input_pipeline import files

log = logging.getLogger(__name__)

MACHINE_FILE = "machine.json"


def record(workdir: pathlib.Path) -> None:
    """Writes `<workdir>/machine.json`. If that fails, the log says so, and nothing else happens."""
    if jax.process_index():
        return
    try:
        files.write_whole(workdir / MACHINE_FILE, json.dumps(describe(), indent=1))
    except OSError as error:
        log.warning("%s can't be written: %s", workdir / MACHINE_FILE, error)


def describe() -> dict[str, Any]:
    """The devices, the versions, and the largest use of memory by this process so far.

    Memory is in bytes: `memory` is the process's own, and `device_memory` that of its first device,
    if the device counts it.
    """
    device = jax.local_devices()[0]
    unit = 1 if sys.platform == "darwin" else 1024
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "devices": jax.device_count(),
        "kind": device.device_kind,
        "processes": jax.process_count(),
        "system": platform.platform(terse=True),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "xlir": version(),
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        **({"device_memory": peak} if peak else {}),
    }


def version() -> str:
    """The installed version of xlir; empty if it runs without being installed."""
    try:
        return metadata.version("xlir")
    except metadata.PackageNotFoundError:
        return ""
