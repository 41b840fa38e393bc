"""Shards: files of photos with their captions, for more photos than memory can list.

A folder of shards holds ArrayRecord files and index.json, which lists them. One record is one photo
with its captions:

    bytes 0 to 3    n, the length of the header, unsigned, the lowest byte first
    n bytes         the header: JSON in UTF-8, such as
                    {"name": "a.jpg", "captions": ["A dog.", "Un chien"], "languages": ["en", "fr"]}
    the rest        the photo's file

`languages` has a code for each caption, empty if the language is unknown. The shards have few
records each, and an entry for each record (`group_size:1`), because a reader has to decode the
list of a shard's records before it reads one of them.
"""

import collections
import json
import logging
import pathlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from array_record.python import array_record_module

from input_pipeline import files
from input_pipeline.cache import fingerprint

log = logging.getLogger(__name__)

INDEX = "index.json"
# Records of a shard. To open a shard of 2,048 records and to read one of them takes 0.1 ms.
SHARD = 2048
WRITER_OPTIONS = "group_size:1,uncompressed"  # photos are compressed already
READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0,footer_prefetch_bytes:0"
READER_BUFFER = 4096
# Shards that are open at a time; the list of a shard's records takes 20 kB of memory.
OPEN = 128
# Seconds to wait before each new attempt to read from a store that fails.
PAUSES = (0.5, 1, 2, 4, 8, 16)
LENGTH = 4  # bytes


class Record(NamedTuple):
    """A photo with its captions; `languages` has a code, or an empty string, for each caption."""

    name: str
    captions: list[str]
    languages: list[str]
    image: bytes


class BrokenRecord(ValueError):
    """A record is damaged; others may be intact."""


def encode(record: Record) -> bytes:
    """The bytes of a record."""
    fields = {"name": record.name, "captions": record.captions, "languages": record.languages}
    header = json.dumps(fields, ensure_ascii=False).encode()
    return len(header).to_bytes(LENGTH, "little") + header + record.image


def decode(data: bytes) -> Record:
    """Undoes `encode`.

    Raises:
      ValueError: the bytes are not those of a record, or it has no caption.
    """
    end = LENGTH + int.from_bytes(data[:LENGTH], "little")
    try:
        fields = json.loads(data[LENGTH:end])
        record = Record(fields["name"], fields["captions"], fields["languages"], data[end:])
        if not (record.captions and all(isinstance(text, str) for text in record.captions)):
            raise ValueError("it has no captions")
        return record
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"it is not a photo with captions ({error})") from error


def write(file: pathlib.Path, records: Sequence[Record]) -> dict[str, Any]:
    """Writes a shard, under a temporary name until it is complete.

    Returns:
      Its entry in the index.

    Raises:
      OSError: the file can't be written.
    """
    unfinished = file.with_name(f"{file.name}.partial")
    try:
        writer = array_record_module.ArrayRecordWriter(str(unfinished), WRITER_OPTIONS)
        for record in records:
            writer.write(encode(record))
        writer.close()
    except RuntimeError as error:
        # For example, the disk is full. The first line of ArrayRecord's message has the reason.
        raise OSError(f"{file} can't be written: {str(error).splitlines()[0]}") from error
    entry = {
        "file": file.name,
        "records": len(records),
        "captions": sum(len(record.captions) for record in records),
        "bytes": unfinished.stat().st_size,
        "sha256": files.sha256(unfinished),
    }
    unfinished.rename(file)
    return entry


def write_index(folder: pathlib.Path, shards: Sequence[dict[str, Any]], **facts: Any) -> None:
    """Writes the index of a folder, last of all; `facts` are kept in it."""
    files.write_digested(folder / INDEX, {"shards": list(shards), **facts})


class Shards(Sequence):
    """The records of a folder of shards, read one by one; any number of threads may read.

    Memory holds a file name for each shard, and the lists of records of `OPEN` shards.

    Args:
      folder: a folder that `prepare` has completed.
      wait: waits for a number of seconds.

    Attributes:
      captions: number of captions.
      facts: what `write_index` was given besides the shards.
      fingerprint: identifies the records.

    Raises:
      FileNotFoundError: the folder has no index.
      ValueError: the index is damaged, or lists no records.
    """

    def __init__(self, folder: pathlib.Path, wait: Callable[[float], None] = time.sleep):
        self._folder, self._wait = folder, wait
        if not (folder / INDEX).is_file():
            raise FileNotFoundError(
                f"{folder} is not a complete folder of shards (it has no {INDEX}): run "
                f"`python -m xlir.main prepare --to={folder} PAIRS` to its end"
            )
        index = files.read_digested(folder / INDEX)
        if index is None:
            raise ValueError(f"{folder / INDEX} is damaged: run `prepare` again, which restores it")
        shards = index.pop("shards")
        self.facts = index
        self._names = [shard["file"] for shard in shards]
        self._sizes = np.array([shard["bytes"] for shard in shards], np.int64)
        self._ends = np.cumsum([shard["records"] for shard in shards], dtype=np.int64)
        if not len(self):
            raise ValueError(f"{folder} holds no photos")
        self.captions = sum(shard["captions"] for shard in shards)
        self.fingerprint = fingerprint([shard["sha256"] for shard in shards])
        self._readers: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, row: int) -> Record:
        """The record of a row. If the shard's file can't be read, this waits and tries again.

        Raises:
          BrokenRecord: the record is damaged.
          OSError: the file is missing, has another size than when it was written, or can't be
            read, even after some time.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"there is no row {row}")
        shard = int(np.searchsorted(self._ends, row, side="right"))
        place = row - int(self._ends[shard - 1] if shard else 0)
        damaged = False
        for pause in (*PAUSES, None):
            try:
                return decode(self._reader(shard).read([place])[0])
            except Exception as error:  # ArrayRecord raises RuntimeError, ValueError or IndexError
                self._forget(shard)
                fault = self._fault_of_store(shard)
                if not fault and damaged:
                    lines = str(error).splitlines() or [type(error).__name__]
                    name = self._folder / self._names[shard]
                    raise BrokenRecord(f"{name}, record {place}: {lines[0]}") from error
                # The store may have failed at first, and work again.
                damaged = not fault
            if pause and fault:
                log.warning("%s; trying again in %g s", fault, pause)
                self._wait(pause)
        raise OSError(
            f"{fault} ({len(PAUSES) + 1} attempts in {sum(PAUSES):.0f} s). When the disk or the "
            "network works again, run the same command to resume"
        )

    def _fault_of_store(self, shard: int) -> str:
        """What is wrong with a shard's file as a whole; empty if it can be read."""
        file = self._folder / self._names[shard]
        try:
            size = file.stat().st_size
            with open(file, "rb") as opened:
                opened.read(1)
        except OSError as error:
            return f"{file} can't be read: {error.strerror or error}"
        if size != self._sizes[shard]:
            return f"{file} has {size:,} bytes instead of {self._sizes[shard]:,}"
        return ""

    def _reader(self, shard: int) -> Any:
        """The open shard; the least recently used one is closed if too many are open."""
        with self._lock:
            if shard in self._readers:
                self._readers.move_to_end(shard)
                return self._readers[shard]
        reader = array_record_module.ArrayRecordReader(
            str(self._folder / self._names[shard]),
            options=READER_OPTIONS,
            file_reader_buffer_size=READER_BUFFER,
        )
        with self._lock:
            self._readers[shard] = reader
            # A reader is closed when the last thread that uses it drops it.
            while len(self._readers) > OPEN:
                self._readers.popitem(last=False)
        return reader

    def _forget(self, shard: int) -> None:
        """Closes a shard, because its reader may not recover from a failed read."""
        with self._lock:
            self._readers.pop(shard, None)
