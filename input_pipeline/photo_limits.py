"""Limits for photos: only regular files are read, and decoding must not take too much memory.

A FIFO would block, a device has no end, and a small file can hold a picture that takes gigabytes.
The memory for a file and its pixels is estimated from the file's size and header, before anything
is decoded. A photo that would take more than $XLIR_PHOTO_MB is refused.
"""

import os
import stat
import zipfile

from PIL import Image

VARIABLE = "XLIR_PHOTO_MB"
DEFAULT_MB = 500

# Supported formats -> bytes per pixel while Pillow decodes, measured with Pillow 13 and rounded up.
# Most formats are decoded in place, into 4 bytes per pixel; some libraries make copies. Other
# formats are not supported: their header may not tell the size of the picture (ICO, ICNS, BLP), or
# Pillow would start another program (EPS).
BYTES_PER_PIXEL = {
    **dict.fromkeys(("BMP", "DIB", "GIF", "JPEG", "MPO", "PNG", "TGA", "TIFF"), 5),
    "AVIF": 12,
    "JPEG2000": 28,
    "PPM": 12,
    "WEBP": 18,
}
# Pillow opens MPO (several JPEGs in one file) as JPEG.
FORMATS = tuple(format for format in BYTES_PER_PIXEL if format != "MPO")
# Pillow's mode -> bytes per pixel of a decoded image; other modes have 4.
STORED_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2}
# Bytes that libjpeg keeps for each sample of a JPEG of several scans.
COEFFICIENT_BYTES = 2
# libtiff unpacks a whole strip or tile at once, and copies it if it is JPEG or WebP.
STRIP_COPIES = 3
# Tags of TIFF.
ROWS_PER_STRIP, TILE_WIDTH, TILE_LENGTH, BITS_PER_SAMPLE = 278, 322, 323, 258
# Bytes for each photo, whatever its size: conversions of some rows at a time, decoders' buffers.
CONSTANT = 8_000_000
# Bytes of a zip member to read at a time. With bzip2 and LZMA, these are compressed bytes, which
# may unpack to 45,000 times as many.
CHUNK, PACKED_CHUNK = 1 << 20, 1 << 12


class Refused(ValueError):
    """The photo is not a regular file, or would take too much memory."""


def limit() -> int:
    """Bytes that one photo may take in memory, its file included: $XLIR_PHOTO_MB, or 500 MB.

    Raises:
      ValueError: the variable is not a whole number above 0.
    """
    value = os.environ.get(VARIABLE) or str(DEFAULT_MB)
    if not (value.isascii() and value.isdecimal() and int(value)):
        raise ValueError(f"{VARIABLE} is {value!r}; it takes megabytes, a whole number above 0")
    return int(value) * 1_000_000


def require(needed: int, what: str) -> None:
    """Checks that a number of bytes is within the limit; `what` names their use in the message.

    Raises:
      Refused: they exceed the limit.
    """
    if needed > limit():
        raise Refused(
            f"{what} would take {needed / 1e6:,.0f} MB in memory, but a photo may take at most "
            f"{limit() / 1e6:,.0f} MB (set {VARIABLE} to allow more)"
        )


def read(file: str | os.PathLike) -> bytes:
    """The content of a regular file.

    Raises:
      FileNotFoundError, OSError: it can't be read.
      Refused: it is a FIFO or a device, or larger than the limit.
    """
    with open(file, "rb", opener=_open_at_once) as opened:
        status = os.fstat(opened.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise Refused(f"{os.fspath(file)} is not a regular file")
        require(status.st_size, f"{os.fspath(file)}: the file")
        return opened.read(status.st_size)


def _open_at_once(file: str, flags: int) -> int:
    """Opens a file. If it is a FIFO, this does not wait for a writer."""
    return os.open(file, flags | os.O_NONBLOCK)


def unpack(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    """The content of a member of a zip archive, up to the size that the archive states for it.

    Raises:
      zipfile.BadZipFile, EOFError, zlib.error, NotImplementedError, RuntimeError: the member is
        damaged, compressed by an unknown method, or has a password.
    """
    packed = member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    parts = []
    with archive.open(member) as opened:
        while part := opened.read(PACKED_CHUNK if packed else CHUNK):
            parts.append(part)
    return b"".join(parts)


def check_header(image: Image.Image, data: bytes, size: tuple[int, int]) -> None:
    """Refuses an image that would take too much memory while it is decoded.

    Args:
      image: opened, perhaps reduced (`draft`), and not decoded yet.
      data: the bytes of its file, which are in memory too.
      size: its width and height in the file.

    Raises:
      Refused: it would take more than the limit.
    """
    needed = CONSTANT + len(data) + image.width * image.height * BYTES_PER_PIXEL[image.format]
    if image.format in ("JPEG", "MPO"):
        needed += _coefficients(image, data, *size)
    if image.format == "TIFF" and image.info.get("compression") != "raw":
        needed += _strip(image) * STRIP_COPIES
    require(needed, _pixels(image, size))


def check_copy(image: Image.Image, data: bytes, copied: int) -> None:
    """Refuses a decoded image that would take too much memory together with a copy of it.

    Args:
      image: a decoded image.
      data: the bytes of its file, which are in memory too.
      copied: bytes per pixel of the copy.

    Raises:
      Refused: both would take more than the limit.
    """
    each = STORED_BYTES.get(image.mode, 4) + copied
    needed = CONSTANT + len(data) + image.width * image.height * each
    require(needed, _pixels(image, image.size))


def _pixels(image: Image.Image, size: tuple[int, int]) -> str:
    return f"its {size[0]:,} x {size[1]:,} pixels ({image.format}, {image.mode})"


def _coefficients(image: Image.Image, data: bytes, width: int, height: int) -> int:
    """Bytes of the coefficients that libjpeg keeps for a JPEG of several scans; else 0.

    libjpeg keeps those of the whole image even when it decodes at a fraction of the size.
    """
    count, end = len(image.layer), image.fp.tell()
    # Pillow has read up to the end of the first scan's header, which lists the scan's channels. If
    # it lists all channels and the JPEG is not progressive, there is only one scan.
    first_scan = data[end - 8 - 2 * count : end]
    together = first_scan.startswith(b"\xff\xda\x00" + bytes((6 + 2 * count, count)))
    if together and "progressive" not in image.info:
        return 0
    factors = [(across, down) for _, across, down, _ in image.layer]
    most = max(across for across, _ in factors) * max(down for _, down in factors)
    samples = sum(across * down for across, down in factors) / most
    return round(width * height * samples) * COEFFICIENT_BYTES


def _strip(image: Image.Image) -> int:
    """Bytes of one strip or tile of a TIFF."""
    tags = image.tag_v2
    rows = min(tags.get(ROWS_PER_STRIP, image.height), image.height)
    pixels = image.width * rows
    if TILE_WIDTH in tags:
        pixels = tags[TILE_WIDTH] * tags.get(TILE_LENGTH, 0)
    return pixels * sum(tags.get(BITS_PER_SAMPLE, (1,))) // 8
