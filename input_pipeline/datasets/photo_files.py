"""Finds and reads photos in folders, or in downloaded zip archives without unpacking them.

A partly downloaded archive is refused before any photo is prepared. It lacks the table of contents
at its end or, if it was downloaded in several segments, some of its photos. Every photo is checked
against its CRC-32 when it is read.
"""

import os
import pathlib
import zipfile
import zlib
from collections.abc import Iterable
from typing import NamedTuple

from tqdm import tqdm

from input_pipeline import photo_limits

LOCAL_HEADER = b"PK\x03\x04"
# Sizes of the archives at images.cocodataset.org, in bytes.
PUBLISHED = {"train2014.zip": 13_510_573_713, "val2014.zip": 6_645_013_297}
# Endings of files that download programs keep beside an incomplete file.
LEFT_BESIDE = (".aria2", ".part", ".crdownload", ".st")


class FileInFolder(NamedTuple):
    """A photo that is a file in a folder."""

    path: pathlib.Path
    # Identifies the content: relative path, size, modification time.
    identity: tuple

    def read(self) -> bytes:
        """The file's bytes.

        Raises:
          OSError: the file can't be read.
          photo_limits.Refused: the file is no longer a regular file, or is too large.
        """
        return photo_limits.read(self.path)


class FileInZip(NamedTuple):
    """A photo that is a member of a zip archive."""

    archive: zipfile.ZipFile
    member: zipfile.ZipInfo
    # Identifies the content: name in the archive, size, CRC.
    identity: tuple

    def read(self) -> bytes:
        """The member's bytes, checked against their CRC. Several threads may read at once.

        Raises:
          photo_limits.Refused: the member is too large for a photo.
          ValueError: the member is damaged.
        """
        photo_limits.require(self.member.file_size, "the member of a zip archive")
        return self.unpack()

    def unpack(self) -> bytes:
        """The member's bytes, as from `read` but without a limit on their size.

        Raises:
          ValueError: the member is damaged.
        """
        try:
            return photo_limits.unpack(self.archive, self.member)
        # NotImplementedError: an unknown compression; RuntimeError: a password.
        except (
            zipfile.BadZipFile,
            EOFError,
            zlib.error,
            NotImplementedError,
            RuntimeError,
        ) as error:
            raise partial(self.archive.filename, f"{self.member.filename}: {error}") from error


class PhotoFiles:
    """Finds photos in a folder, in its `images`, and in the zip archives of both.

    Each folder is listed only once, because there may be 100,000 photos. Archives are opened only
    if a photo is in none of the folders.
    """

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        self._listings: dict[pathlib.Path, set[str]] = {}
        self._archives: list[tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]] | None = None

    def find(self, filename: str, filepath: str) -> FileInFolder | FileInZip | None:
        """The file of a photo, or None if it is missing.

        Args:
          filename: the photo's name; may include a subfolder.
          filepath: COCO's folder, train2014 or val2014; may be empty.

        Raises:
          ValueError: an archive is not complete.
        """
        places = [filepath, f"images/{filepath}", "images", ""]
        names = [str(pathlib.PurePosixPath(place) / filename) for place in places]
        for name in names:
            path = self._folder / name
            # The listing has dangling links too (git-annex makes them): their photos are missing.
            if path.name in self._listing(path.parent) and path.is_file():
                # The modification time reveals a changed photo of the same size. Its drawback: a
                # copy of the folder with new times is prepared again, which takes minutes.
                status = path.stat()
                return FileInFolder(path, (name, status.st_size, status.st_mtime_ns))
        for archive, members in self._open_archives():
            for name in names:
                if name in members:
                    member = members[name]
                    identity = (member.filename, member.file_size, member.CRC)
                    return FileInZip(archive, member, identity)
        return None

    def _listing(self, place: pathlib.Path) -> set[str]:
        if place not in self._listings:
            self._listings[place] = set(os.listdir(place)) if place.is_dir() else set()
        return self._listings[place]

    def _open_archives(self) -> list[tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]]:
        if self._archives is None:
            files = [*self._folder.glob("*.zip"), *(self._folder / "images").glob("*.zip")]
            opened = [open_archive(file) for file in sorted(files)]
            self._archives = [
                (archive, {member.filename: member for member in archive.infolist()})
                for archive in opened
            ]
        return self._archives


def open_archive(file: pathlib.Path) -> zipfile.ZipFile:
    """Opens an archive and reads its table of contents.

    Raises:
      ValueError: the file is a partial download, or not a regular file.
    """
    if not file.is_file():
        raise ValueError(f"{file} is not a regular file: move it away")
    for ending in LEFT_BESIDE:
        if file.with_name(file.name + ending).exists():
            raise partial(file, f"{file.name}{ending} lies beside it")
    try:
        return zipfile.ZipFile(file)
    except zipfile.BadZipFile as error:
        raise partial(file, "it lacks the end of a zip archive") from error


def check(files: Iterable[FileInFolder | FileInZip]) -> None:
    """Checks that each member's header is in its archive: a segmented download may leave gaps.

    Raises:
      ValueError: an archive is not complete.
    """
    starts: dict[str, list[tuple[int, str]]] = {}
    for file in files:
        if isinstance(file, FileInZip):
            member = file.member
            starts.setdefault(file.archive.filename, []).append(
                (member.header_offset, member.filename)
            )
    for name, members in starts.items():
        with open(name, "rb") as archive:
            bar = tqdm(sorted(members), desc=f"checking {os.path.basename(name)}", unit="")
            for offset, member in bar:
                archive.seek(offset)
                if archive.read(len(LOCAL_HEADER)) != LOCAL_HEADER:
                    bar.close()
                    raise partial(name, f"{member} is not in it")


def partial(file: str | os.PathLike, fault: str) -> ValueError:
    """The error for an archive that is not complete."""
    file = pathlib.Path(file)
    whole = f" of {PUBLISHED[file.name]:,}" if file.name in PUBLISHED else ""
    return ValueError(
        f"{file} ({file.stat().st_size:,}{whole} bytes) is a partial download or damaged: {fault}; "
        "download it again (wget -c continues a partial download) or move it away"
    )
