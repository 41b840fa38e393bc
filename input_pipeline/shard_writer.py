"""Turns files of photos with captions (`input_pipeline.pairs`) into a folder of shards.

Processes work side by side, each on one source file at a time. A source has been finished if
SOURCE.json lies in the folder; a preparation that was killed goes on with the others. Photos with
the same bytes are kept once in the whole folder: a table on disk, which all processes share, has
the source that keeps each photo.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import gzip
import hashlib
import json
import logging
import multiprocessing
import pathlib
import sqlite3
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from input_pipeline import archives, files, images, near_copies, pairs, shards
from input_pipeline.cache import fingerprint
from input_pipeline.kept_out import KeptOut, perceptual_hash

log = logging.getLogger(__name__)

# Seconds that a process waits for others to write to the table of photos.
PATIENCE = 600
# Seconds to wait before a source whose store fails is read again, from its beginning.
PAUSES = (2, 8, 32)
# Why a pair is left out, in the order in which this is found.
REASONS = (
    "without a photo",
    "without a caption",
    "captions in other languages",
    "photos of test sets, by name",
    "photos of test sets, by content",
    "can't be decoded",
    "too small",
    "near copies of photos of test sets",
    "the same photo as another",
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Which pairs are kept.

    Attributes:
      kept_out: photos that must not be trained on.
      test_sets: fingerprints of the test sets that they are from.
      languages: codes of the languages whose captions are kept; empty: all.
      min_side: the least width and height of a photo, in pixels.
    """

    kept_out: KeptOut
    test_sets: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    min_side: int = 64

    @functools.cached_property
    def fingerprint(self) -> str:
        """Identifies the options."""
        own = [self.test_sets, self.languages, self.min_side]
        return fingerprint([self.kept_out.fingerprint(), near_copies.THRESHOLD, own])


def prepare(
    sources: Sequence[pathlib.Path], folder: pathlib.Path, options: Options, processes: int
) -> dict[str, Any]:
    """Writes a folder of shards, or completes it.

    Sources may be added in a later call, which names the earlier ones, too. Sources that have
    changed, or were prepared with other options, are prepared again.

    Args:
      sources: tar archives or Parquet files.
      folder: the folder of the shards.
      options: which pairs are kept.
      processes: number of processes.

    Returns:
      The numbers of photos and captions, and of pairs that were left out by reason.

    Raises:
      ValueError: a source is of another kind, or an earlier one is not named; all pairs are left
        out; or another process prepares the folder.
      OSError: a file can't be read or written.
    """
    names = _names(sources)
    files.make_writable_folder(folder)
    busy = f"{folder} is being prepared by another process: wait until it has ended"
    with files.locked(folder / ".lock", busy):
        _check_sources(folder, names)
        (folder / shards.INDEX).unlink(missing_ok=True)
        for table in folder.glob(".photos-*"):
            if options.fingerprint not in table.name:
                table.unlink()
        parts = {}
        work = [(source, folder, name, options) for name, source in names.items()]
        with _pool(min(processes, len(work))) as pool:
            futures = {pool.submit(_prepare_source, *item): item[2] for item in work}
            try:
                done = concurrent.futures.as_completed(futures)
                for future in tqdm(done, total=len(work), desc=f"preparing {folder.name}", unit=""):
                    parts[futures[future]] = future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return _finish(folder, [parts[name] for name in names], options)


@contextlib.contextmanager
def _pool(processes: int) -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    """Processes that start anew, because threads do not survive a fork."""
    context = multiprocessing.get_context("spawn")
    try:
        with concurrent.futures.ProcessPoolExecutor(processes, context) as pool:
            yield pool
    except concurrent.futures.process.BrokenProcessPool as error:
        raise OSError(
            "a process that prepared photos was killed, perhaps because memory was short: run the "
            "same command again to go on, with a smaller --processes"
        ) from error


def _names(sources: Sequence[pathlib.Path]) -> dict[str, pathlib.Path]:
    """A name for each source: those of its folder and of its file, without ending."""
    names: dict[str, pathlib.Path] = {}
    for source in sources:
        if not pairs.is_tar(source) and source.suffix != ".parquet":
            raise ValueError(f"{source} is neither a tar archive nor a Parquet file")
        name = f"{source.absolute().parent.name}-{source.name.partition('.')[0]}"
        if name in names:
            raise ValueError(f"{source} and {names[name]} would both be named {name}: rename one")
        names[name] = source
    return names


def _check_sources(folder: pathlib.Path, names: Collection[str]) -> None:
    """Raises ValueError if an earlier source of the folder is not among `names`.

    Photos that an earlier source keeps were left out of others, so it can't be taken away.
    """
    file = folder / ".sources"
    lost = set(files.read_digested(file) or ()) - set(names)
    if lost:
        raise ValueError(
            f"{folder} was prepared from {len(lost)} files that are not named now, such as "
            f"{min(lost)} (its folder and its name): name them, too, or choose another --to"
        )
    files.write_digested(file, sorted(names))


def _finish(
    folder: pathlib.Path, parts: Sequence[dict[str, Any]], options: Options
) -> dict[str, Any]:
    """Writes the index; returns the counts."""
    found = [shard for part in parts for shard in part["shards"]]
    if not found:
        reasons = _total(part["dropped"] for part in parts)
        raise ValueError(f"no pair is left: {json.dumps(reasons)[1:-1]}")
    dropped = _total(part["dropped"] for part in parts)
    for part in parts:
        if part["damage"]:
            log.warning("%s, after %d pairs", part["damage"], part["pairs"])
    shards.write_index(folder, found, dropped=dropped, kept_out=list(options.test_sets))
    return {
        "photos": sum(shard["records"] for shard in found),
        "captions": sum(shard["captions"] for shard in found),
        "dropped": dropped,
    }


def _total(counts: Iterator[dict[str, int]]) -> dict[str, int]:
    total = sum(map(collections.Counter, counts), collections.Counter())
    return {reason: total[reason] for reason in REASONS if total[reason]}


def _prepare_source(
    source: pathlib.Path, folder: pathlib.Path, name: str, options: Options
) -> dict[str, Any]:
    """The description of a source's shards, which are written unless that was done before."""
    status = source.stat()
    identity = [options.fingerprint, status.st_size, status.st_mtime_ns]
    beside = folder / f"{name}.json"
    known = files.read_digested(beside)
    if known and known["identity"] == identity and _intact(folder, known["shards"]):
        return known
    beside.unlink(missing_ok=True)
    for pause in (*PAUSES, None):
        for left in folder.glob(f"{name}-*.array_record*"):
            left.unlink()
        try:
            found = {**_Source(source, folder, name, options).write(), "identity": identity}
            files.write_digested(beside, found)
            return found
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            if pause is None:
                raise OSError(
                    f"{source} can't be prepared ({len(PAUSES) + 1} attempts): {error}. When the "
                    "disk or the network works again, run the same command to go on"
                ) from error
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def _intact(folder: pathlib.Path, found: Sequence[dict[str, Any]]) -> bool:
    """Whether all shards of a source are there, with their sizes."""
    return all(
        (folder / shard["file"]).is_file()
        and (folder / shard["file"]).stat().st_size == shard["bytes"]
        for shard in found
    )


class _Source:
    """Writes the shards of one source."""

    def __init__(self, source: pathlib.Path, folder: pathlib.Path, name: str, options: Options):
        self._source, self._folder, self._name, self._options = source, folder, name, options
        self._dropped: collections.Counter[str] = collections.Counter()
        self._shards: list[dict[str, Any]] = []
        self._seen: set[bytes] = set()
        self._damage = ""

    def write(self) -> dict[str, Any]:
        """Writes the shards; returns their description."""
        block: list[tuple[bytes, shards.Record]] = []
        count = 0
        for count, pair in enumerate(self._pairs(), 1):  # noqa: B007 (count is used below)
            reason, digest, record = self._judge(pair)
            if reason:
                self._dropped[reason] += 1
                continue
            block.append((digest, record))
            if len(block) == shards.SHARD:
                self._write(block)
                block = []
        self._write(block)
        return {
            "shards": self._shards,
            "dropped": dict(self._dropped),
            "pairs": count,
            "damage": self._damage,
        }

    def _pairs(self) -> Iterator[pairs.Pair]:
        """The pairs of the source; if it is damaged, those before the damage."""
        try:
            yield from pairs.read(self._source)
        except archives.DAMAGED as error:
            # Other errors of this type come from the store, which may work again.
            if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile):
                raise
            self._damage = f"{self._source} is damaged: {str(error).splitlines()[0]}"

    def _judge(self, pair: pairs.Pair) -> tuple[str, bytes, shards.Record | None]:
        """Why a pair is left out (empty: it is not); its photo's digest; its record."""
        languages, kept_out = self._options.languages, self._options.kept_out
        if pair.image is None:
            return "without a photo", b"", None
        if not pair.captions:
            return "without a caption", b"", None
        if languages and pair.language not in languages:
            return "captions in other languages", b"", None
        if kept_out.has_name(pair.name):
            return "photos of test sets, by name", b"", None
        digest = hashlib.sha256(pair.image).digest()
        if digest in kept_out.digests:
            return "photos of test sets, by content", b"", None
        try:
            found, (width, height, _) = perceptual_hash(pair.image), images.facts(pair.image)
        except images.ImageError:
            return "can't be decoded", b"", None
        if min(width, height) < self._options.min_side:
            return "too small", b"", None
        if near_copies.is_near_copy(found, kept_out.hashes):
            return "near copies of photos of test sets", b"", None
        if digest in self._seen:
            return "the same photo as another", b"", None
        self._seen.add(digest)
        languages = [pair.language] * len(pair.captions)
        return "", digest, shards.Record(pair.name, pair.captions, languages, pair.image)

    def _write(self, block: Sequence[tuple[bytes, shards.Record]]) -> None:
        """Writes the photos that no other source keeps as a shard, if there are any."""
        own = self._claim([digest for digest, _ in block])
        kept = [record for digest, record in block if digest in own]
        self._dropped["the same photo as another"] += len(block) - len(kept)
        if kept:
            file = self._folder / f"{self._name}-{len(self._shards):05d}.array_record"
            self._shards.append(shards.write(file, kept))

    def _claim(self, digests: Sequence[bytes]) -> set[bytes]:
        """The photos that this source keeps: it was the first to ask for them."""
        table = self._folder / f".photos-{self._options.fingerprint}.sqlite"
        with contextlib.closing(sqlite3.connect(table, timeout=PATIENCE)) as connection, connection:
            connection.execute(
                "CREATE TABLE IF NOT EXISTS kept (photo BLOB PRIMARY KEY, source TEXT) "
                "WITHOUT ROWID"
            )
            rows = [(digest[:16], self._name) for digest in digests]
            connection.executemany("INSERT OR IGNORE INTO kept VALUES (?, ?)", rows)
            found = "SELECT 1 FROM kept WHERE photo = ? AND source = ?"
            return {
                digest
                for digest, row in zip(digests, rows, strict=True)
                if connection.execute(found, row).fetchone()
            }
