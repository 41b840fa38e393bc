"""The photos that an index is made of: where they are found, and what is kept of each.

A photo has a path: that of its file, or that of an archive followed by the path in the archive, as
if the archive were a folder (`/photos/2023.zip/beach/1.jpg`).
"""

import calendar
import dataclasses
import fnmatch
import functools
import glob
import hashlib
import io
import os
import stat
import tarfile
import time
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence

from PIL import Image

from input_pipeline import images, photo_limits

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"})
ZIP_SUFFIXES = (".zip",)
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
# Pixels of a thumbnail's longer side, and its quality as JPEG.
THUMBNAIL, QUALITY = 320, 80
# Errors of damaged archives and of their members.
_DAMAGED = (
    OSError,
    EOFError,
    zlib.error,
    zipfile.BadZipFile,
    tarfile.TarError,
    NotImplementedError,
    RuntimeError,
    ValueError,
)


@dataclasses.dataclass(frozen=True)
class Photo:
    """A photo as it lies on disk.

    Attributes:
      path: its path; see the module.
      size: bytes.
      modified: time of the last change, in nanoseconds since 1970. With the size it tells whether
        a photo has changed since it was indexed.
      read: returns the bytes; raises ValueError or OSError if they can't be read.
    """

    path: str
    size: int
    modified: int
    read: Callable[[], bytes] = dataclasses.field(compare=False, repr=False)

    @property
    def id(self) -> str:
        """Identifies the photo in an index; tells nothing about the path."""
        return identifier(self.path)


@dataclasses.dataclass(frozen=True)
class Described:
    """What an index keeps of a photo beside its embedding.

    Attributes:
      taken: when it was taken, in seconds since 1970 by the clock of the camera: from EXIF, else
        the time of the file's last change, in local time.
      width, height: pixels, upright.
      thumbnail: a small JPEG, upright.
    """

    taken: int
    width: int
    height: int
    thumbnail: bytes


def identifier(path: str) -> str:
    """The id of the photo with a path: 20 hexadecimal digits."""
    return hashlib.sha256(path.encode()).hexdigest()[:20]


def folder_of(path: str) -> str:
    """The folder of a photo in the form that filters compare: case-folded, with slashes around."""
    folder = os.path.dirname(path).strip("/")
    return f"/{unicodedata.normalize('NFC', folder).casefold()}/" if folder else "/"


def name_of(path: str) -> str:
    """The file name of a photo in the form that filters compare: case-folded."""
    return unicodedata.normalize("NFC", os.path.basename(path)).casefold()


def loaded(photo: Photo) -> Photo:
    """A photo that may be read in any order: one that lies in an archive is read now."""
    if isinstance(photo.read, functools.partial) and photo.read.func is photo_limits.read:
        return photo
    try:
        data = photo.read()
    except (ValueError, OSError) as error:
        return dataclasses.replace(photo, read=functools.partial(_raise, error))
    return dataclasses.replace(photo, read=lambda: data)


def _raise(error: Exception) -> bytes:
    raise error


def describe(data: bytes, modified: int) -> Described:
    """Reads the size and the time of a photo, and makes its thumbnail.

    Args:
      data: a file's bytes.
      modified: see `Photo`; used if the photo does not tell when it was taken.

    Raises:
      input_pipeline.images.ImageError: the photo can't be decoded.
    """
    thumbnail = Image.fromarray(images.preview(data, THUMBNAIL))
    buffer = io.BytesIO()
    thumbnail.save(buffer, "JPEG", quality=QUALITY)
    width, height, taken = images.facts(data)
    if taken is None:
        taken = _local_seconds(modified // 1_000_000_000)
    return Described(taken, width, height, buffer.getvalue())


def _local_seconds(timestamp: int) -> int:
    """A time in seconds since 1970 as the local clock showed it."""
    try:
        return calendar.timegm(time.localtime(timestamp))
    except (OverflowError, ValueError, OSError):
        return 0


def find(
    places: Sequence[str | os.PathLike],
    exclude: Sequence[str] = (),
    skip: Callable[[str], None] = lambda reason: None,
) -> Iterator[Photo]:
    """The photos in files, folders (at any depth), archives and patterns, each one once.

    Links inside folders are not followed, so that an index of a folder never holds what lies
    outside it. A place that is a link itself is followed.

    Args:
      places: files, folders, zip and tar archives, or patterns such as `photos/*/raw`. A file or
        archive that is named is taken whatever its extension.
      exclude: patterns of paths to leave out, with `*` and `?`: of a file's or folder's name, or
        of the last parts of a path, such as `private/*.png`.
      skip: called with one line for each archive or folder that can't be read.

    Raises:
      FileNotFoundError: a place does not exist.
    """
    seen: set[str] = set()
    for root in roots(places):
        for photo in _under(root, _Excluded(exclude), skip):
            if photo.path not in seen:
                seen.add(photo.path)
                yield photo


def roots(places: Sequence[str | os.PathLike]) -> list[str]:
    """The absolute paths, free of links, that the places name.

    Raises:
      FileNotFoundError: a place does not exist.
    """
    found: dict[str, None] = {}
    for place in map(os.fspath, places):
        named = [place] if os.path.exists(place) else sorted(glob.glob(place, recursive=True))
        if not named:
            raise FileNotFoundError(f"there is no file or folder {place}")
        found |= dict.fromkeys(map(os.path.realpath, named))
    return list(found)


def is_archive(path: str) -> bool:
    """Whether a path has the extension of an archive that photos are read from."""
    return path.lower().endswith((*ZIP_SUFFIXES, *TAR_SUFFIXES))


class _Excluded:
    """Whether a path matches one of the patterns of `find`."""

    def __init__(self, patterns: Iterable[str]):
        self._patterns = [pattern.strip("/") for pattern in patterns]

    def __call__(self, path: str) -> bool:
        parts = path.strip("/").split("/")
        return any(
            fnmatch.fnmatchcase("/".join(parts[-1 - pattern.count("/") :]), pattern)
            for pattern in self._patterns
        )


def _under(root: str, excluded: _Excluded, skip: Callable[[str], None]) -> Iterator[Photo]:
    """The photos of one root: a folder, an archive or a file."""
    if os.path.isdir(root):
        yield from _in_folder(root, excluded, skip)
    elif not excluded(root):
        yield from _in_archive(root, excluded, skip) if is_archive(root) else _file(root, skip)


def _in_folder(folder: str, excluded: _Excluded, skip: Callable[[str], None]) -> Iterator[Photo]:
    try:
        with os.scandir(folder) as scanned:
            entries = sorted(scanned, key=lambda entry: entry.name)
    except OSError as error:
        return skip(f"{folder}: {error.strerror}")
    for entry in entries:
        if entry.is_symlink() or excluded(entry.path):
            continue
        if entry.is_dir():
            yield from _in_folder(entry.path, excluded, skip)
        elif is_archive(entry.path):
            yield from _in_archive(entry.path, excluded, skip)
        elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
            yield from _file(entry.path, skip)


def _file(path: str, skip: Callable[[str], None]) -> Iterator[Photo]:
    try:
        path.encode()
        status = os.stat(path, follow_symlinks=False)
    except UnicodeEncodeError:
        return skip(f"{path!r}: the name is not valid UTF-8; rename the file")
    except OSError as error:  # removed while the folder was read
        return skip(f"{path}: {error.strerror}")
    if not stat.S_ISREG(status.st_mode):
        return skip(f"{path} is not a regular file")
    read = functools.partial(photo_limits.read, path)
    yield Photo(path, status.st_size, status.st_mtime_ns, read)


def _in_archive(path: str, excluded: _Excluded, skip: Callable[[str], None]) -> Iterator[Photo]:
    """The photos in a zip or tar archive.

    They must be read in the order in which they are yielded, and before the next one is taken: a
    compressed tar archive can only be read from its beginning to its end.
    """
    members = _zip_members if path.lower().endswith(ZIP_SUFFIXES) else _tar_members
    try:
        for name, size, modified, read in members(path):
            inside = os.path.normpath(name)
            if os.path.splitext(inside)[1].lower() not in SUFFIXES:
                continue
            whole = f"{path}/{inside}"
            if inside.startswith(("/", "..")) or not _is_text(inside):
                skip(f"{path}: the path {inside!r} in it leads out of it or is not valid UTF-8")
            elif not excluded(whole):
                yield Photo(whole, size, modified, functools.partial(_checked, whole, size, read))
    except _DAMAGED as error:
        skip(f"{path} can't be read: {_reason(error)}")


def _zip_members(path: str) -> Iterator[tuple[str, int, int, Callable[[], bytes]]]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if not member.is_dir():
                moment = time.mktime((*member.date_time, 0, 0, -1))
                modified = int(moment) * 1_000_000_000 + member.CRC % 1_000_000_000
                read = functools.partial(photo_limits.unpack, archive, member)
                yield member.filename, member.file_size, modified, read


def _tar_members(path: str) -> Iterator[tuple[str, int, int, Callable[[], bytes]]]:
    with tarfile.open(path) as archive:
        while member := archive.next():
            archive.members.clear()  # a list that would grow with the archive
            if member.isreg():
                read = functools.partial(_tar_content, archive, member)
                yield member.name, member.size, int(member.mtime * 1e9), read


def _tar_content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    with archive.extractfile(member) as opened:
        return opened.read()


def _checked(path: str, size: int, read: Callable[[], bytes]) -> bytes:
    """The content of a member, unless it is too large; damage is reported as a ValueError."""
    try:
        photo_limits.require(size, "the file")
        return read()
    except _DAMAGED as error:
        raise ValueError(f"{path}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
