"""Files that are trusted later: written whole or not at all, with digests that are checked.

The digests of a folder are kept in the format of `sha256sum`, so that a user can check a folder
without this package: `sha256sum -c SHA256SUMS`.
"""

import concurrent.futures
import hashlib
import os
import pathlib
from collections.abc import Iterable

SUMS = "SHA256SUMS"


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
    """Looks whether a file can be written, without writing it.

    Raises:
      OSError: it can't; the message says why.
    """
    if file.is_dir():
        raise IsADirectoryError(f"{file} can't be written: it is a folder")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"{file} can't be written: there is no folder {file.parent}")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise PermissionError(f"{file} can't be written: the place is read-only")


def sha256(file: pathlib.Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def write_sums(folder: pathlib.Path, names: Iterable[str]) -> None:
    """Writes the digests of files, by their paths in the folder, to its SHA256SUMS."""
    lines = [f"{sha256(folder / name)}  {name}\n" for name in sorted(names)]
    write_whole(folder / SUMS, "".join(lines))


def check_sums(folder: pathlib.Path, names: Iterable[str]) -> None:
    """Compares files with the digests in the folder's SHA256SUMS.

    A folder without that file is of a version that wrote none, and is not checked.

    Args:
      folder: where the files are.
      names: their paths in it.

    Raises:
      ValueError: a file is not what was written, or SHA256SUMS is damaged; the message names it.
      FileNotFoundError: a file is missing.
    """
    if not (folder / SUMS).is_file():
        return
    expected = _read_sums(folder / SUMS)
    names = sorted(names)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        digests = pool.map(sha256, [folder / name for name in names])
        for name, digest in zip(names, digests, strict=True):
            if name not in expected:
                raise ValueError(_damaged(folder / SUMS, f"it does not list {name}"))
            if digest != expected[name]:
                raise ValueError(_damaged(folder / name, f"its digest is not the one in {SUMS}"))


def _read_sums(file: pathlib.Path) -> dict[str, str]:
    """Path -> digest."""
    try:
        pairs = [line.split("  ", 1) for line in file.read_text(encoding="utf8").splitlines()]
        return {name: digest for digest, name in pairs}
    except ValueError as error:
        raise ValueError(_damaged(file, "it is not a list of digests")) from error


def _damaged(file: pathlib.Path, fault: str) -> str:
    return (
        f"{file} is damaged: {fault}. Restore it from a copy; where you changed it on purpose, "
        f"delete {SUMS} in that run's folder, and nothing is checked any more"
    )
