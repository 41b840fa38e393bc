"""Outputs of frozen towers, computed once and kept on disk.

A cache file is named by a fingerprint of everything that its rows depend on: the tower's weights,
the preprocessing and the source. Change any of them and another file is asked for, so a stale one
is never read. Rows are appended in order; an interrupted build goes on at its last whole row.
"""

import fcntl
import json
import os
import pathlib
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from input_pipeline.cache import fingerprint

# Rows computed between two writes: what an interrupt can cost.
BLOCK = 1024
ITEM = np.dtype(np.float32).itemsize


def cached(
    folder: pathlib.Path,
    description: Mapping[str, object],
    count: int,
    dim: int,
    compute: Callable[[int, int], Float[np.ndarray, "rows dim"]],
    *,
    label: str,
    block: int = BLOCK,
    agree: Callable[[int], int] | None = None,
) -> Float[np.ndarray, "count dim"]:
    """The features of `count` inputs, from the cache or computed into it.

    Args:
      folder: where cache files live.
      description: everything the features depend on; part of the file's name.
      count: number of inputs.
      dim: width of a feature vector.
      compute: (start, stop) -> the features of those inputs.
      label: what the progress bar calls them.
      block: rows computed between two writes.
      agree: where several processes compute together, each with a folder of its own: rows that are
        here -> rows that are everywhere.

    Returns:
      A read-only, memory-mapped array.

    Raises:
      OSError: the folder can't be written, or the disk is full; rows so far are kept.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    name = fingerprint({**description, "count": count, "dim": dim})
    done, partial = folder / f"{name}.npy", folder / f"{name}.partial"
    with open(folder / f"{name}.lock", "w") as lock:
        try:
            # A second run that wants the same features waits for the first, then reads them. Not
            # where processes compute together: two runs' could wait for each other for ever.
            fcntl.flock(lock, fcntl.LOCK_EX | (fcntl.LOCK_NB if agree else 0))
        except BlockingIOError:
            partial = folder / f"{name}.{os.getpid()}.partial"
        rows = count if done.exists() else _rows(partial, dim)
        start = agree(rows) if agree else rows
        if start < count:
            # Who has them all computes with those who don't, and keeps what it has.
            target = None if done.exists() else partial
            _build(target, start, count, dim, compute, label, block)
            if target:
                text = json.dumps(description, indent=1, sort_keys=True)
                (folder / f"{name}.json").write_text(text)
                target.rename(done)
    return np.load(done, mmap_mode="r")


def _rows(partial: pathlib.Path, dim: int) -> int:
    """Whole rows of an unfinished file."""
    if not partial.exists() or not partial.stat().st_size:
        return 0
    return (partial.stat().st_size - _header_bytes(partial)) // (dim * ITEM)


def _build(
    partial: pathlib.Path | None,
    start: int,
    count: int,
    dim: int,
    compute: Callable[[int, int], Float[np.ndarray, "rows dim"]],
    label: str,
    block: int,
) -> None:
    """Computes the rows from `start` on, into a file or for nothing."""
    with open(partial or os.devnull, "ab") as file:
        if partial and file.tell() == 0:
            header = {"descr": "<f4", "fortran_order": False, "shape": (count, dim)}
            np.lib.format.write_array_header_1_0(file, header)
            file.flush()
        if partial:
            file.truncate(_header_bytes(partial) + start * dim * ITEM)
        with tqdm(total=count, initial=start, desc=label, unit="") as bar:
            while start < count:
                stop = min(start + block, count)
                rows = np.ascontiguousarray(compute(start, stop), np.float32)
                if rows.shape != (stop - start, dim):
                    raise ValueError(f"{label}: expected {(stop - start, dim)}, got {rows.shape}")
                if not np.isfinite(rows).all():
                    raise ValueError(f"{label}: a feature of rows {start} to {stop} is not finite")
                file.write(rows.tobytes())
                if partial:
                    file.flush()
                    os.fsync(file.fileno())
                bar.update(stop - start)
                start = stop


def _header_bytes(path: pathlib.Path) -> int:
    with open(path, "rb") as file:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        return file.tell()
