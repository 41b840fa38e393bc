"""Files that are trusted later: written whole or not at all, with digests that are checked.

The digests of a folder are kept in the format of `sha256sum`, so that a user can check a folder
without this package: `sha256sum -c SHA256SUMS`.
"""

import concurrent.futures
import contextlib
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
# What to do about a damaged file of a run.
RESTORE = (
    f"Restore it from a copy; where you changed it on purpose, delete {SUMS}, and the folder's "
    "files are not checked any more"
)


def write_whole(file: pathlib.Path, content: str | bytes) -> None:
    """Writes a file beside and renames it: a reader sees the old content or the new one.

    Raises:
      OSError: it can't be written; what was there before is untouched.
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
    """Finds out whether a file can be written, without writing it.

    Raises:
      OSError: it can't; the message says why.
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
    # Not opened: it may be a pipe, whose reader would see its end.
    elif not os.access(file, os.W_OK):
        raise PermissionError(f"{file} can't be written: it is read-only")


def make_writable_folder(folder: pathlib.Path) -> None:
    """Makes a folder if it does not exist, and finds out whether files can be written in it.

    Raises:
      OSError: the folder can't be made, or no file can be written in it; the message says why.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_and_remove(folder)
    except OSError as error:
        raise type(error)(f"can't write to {folder}: {error.strerror}") from error


def _write_and_remove(folder: pathlib.Path) -> None:
    """Makes a file in a folder, which is gone at once; raises OSError where that is impossible."""
    with tempfile.TemporaryFile(dir=folder):
        pass


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
    """Writes the digests of files, by their paths in the folder, to its SHA256SUMS.

    Args:
      folder: where the files are.
      names: of files that are there.
      coming: name -> content of files that are written next.
      keep: keep the digests of other files that are listed.
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

    Files that it does not list were written by a version without digests and are not checked.

    Args:
      folder: where the files are.
      names: their paths in it; default: all that SHA256SUMS lists.
      way_out: a sentence that says what to do about a damaged file.

    Raises:
      ValueError: a file is not what was written, or SHA256SUMS is damaged; the message names it.
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
                raise FileNotFoundError(f"{folder / name} is missing, which {SUMS} lists")
            if sha256 != expected[name]:
                fault = f"its digest is not the one in {SUMS}"
                raise ValueError(_damaged(folder / name, fault, way_out))


@contextlib.contextmanager
def checking(folder: pathlib.Path) -> Iterator[None]:
    """As `check_sums`, in a thread beside what the files are read for.

    If a file is damaged, that error is raised in place of any error that reading it has led to.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        check = pool.submit(check_sums, folder)
        try:
            yield
        finally:
            check.result()


def write_digested(file: pathlib.Path, content: object) -> None:
    """Writes JSON, and before it a line with its SHA-256."""
    text = json.dumps(content)
    write_whole(file, f"{digest(text)}\n{text}")


def read_digested(file: pathlib.Path) -> Any | None:
    """Reads what `write_digested` wrote; None if it is missing or, with a warning, damaged."""
    if not file.exists():
        return None
    expected, _, text = file.read_bytes().partition(b"\n")
    if digest(text).encode() == expected:
        return json.loads(text)
    log.warning("%s is damaged, or of an earlier version: it is made anew", file)
    return None


def with_digest(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON fields with one more, `sha256`: their SHA-256, for files that others write."""
    return fields | {"sha256": digest(json.dumps(fields, sort_keys=True))}


def without_digest(fields: dict[str, Any]) -> dict[str, Any]:
    """Undoes `with_digest`; raises ValueError where the digest is not that of the fields."""
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
