"""Outputs of frozen towers, computed once and kept on disk.

The name of a cache file is a fingerprint of everything that its rows depend on: the tower's
weights, the preprocessing and the source. If any of these change, so does the name: stale features
are never read.

The file NAME.sha256 has a line for each block of rows: its SHA-256, its first row and the row after
its last one. The digests are checked whenever the cache is opened. Only rows that are damaged, cut
off or not written yet are computed, so an interrupted run resumes after its last complete block. If
the cache can't be written, the computed rows stay in memory.
"""

import concurrent.futures
import contextlib
import fcntl
import hashlib
import io
import json
import logging
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from jaxtyping import Bool, Float
from tqdm import tqdm

from input_pipeline.cache import fingerprint
from input_pipeline.files import write_whole

log = logging.getLogger(__name__)

# Rows computed between two writes; an interrupted run loses no more than these.
BLOCK = 1024
ITEM = np.dtype(np.float32).itemsize
# A line of NAME.sha256: SHA-256, first row, row after the last one.
LINE = re.compile(rb"([0-9a-f]{64}) ([0-9]{1,18}) ([0-9]{1,18})")


def cached(
    folder: pathlib.Path,
    description: Mapping[str, object],
    shape: tuple[int, int],
    compute: Callable[[int, int], Float[np.ndarray, "rows dim"]],
    *,
    label: str,
    block: int = BLOCK,
    agree: Callable[[int], int] | None = None,
) -> Float[np.ndarray, "count dim"]:
    """The features of all inputs: read from the cache, or computed and written to it.

    Args:
      folder: the folder of the cache files.
      description: everything that the features depend on; its fingerprint is the file's name.
      shape: number of inputs, and width of a feature vector.
      compute: (start, stop) -> the features of inputs start to stop - 1.
      label: name of the features in the progress bar and in messages.
      block: rows computed between two writes.
      agree: takes a row number from every process and returns the lowest one to all of them.
        Needed if several processes, each with its own cache folder, compute together.

    Returns:
      A read-only array, memory-mapped if all rows are on disk.

    Raises:
      ValueError: `compute` returned a wrong shape, or a feature that is not finite.
    """
    count, dim = shape
    name = fingerprint({**description, "count": count, "dim": dim})
    # A second run that needs the same features waits for the first one, and then reads them. A run
    # of several processes does not wait, because two such runs could wait for each other forever.
    with _lock(folder / f"{name}.lock", wait=agree is None) as obstacle:
        rows = _Rows(folder / f"{name}.npy", count, dim, obstacle)
        agree = agree or (lambda row: row)
        start = agree(rows.first_missing())
        if start < count and not obstacle:
            rows.describe(description)
        with tqdm(total=count, desc=label, unit="", disable=start == count) as bar:
            while start < count:
                stop = min(start + block, count)
                rows.put(start, _checked(compute(start, stop), (stop - start, dim), start, label))
                bar.update(int(rows.intact.sum()) - bar.n)
                # `compute` runs on all processes together, so even a process whose own cache has
                # these rows takes part.
                start = agree(rows.first_missing())
        return rows.array()


@contextlib.contextmanager
def _lock(file: pathlib.Path, *, wait: bool) -> Iterator[str]:
    """Locks a cache file; yields why the cache can't be written, or an empty string if it can."""
    with contextlib.ExitStack() as stack:
        obstacle = ""
        try:
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = stack.enter_context(open(file, "w"))
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            obstacle = "another run is writing it"
        except OSError as error:
            obstacle = str(error)
        yield obstacle


def _checked(
    features: np.ndarray, shape: tuple[int, int], start: int, label: str
) -> Float[np.ndarray, "rows dim"]:
    features = np.ascontiguousarray(features, np.float32)
    if features.shape != shape:
        raise ValueError(f"{label}: expected {shape}, got {features.shape}")
    if not np.isfinite(features).all():
        stop = start + len(features)
        raise ValueError(f"{label}: a feature of rows {start} to {stop} is not finite")
    return features


class _Rows:
    """The rows of a cache file, and which of them are intact.

    Args:
      file: the array, in NumPy's format.
      count: number of rows.
      dim: their width.
      obstacle: why the file can't be written; empty if it can.

    Attributes:
      intact: for each row, whether it is in memory, or on disk with the right digest.
    """

    def __init__(self, file: pathlib.Path, count: int, dim: int, obstacle: str):
        self._file, self._sums, self._obstacle = file, file.with_suffix(".sha256"), obstacle
        self._count, self._dim = count, dim
        self._header, self._width = _header(count, dim), dim * ITEM
        self._memory: np.ndarray | None = None
        self._lines: list[bytes] = []
        self.intact: Bool[np.ndarray, " count"] = np.zeros(count, bool)
        # If the file can't be read, no row counts as intact.
        with contextlib.suppress(OSError):
            self._verify()
        if not obstacle:
            # Unfinished files of killed runs and of earlier versions.
            for left in file.parent.glob(f"{file.stem}.*partial"):
                log.info("removing %s: a run was stopped while it wrote this file", left)
                left.unlink(missing_ok=True)

    def _verify(self) -> None:
        """Finds the intact rows, and logs how many are damaged."""
        with open(self._file, "rb") as file, concurrent.futures.ThreadPoolExecutor() as pool:
            header = os.pread(file.fileno(), len(self._header), 0)
            try:
                lines = self._sums.read_bytes().splitlines()
            except FileNotFoundError:
                lines = []
            blocks = [self._parse(line) for line in lines]
            checks = pool.map(lambda block: block and self._check(file.fileno(), *block), blocks)
            for line, block, whole in zip(lines, blocks, checks, strict=True):
                if whole:
                    self._lines.append(line)
                    self.intact[block[1] : block[2]] = True
            rows_there = max(0, os.fstat(file.fileno()).st_size - self._offset(0)) // self._width
        # Rows after the last block were not finished, unless the line of a block is damaged.
        written = rows_there if None in blocks else max((b[2] for b in blocks), default=0)
        damaged = int((~self.intact[:written]).sum())
        if damaged:
            first = int(np.argmin(self.intact))
            log.warning(
                "%s: %d of %d rows are damaged (from row %d on); they are computed again",
                *(self._file, damaged, self._count, first),
            )
        elif rows_there and not blocks:
            log.warning("%s: its rows have no digests; they are computed again", self._file)
        if header != self._header and not self._obstacle:
            self._write(0, self._header)

    def _parse(self, line: bytes) -> tuple[bytes, int, int] | None:
        """A block's digest, first row and row after the last one; None if the line is damaged."""
        match = LINE.fullmatch(line)
        if not match or not int(match[2]) < int(match[3]) <= self._count:
            return None
        return match[1], int(match[2]), int(match[3])

    def _check(self, file: int, digest: bytes, start: int, stop: int) -> bool:
        """Whether the rows on disk have this digest."""
        try:
            data = os.pread(file, (stop - start) * self._width, self._offset(start))
        except (OSError, OverflowError, MemoryError):  # a failing disk; a damaged line
            return False
        return hashlib.sha256(data).hexdigest().encode() == digest

    def _offset(self, row: int) -> int:
        return len(self._header) + row * self._width

    def first_missing(self) -> int:
        """The first row that is not intact; `count` if all rows are intact."""
        return self._count if self.intact.all() else int(np.argmin(self.intact))

    def describe(self, description: Mapping[str, object]) -> None:
        """Writes, for people, a file that says what the rows were computed from."""
        with contextlib.suppress(OSError):
            text = json.dumps(description, indent=1, sort_keys=True)
            write_whole(self._file.with_suffix(".json"), text)

    def put(self, start: int, rows: Float[np.ndarray, "rows dim"]) -> None:
        """Stores those of `rows` that are missing; the first row has the number `start`."""
        missing = np.concatenate([[False], ~self.intact[start : start + len(rows)], [False]])
        for first, stop in np.flatnonzero(np.diff(missing)).reshape(-1, 2).tolist():
            self._keep(start + first, rows[first:stop])
            self.intact[start + first : start + stop] = True

    def _keep(self, start: int, rows: Float[np.ndarray, "rows dim"]) -> None:
        """Stores rows on disk or, if that fails, in memory."""
        if not self._obstacle:
            data = rows.tobytes()
            line = f"{hashlib.sha256(data).hexdigest()} {start} {start + len(rows)}".encode()
            try:
                self._write(self._offset(start), data)
                # Written after the rows, so that a line always describes rows that are on disk.
                write_whole(self._sums, b"\n".join([*self._lines, line, b""]))
                self._lines.append(line)
                return
            except OSError as error:
                self._obstacle = str(error)
        if self._memory is None:
            log.warning(
                "%s can't be written, so the features are not kept: %s", self._file, self._obstacle
            )
            self._memory = np.zeros((self._count, self._dim), np.float32)
            intact = np.flatnonzero(self.intact)
            if len(intact):
                self._memory[intact] = self._mapped(int(intact[-1]) + 1)[intact]
        self._memory[start : start + len(rows)] = rows

    def _write(self, offset: int, data: bytes) -> None:
        """Writes into the file and flushes it to disk."""
        descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o666)
        with open(descriptor, "r+b") as file:
            if offset and not os.fstat(descriptor).st_size:
                file.write(self._header)
            file.seek(offset)
            file.write(data)
            file.flush()
            os.fsync(descriptor)

    def array(self) -> Float[np.ndarray, "count dim"]:
        """All rows."""
        if self._memory is None:
            return self._mapped(self._count)
        self._memory.flags.writeable = False
        return self._memory

    def _mapped(self, rows: int) -> Float[np.ndarray, "rows dim"]:
        """The first `rows` rows, mapped from disk."""
        shape = (rows, self._dim)
        return np.memmap(self._file, np.float32, "r", offset=len(self._header), shape=shape)


def _header(count: int, dim: int) -> bytes:
    """The header of a .npy file of float32."""
    buffer = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": (count, dim)}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()
