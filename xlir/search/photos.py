"""Finds the photos for an index, reads them, and describes them.

The path of a photo is that of its file. If the photo is in an archive, the path in the archive
follows that of the archive, as if the archive were a folder (`/photos/2023.zip/beach/1.jpg`).
"""

import calendar
import dataclasses
import fnmatch
import functools
import glob
import hashlib
import io
import os
import pathlib
import stat
import tarfile
import time
import unicodedata
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence

from PIL import Image

from input_pipeline import archives, images, photo_limits
from input_pipeline.files import printable
from xlir.search import filters

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"})
# Pixels of a thumbnail's longer side, and its quality as JPEG.
THUMBNAIL, QUALITY = 320, 80
# The largest size of a thumbnail in bytes, so that every store accepts it. A larger thumbnail is
# made again with lower quality.
THUMBNAIL_BYTES = 48_000


@dataclasses.dataclass(frozen=True)
class Photo:
    """A photo as it lies on disk.

    Attributes:
      path: its path; see the module's docstring.
      file: the file on disk that holds it: the photo's own file, or an archive.
      size: in bytes.
      modified: time of the last change, in nanoseconds since 1970. With the size it tells whether
        a photo has changed since it was indexed.
      read: returns the bytes; raises ValueError or OSError if they can't be read.
    """

    path: str
    file: str
    size: int
    modified: int
    read: Callable[[], bytes] = dataclasses.field(compare=False, repr=False)

    @property
    def id(self) -> str:
        """Identifies the photo in an index, and does not reveal the path."""
        return identifier(self.path)


@dataclasses.dataclass(frozen=True)
class Described:
    """What an index keeps of a photo besides its embedding.

    Attributes:
      taken: when it was taken, in seconds since 1970 by the camera's clock (EXIF). Photos without
        it have the local time of the file's last change.
      width, height: of the upright photo, in pixels.
      thumbnail: a small JPEG, upright.
    """

    taken: int
    width: int
    height: int
    thumbnail: bytes


def identifier(path: str) -> str:
    """The id of the photo at a path: 20 hexadecimal digits."""
    return hashlib.sha256(path.encode()).hexdigest()[:20]


def folder_of(path: str) -> str:
    """The folder of a photo in the form that filters compare: case-folded, with slashes around."""
    folder = os.path.dirname(path).strip("/")
    return f"/{filters.folded(folder)}/" if folder else "/"


def name_of(path: str) -> str:
    """The file name of a photo in the form that filters compare: case-folded."""
    return filters.folded(os.path.basename(path))


def loaded(photo: Photo) -> Photo:
    """A photo that can be read later, in any order. If it is in an archive, it is read now."""
    if photo.file == photo.path:
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
    width, height, taken = images.facts(data)
    if taken is None:
        taken = _local_seconds(modified // 1_000_000_000)
    return Described(taken, width, height, _jpeg(thumbnail))


def _jpeg(thumbnail: Image.Image) -> bytes:
    for quality in range(QUALITY, 0, -15):
        buffer = io.BytesIO()
        thumbnail.save(buffer, "JPEG", quality=quality)
        if buffer.tell() <= THUMBNAIL_BYTES:
            break
    return buffer.getvalue()


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
    """The photos in files, folders (at any depth), archives and patterns, each photo once.

    Links inside folders are not followed, so that an index of a folder never holds what lies
    outside it. A place that is a link itself is followed.

    Args:
      places: files, folders, zip and tar archives, or patterns such as `photos/*/raw`. A file or
        archive that is itself a place may have any extension.
      exclude: patterns with `*` and `?` for what to leave out. A pattern is compared with the name
        of a file or folder or, if it has slashes, with the last parts of a path: `private/*.png`.
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
    """The absolute paths that the places name, with all links resolved.

    Raises:
      FileNotFoundError: a place does not exist.
    """
    found: dict[str, None] = {}
    for place in map(os.fspath, places):
        named = [place] if os.path.exists(place) else _matching(place)
        if not named:
            raise FileNotFoundError(f"there is no file or folder {place}")
        found |= dict.fromkeys(map(os.path.realpath, named))
    return list(found)


def _matching(pattern: str) -> list[str]:
    """The files and folders that match a pattern."""
    parts = pathlib.PurePath(pattern).parts
    if os.path.islink(pattern):  # a dangling link
        return []
    if "**" not in parts:
        return sorted(glob.glob(pattern))
    # In `pathlib`, unlike `glob`, "**" does not follow links, which may go in circles.
    fixed = next(place for place, part in enumerate(parts) if glob.has_magic(part))
    found = pathlib.Path(*parts[:fixed]).glob("/".join(parts[fixed:]))
    return sorted(map(str, found))


class _Excluded:
    """Whether a path matches one of the patterns of `find`."""

    def __init__(self, patterns: Iterable[str]):
        # "[" is no wildcard here, because many file names contain it.
        self._patterns = [_composed(pattern).strip("/").replace("[", "[[]") for pattern in patterns]

    def __call__(self, path: str) -> bool:
        parts = _composed(path).strip("/").split("/")
        return any(
            fnmatch.fnmatchcase("/".join(parts[-1 - pattern.count("/") :]), pattern)
            for pattern in self._patterns
        )

    def member(self, archive: str, inside: str) -> bool:
        """Whether a member of an archive, or one of its folders in the archive, matches."""
        parts = inside.split("/")
        return any(self("/".join((archive, *parts[:depth]))) for depth in range(1, len(parts) + 1))


def _composed(path: str) -> str:
    """A path in Unicode's form NFC, in which a letter and its accents are one character."""
    return unicodedata.normalize("NFC", path)


def _under(root: str, excluded: _Excluded, skip: Callable[[str], None]) -> Iterator[Photo]:
    """The photos of one root: a folder, an archive or a file."""
    if os.path.isdir(root):
        yield from _in_folder(root, excluded, skip)
    elif not excluded(root):
        archive = archives.is_archive(root) or _holds_archive(root)
        yield from _in_archive(root, excluded, skip) if archive else _file(root, skip)


def _is_named_as_photo(name: str) -> bool:
    """Whether a file is named as a photo. (macOS keeps attributes of 1.jpg in `._1.jpg`.)"""
    return os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith("._")


def _holds_archive(path: str) -> bool:
    """Whether a file is an archive by its content. A file with a photo's extension never is."""
    if os.path.splitext(path)[1].lower() in SUFFIXES or not os.path.isfile(path):
        return False
    try:
        return zipfile.is_zipfile(path) or tarfile.is_tarfile(path)
    except archives.DAMAGED:
        return False


def _in_folder(folder: str, excluded: _Excluded, skip: Callable[[str], None]) -> Iterator[Photo]:
    try:
        with os.scandir(folder) as scanned:
            entries = sorted(scanned, key=lambda entry: entry.name)
    except OSError as error:
        return skip(f"{printable(folder)}: {error.strerror}")
    for entry in entries:
        if entry.is_symlink() or excluded(entry.path):
            continue
        if entry.is_dir():
            yield from _in_folder(entry.path, excluded, skip)
        elif archives.is_archive(entry.path):
            yield from _in_archive(entry.path, excluded, skip)
        elif _is_named_as_photo(entry.name):
            yield from _file(entry.path, skip)


def _file(path: str, skip: Callable[[str], None]) -> Iterator[Photo]:
    if status := _regular(path, skip):
        read = functools.partial(photo_limits.read, path)
        yield Photo(path, path, status.st_size, status.st_mtime_ns, read)


def _regular(path: str, skip: Callable[[str], None]) -> os.stat_result | None:
    """The status of a regular file. Others may block a reader, so they are skipped."""
    if not _is_text(path):
        return skip(f"{printable(path)}: the path is not valid UTF-8; rename the file or folder")
    try:
        status = os.stat(path, follow_symlinks=False)
    except OSError as error:  # removed while the folder was read
        return skip(f"{printable(path)}: {error.strerror}")
    if not stat.S_ISREG(status.st_mode):
        return skip(f"{printable(path)} is not a regular file")
    return status


def _in_archive(path: str, excluded: _Excluded, skip: Callable[[str], None]) -> Iterator[Photo]:
    """The photos in a zip or tar archive.

    Each photo must be read before the next one is taken from the iterator: a compressed tar
    archive can only be read from its beginning to its end.
    """
    if not _regular(path, skip):
        return
    try:
        for name, size, modified, read in archives.members(path):
            inside = os.path.normpath(name)
            if not _is_named_as_photo(os.path.basename(inside)):
                continue
            whole = f"{path}/{inside}"
            if inside.startswith(("/", "../")):
                skip(f"{printable(path)}: its member {printable(inside)} lies outside the archive")
            elif not _is_text(inside):
                skip(f"{printable(path)}: the path {printable(inside)} in it is not valid UTF-8")
            elif not excluded.member(path, inside):
                checked = functools.partial(_checked, whole, size, read)
                yield Photo(whole, path, size, modified, checked)
    except archives.DAMAGED as error:
        skip(f"{printable(path)} can't be read: {_reason(error)}")


def _checked(path: str, size: int, read: Callable[[], bytes]) -> bytes:
    """The content of a member, unless it is too large; damage is reported as a ValueError."""
    try:
        photo_limits.require(size, "the file")
        return read()
    except archives.DAMAGED as error:
        raise ValueError(f"{path}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return printable(" ".join(text.split())) or type(error).__name__


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
