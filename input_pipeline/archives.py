"""The members of zip and tar archives."""

import functools
import lzma
import stat
import struct
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator

from input_pipeline import photo_limits

# The path of a member in its archive, its size, its time (see `photos.Photo.modified`), and a
# function that returns its content.
Member = tuple[str, int, int, Callable[[], bytes]]

ZIP_SUFFIXES = (".zip",)
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
# Errors of damaged archives and of their members.
DAMAGED = (
    OSError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
    tarfile.TarError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    OverflowError,
    struct.error,
)
# Types of tar headers that hold the name or attributes of the next member. They are read into
# memory, so each may have at most _HEADER_BYTES.
_TAR_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_HEADER_BYTES = 1 << 20
# Times are clipped to this many seconds before or after 1970, because nanoseconds since 1970
# overflow 64 bits in 2262.
_LATEST = 9_000_000_000


def is_archive(path: str) -> bool:
    """Whether a path has the extension of a zip or tar archive."""
    return path.lower().endswith((*ZIP_SUFFIXES, *TAR_SUFFIXES))


def members(path: str) -> Iterator[Member]:
    """The files in a zip or tar archive.

    Each file must be read before the next one is taken from the iterator: a compressed tar archive
    can only be read from its beginning to its end.

    Raises:
      DAMAGED: the archive is damaged; members before the damage are yielded.
    """
    is_tar = path.lower().endswith(TAR_SUFFIXES)
    is_zip = path.lower().endswith(ZIP_SUFFIXES) or (not is_tar and zipfile.is_zipfile(path))
    return (_zip_members if is_zip else _tar_members)(path)


def _zip_members(path: str) -> Iterator[Member]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            is_link = stat.S_ISLNK(member.external_attr >> 16)
            if not (member.filename.endswith("/") or is_link):
                moment = time.mktime((*member.date_time, 0, 0, -1))
                modified = int(moment) * 1_000_000_000 + member.CRC % 1_000_000_000
                read = functools.partial(photo_limits.unpack, archive, member)
                yield member.filename, member.file_size, modified, read


class _Member(tarfile.TarInfo):
    """A member of a tar archive. Refuses headers that are damaged or would fill the memory."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        try:
            return super().frombuf(buf, encoding, errors)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:
            # `TarFile.next` would take these errors for the end of the archive.
            raise tarfile.ReadError(f"it is damaged: {error}") from error

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _TAR_HEADERS and not 0 <= self.size <= _HEADER_BYTES:
            raise tarfile.ReadError(f"it has a header of {self.size:,} bytes")
        return super()._proc_member(archive)


def _tar_members(path: str) -> Iterator[Member]:
    with tarfile.open(path, tarinfo=_Member, encoding="utf8") as archive:
        end = 0
        while member := archive.next():
            archive.members.clear()  # or the list would grow with the archive
            if archive.offset <= end or member.size < 0:
                raise tarfile.ReadError("it has a member of negative size")
            end = archive.offset
            if member.isreg():
                modified = int(max(-_LATEST, min(member.mtime, _LATEST)) * 1e9)
                read = functools.partial(_tar_content, archive, member)
                yield member.name, member.size, modified, read


def _tar_content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    with archive.extractfile(member) as opened:
        return opened.read()
