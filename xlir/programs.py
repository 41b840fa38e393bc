"""Compiled programs are kept on disk, so that other processes start without compiling."""

import os
import pathlib
import platform

import jax

from input_pipeline.cache import cache_folder, fingerprint, make_folder

# Programs that took fewer seconds to compile are not kept. A text tower takes one second or less.
WORTH_KEEPING = 0.1


def keep_on_disk() -> None:
    """Makes JAX keep compiled programs in the cache folder and look for them there.

    If the user has chosen a folder (`JAX_COMPILATION_CACHE_DIR`), it stays chosen. If the cache
    folder can't be made, nothing is kept; if it is read-only, the programs in it are used.

    Other users must not write to the folder: JAX runs the programs that it finds.
    """
    if jax.config.jax_compilation_cache_dir:
        return
    try:
        folder = cache_folder() / "compiled"
        if jax.default_backend() == "cpu":
            folder /= fingerprint(_cpu())
        make_folder(folder.parent)
        make_folder(folder)
    except (OSError, RuntimeError):  # RuntimeError: the user has no home folder
        return
    # JAX would print a warning for every program that it can't write.
    writable = os.access(folder, os.W_OK, effective_ids=True)
    seconds = WORTH_KEEPING if writable else float("inf")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
    jax.config.update("jax_compilation_cache_dir", str(folder))


def _cpu() -> list[str]:
    """Describes this machine's CPU.

    A program that was compiled for one CPU may fail on another, and JAX's own keys do not tell
    CPUs apart (https://github.com/jax-ml/jax/issues/38445).
    """
    names = ("model", "cpu family", "flags", "Features", "CPU ")
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return [platform.node(), platform.machine(), platform.processor()]
    return sorted({line for line in lines if line.startswith(names)})
