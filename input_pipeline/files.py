"""Atomic writes, and digests that show whether files are damaged.

A folder's digests are in its file SHA256SUMS, which `sha256sum -c SHA256SUMS` checks too.
"""

import concurrent.futures
import contextlib
import fcntl
import hashlib
import json
import logging
import os
import pathlib
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

log = logging.getLogger(__name__)

SUMS = "SHA256SUMS"
# What the user can do about a damaged file of a run.
RESTORE = (
    f"Restore it from a copy. If you changed it on purpose, delete {SUMS}: the folder's files are "
    "then no longer checked"
)


def write_whole(file: pathlib.Path, content: str | bytes) -> None:
    """Writes a file atomically, by renaming a temporary one: readers see the old or new content.

    Raises:
      OSError: the file can't be written; its old content is untouched.
    """
    unfinished = file.with_name(f"{file.name}.{os.getpid()}.partial")
    data = content.encode() if isinstance(content, str) else content
    try:
        with open(unfinished, "wb") as opened:
            opened.write(data)
            opened.flush()
            os.fsync(opened.fileno())
        unfinished.rename(file)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def check_writable(file: pathlib.Path) -> None:
    """Checks that a file can be written, without writing it.

    Raises:
      OSError: it can't be written; the message says why.
    """
    if file.is_dir():
        raise IsADirectoryError(f"{file} can't be written: it is a folder")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"{file} can't be written: there is no folder {file.parent}")
    if not file.exists():
        try:
            _write_and_remove(file.parent)
        except OSError as error:
            raise type(error)(f"{file} can't be written: {error.strerror}") from error
    # Do not open the file: if it is a pipe, its reader would take the closing for the end.
    elif not os.access(file, os.W_OK):
        raise PermissionError(f"{file} can't be written: it is read-only")


def make_writable_folder(folder: pathlib.Path) -> None:
    """Makes a folder if it does not exist, and checks that files can be written in it.

    Raises:
      OSError: the folder can't be made, or no file can be written in it; the message says why.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_and_remove(folder)
    except OSError as error:
        raise type(error)(f"can't write to {folder}: {error.strerror}") from error


def _write_and_remove(folder: pathlib.Path) -> None:
    """Makes a file in a folder and removes it at once; raises OSError if that is impossible."""
    with tempfile.TemporaryFile(dir=folder):
        pass


@contextlib.contextmanager
def locked(file: pathlib.Path, message: str) -> Iterator[None]:
    """Holds the lock of a file, which the system frees even if the process is killed.

    Raises:
      ValueError: another process holds the lock; the text is `message`.
    """
    with open(file, "a+") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(message) from error
        yield


def printable(text: str) -> str:
    """Escapes line ends, control characters and bytes that are not UTF-8, such as in file names."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def digest(content: str | bytes) -> str:
    """The SHA-256 of a text or of bytes, in hexadecimal."""
    data = content.encode() if isinstance(content, str) else content
    return hashlib.sha256(data).hexdigest()


def sha256(file: pathlib.Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def write_sums(
    folder: pathlib.Path,
    names: Iterable[str],
    coming: Mapping[str, str] | None = None,
    *,
    keep: bool = False,
) -> None:
    """Writes the digests of a folder's files to its SHA256SUMS.

    Args:
      folder: the folder of the files.
      names: paths, in the folder, of files that exist.
      coming: path -> content of files that the caller writes after this call.
      keep: keep the lines of SHA256SUMS for other files.
    """
    digests = _read_sums(folder / SUMS, RESTORE) if keep and (folder / SUMS).is_file() else {}
    digests |= {name: sha256(folder / name) for name in names}
    for name, content in (coming or {}).items():
        digests[name] = digest(content)
    lines = [f"{sha256}  {name}\n" for name, sha256 in sorted(digests.items())]
    write_whole(folder / SUMS, "".join(lines))


def check_sums(
    folder: pathlib.Path, names: Iterable[str] | None = None, way_out: str = RESTORE
) -> None:
    """Compares files with the digests in the folder's SHA256SUMS.

    Files that SHA256SUMS does not list, such as those of earlier versions, are not checked.

    Args:
      folder: the folder of the files.
      names: paths in the folder; default: all that SHA256SUMS lists.
      way_out: a sentence that says what to do about a damaged file.

    Raises:
      ValueError: a file or SHA256SUMS is damaged; the message names the file.
      FileNotFoundError: a file is missing.
    """
    if not (folder / SUMS).is_file():
        return
    expected = _read_sums(folder / SUMS, way_out)
    names = sorted(expected if names is None else expected.keys() & set(names))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        found = pool.map(_sha256_or_none, [folder / name for name in names])
        for name, sha256 in zip(names, found, strict=True):
            if sha256 is None:
                raise FileNotFoundError(f"{folder / name} is missing, but {SUMS} lists it")
            if sha256 != expected[name]:
                fault = f"its digest is not the one in {SUMS}"
                raise ValueError(_damaged(folder / name, fault, way_out))


@contextlib.contextmanager
def checking(folder: pathlib.Path) -> Iterator[None]:
    """Runs `check_sums` in a thread while the `with` block reads the files.

    If a file is damaged, the error of `check_sums` replaces any error from the block.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        check = pool.submit(check_sums, folder)
        try:
            yield
        finally:
            check.result()


def write_digested(file: pathlib.Path, content: object) -> None:
    """Writes a line with the SHA-256 of the JSON, then the JSON."""
    text = json.dumps(content)
    write_whole(file, f"{digest(text)}\n{text}")


def read_digested(file: pathlib.Path) -> Any | None:
    """Reads a file of `write_digested`; None if it is missing or (with a warning) damaged."""
    if not file.exists():
        return None
    expected, _, text = file.read_bytes().partition(b"\n")
    if digest(text).encode() == expected:
        return json.loads(text)
    log.warning("%s is damaged or was written by an earlier version: it is written again", file)
    return None


def with_digest(fields: dict[str, Any]) -> dict[str, Any]:
    """Adds the field `sha256` to JSON fields: the SHA-256 of the others.

    For files that another library writes as JSON.
    """
    return fields | {"sha256": digest(json.dumps(fields, sort_keys=True))}


def without_digest(fields: dict[str, Any]) -> dict[str, Any]:
    """Undoes `with_digest`; raises ValueError if the digest does not match the fields."""
    fields = {**fields}
    expected = fields.pop("sha256", None)
    if expected != digest(json.dumps(fields, sort_keys=True)):
        raise ValueError("its digest differs")
    return fields


def _sha256_or_none(file: pathlib.Path) -> str | None:
    return sha256(file) if file.is_file() else None


def _read_sums(file: pathlib.Path, way_out: str) -> dict[str, str]:
    """Path -> digest."""
    text = file.read_text(encoding="utf8", errors="replace")
    lines = [re.fullmatch("([0-9a-f]{64})  (.+)", line) for line in text.split("\n")[:-1]]
    if not text.endswith("\n") or not all(line and line[2].isprintable() for line in lines):
        raise ValueError(_damaged(file, "it is not a list of digests", way_out))
    return {line[2]: line[1] for line in lines}


def _damaged(file: pathlib.Path, fault: str, way_out: str) -> str:
    return f"{file} is damaged: {fault}. {way_out}"
