"""Limits for photos: no FIFOs, no devices, no files or pictures that fill the memory."""

import contextlib
import io
import json
import os
import pathlib
import re
import signal
import struct
import subprocess
import sys
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from input_pipeline import images, photo_limits
from input_pipeline.preprocessing import Preprocessing
from tests.conftest import REPOSITORY

# Megabytes that a photo may take in these tests; the default is ten times as high.
MB = 48


@contextlib.contextmanager
def within(seconds: int):
    """Raises TimeoutError if the `with` block takes too long."""

    def stop(*_):
        raise TimeoutError(f"takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def odd_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """A FIFO, a link to it, and a link to a device that never ends, with names of photos."""
    fifo, link, device = (folder / name for name in ("fifo.jpg", "link.jpg", "device.jpg"))
    os.mkfifo(fifo)
    link.symlink_to(fifo)
    device.symlink_to("/dev/zero")
    return [fifo, link, device]


def png(width: int, height: int, colour_type: int = 6) -> bytes:
    """A transparent PNG, packed row by row, which takes little memory at any size."""
    channels = {0: 1, 2: 3, 6: 4}[colour_type]
    packer = zlib.compressobj(1)
    row = bytes(1 + channels * width)
    packed = [packer.compress(row) for _ in range(height)] + [packer.flush()]

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", b"".join(packed)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def encoded(image: Image.Image, format: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def in_three_scans(side: int) -> bytes:
    """A baseline JPEG with one scan per channel, which Pillow can't write."""
    gray = encoded(Image.linear_gradient("L").resize((side, side)), "JPEG")
    frame = gray.index(b"\xff\xc0")
    scan = gray.index(b"\xff\xda")
    size, tables = gray[frame + 5 : frame + 9], gray[frame + 13 : scan]
    channels = b"".join(bytes((number, 0x11, 0)) for number in (1, 2, 3))
    start = b"\xff\xc0" + struct.pack(">H", 17) + b"\x08" + size + b"\x03" + channels
    coded = gray[scan + 10 : -2]
    scans = [b"\xff\xda\x00\x08\x01" + bytes((n, 0)) + b"\x00\x3f\x00" + coded for n in (1, 2, 3)]
    return gray[:frame] + start + tables + b"".join(scans) + b"\xff\xd9"


def test_only_regular_files_are_read(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"content")
    assert photo_limits.read(tmp_path / "photo.jpg") == b"content"
    for file in odd_files(tmp_path):
        with within(5), pytest.raises(photo_limits.Refused, match="is not a regular file") as error:
            photo_limits.read(file)
        assert str(file) in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"none\.jpg"):
        photo_limits.read(tmp_path / "none.jpg")
    with pytest.raises(IsADirectoryError, match=re.escape(str(tmp_path))):
        photo_limits.read(tmp_path)


def test_a_file_above_the_limit_is_not_read(tmp_path, monkeypatch):
    with open(tmp_path / "sparse.jpg", "wb") as file:
        file.truncate(3_000_000_000)
    message = r"sparse.jpg: the file would take 3,000 MB in memory, .* at most 500 MB "
    with pytest.raises(photo_limits.Refused, match=message + r"\(set XLIR_PHOTO_MB"):
        photo_limits.read(tmp_path / "sparse.jpg")
    (tmp_path / "small.jpg").write_bytes(bytes(2_000_001))
    for megabytes, refused in (("2", True), ("3", False)):
        monkeypatch.setenv("XLIR_PHOTO_MB", megabytes)
        with pytest.raises(photo_limits.Refused) if refused else contextlib.nullcontext():
            assert len(photo_limits.read(tmp_path / "small.jpg")) == 2_000_001


@pytest.mark.parametrize("value", ["0", "-5", "x", "1.5", "1e3", "½", "٣"])
def test_a_limit_that_is_no_number_is_one_line(monkeypatch, value):
    monkeypatch.setenv("XLIR_PHOTO_MB", value)
    message = f"XLIR_PHOTO_MB is '{value}'; it takes megabytes, a whole number above 0"
    with pytest.raises(ValueError, match=re.escape(message)):
        photo_limits.limit()
    monkeypatch.setenv("XLIR_PHOTO_MB", "")
    assert photo_limits.limit() == 500_000_000


@pytest.mark.parametrize(("packing", "most"), [("ZIP_DEFLATED", 5e6), ("ZIP_LZMA", 8e7)])
def test_a_member_that_unpacks_to_more_than_it_says(tmp_path, packing, most):
    content = np.random.default_rng(0).bytes(1000)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", getattr(zipfile, packing)) as archive:
        archive.writestr("bomb.jpg", bytes(100_000_000))
        archive.writestr("good.jpg", content)
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        bomb, good = archive.infolist()
        assert photo_limits.unpack(archive, good) == content
        bomb.file_size = 1000
        tracemalloc.start()
        with pytest.raises(zipfile.BadZipFile):
            photo_limits.unpack(archive, bomb)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < most


# Decodes each file in a new process, and prints by how much its memory grew at most.
MEASURE = """
import json, os, sys
from input_pipeline import images
from input_pipeline.preprocessing import Preprocessing
from PIL import Image
Image.init()
def resident(field):
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith(field))
    return int(line.split()[1]) * 1024
for name in sys.argv[1:]:
    read, write = os.pipe()
    if not os.fork():
        with open(name, "rb") as file:
            start, reason = resident("VmRSS"), ""
            try:
                images.decode(file.read(), Preprocessing(64))
            except images.ImageError as error:
                reason = str(error)
        os.write(write, json.dumps([resident("VmHWM") - start, reason]).encode())
        os._exit(0)
    os.wait()
    print(os.read(read, 1 << 16).decode())
"""


def measured(folder: pathlib.Path, files: dict[str, bytes], **environment: str) -> dict:
    """Name -> peak memory of decoding in bytes, and why the file was refused."""
    if not pathlib.Path("/proc/self/status").exists():
        pytest.skip("the peak of memory is read from /proc")
    for name, data in files.items():
        (folder / name).write_bytes(data)
    process = subprocess.run(
        [sys.executable, "-c", MEASURE, *(str(folder / name) for name in files)],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    return dict(zip(files, map(json.loads, process.stdout.splitlines()), strict=True))


def picture(mode: str, side: int) -> Image.Image:
    gradient = Image.linear_gradient("L").resize((side, side))
    if mode == "RGBA":
        return Image.merge("RGBA", [gradient] * 4)
    return Image.new("I;16", (side, side), 3000) if mode == "I;16" else gradient.convert(mode)


TURNED = Image.Exif()
TURNED[0x0112] = 6
# Name -> mode, format, options, and the estimated bytes per pixel.
PICTURES = {
    "RGBA PNG": ("RGBA", "PNG", {}, 8),
    "RGB PNG": ("RGB", "PNG", {}, 5),
    "RGB PNG, turned": ("RGB", "PNG", {"exif": TURNED}, 8),
    "palette PNG with transparency": ("P", "PNG", {"transparency": 3}, 5),
    "gray PNG": ("L", "PNG", {}, 5),
    "16 bit PNG": ("I;16", "PNG", {}, 6),
    "progressive JPEG": ("RGB", "JPEG", {"progressive": True, "subsampling": 0}, 6.1),
    "progressive JPEG 4:2:0": ("RGB", "JPEG", {"progressive": True}, 3.1),
    "animated GIF": ("P", "GIF", {"save_all": True}, 6),
    "BMP": ("RGB", "BMP", {}, 8),
    "TIFF": ("RGB", "TIFF", {}, 8),
    "packed TIFF": ("RGBA", "TIFF", {"compression": "tiff_lzw"}, 8),
    "WebP": ("RGB", "WEBP", {"method": 0}, 18),
    "transparent WebP": ("RGBA", "WEBP", {"method": 0}, 18),
    "lossless WebP": ("RGBA", "WEBP", {"lossless": True, "quality": 0, "method": 0}, 19),
    "JPEG 2000": ("RGB", "JPEG2000", {}, 28),
    "AVIF": ("RGB", "AVIF", {"speed": 10}, 12),
}


def side_of(share: float, each: float) -> int:
    """The side of a square picture that takes a share of the limit."""
    return int((share * MB * 1e6 / each) ** 0.5)


def test_the_largest_picture_of_each_kind_keeps_to_the_limit(tmp_path):
    """Pictures below the limit are decoded, others refused. Memory always stays below it."""
    files = {}
    for name, (mode, format, options, each) in PICTURES.items():
        for what, share in (("below", 0.75), ("above", 1.1)):
            image = picture(mode, side_of(share, each))
            if "save_all" in options:
                options = options | {"append_images": [image.rotate(90), image]}
            files[f"{name}, {what}"] = encoded(image, format, **options)
    files["three scans, below"] = in_three_scans(side_of(0.75, 6.1))
    files["three scans, above"] = in_three_scans(side_of(1.1, 6.1))
    for name, (peak, reason) in measured(tmp_path, files, XLIR_PHOTO_MB=str(MB)).items():
        print(f"{name:<45} {peak / 1e6:6.1f} MB  {reason}")
        assert peak < MB * 1e6, name
        if name.endswith("below"):
            assert reason == "", name
        else:
            assert f"but a photo may take at most {MB} MB (set XLIR_PHOTO_MB" in reason, name


def test_by_default_a_photo_keeps_under_500_megabytes(tmp_path):
    """The picture of 0.7 MB that took 2.5 GB is refused; a photo of 100 megapixels is not."""
    large = Image.new("RGB", (12_000, 8_400), "red")
    narrow = encoded(Image.linear_gradient("L").resize((1, 1_000_000)), "PNG")
    files = {
        "bomb": png(13_300, 13_300),
        "photo": encoded(large, "JPEG"),
        "progressive photo": encoded(large, "JPEG", progressive=True),
        "scan": png(7_600, 7_600),
        "narrow": narrow,
    }
    assert len(files["bomb"]) < 4_000_000
    found = measured(tmp_path, files, XLIR_PHOTO_MB="")
    for name, (peak, reason) in found.items():
        print(f"{name:<20} {peak / 1e6:6.1f} MB  {reason}")
        assert peak < 500e6, name
        assert bool(reason) == (name == "bomb"), name
    reason = found["bomb"][1]
    assert "its 13,300 x 13,300 pixels (PNG, RGBA) would take 8" in reason
    assert found["bomb"][0] < 30e6, "it was decoded"
    assert found["photo"][0] < 100e6, "it was not decoded at an eighth of its size"


def test_formats_whose_header_tells_nothing_are_refused():
    """An icon may hold a picture of any size; EPS is drawn by another program."""
    icon = encoded(Image.new("RGBA", (16, 16)), "ICO")
    eps = encoded(Image.new("RGB", (16, 16)), "EPS")
    for data in (icon, eps):
        with pytest.raises(images.ImageError, match="none of the formats BMP, DIB, GIF, JPEG"):
            images.decode(data, Preprocessing(32))


def test_several_photos_in_one_file_are_read_as_the_first():
    first, second = (Image.new("RGB", (32, 32), colour) for colour in ("red", "blue"))
    data = encoded(first, "MPO", save_all=True, append_images=[second])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert np.abs(images.decode(data, Preprocessing(8)) - (254.0, 0, 0)).max() <= 2
