"""What an index keeps of a photo: its size, its time, a thumbnail, and its path for filters."""

import calendar
import io
import random
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from input_pipeline import images
from tests.search.test_photos import encoded, found_in, with_exif, write_zip
from xlir.search import photos

ZONES = ["UTC", "Asia/Seoul", "America/St_Johns", "Pacific/Kiritimati"]


@pytest.fixture(params=ZONES)
def zone(request, monkeypatch):
    """A time zone, for this process."""
    monkeypatch.setenv("TZ", request.param)
    time.tzset()
    yield request.param
    monkeypatch.undo()
    time.tzset()


def seconds(*fields: int) -> int:
    return calendar.timegm((*fields, 0, 0, 0)[:6])


def test_the_time_is_the_cameras_in_any_time_zone(zone):
    data = encoded(Image.new("RGB", (30, 20)), exif=with_exif("2023:06:15 23:59:58"))
    assert photos.describe(data, 0).taken == seconds(2023, 6, 15, 23, 59, 58)


def test_without_exif_the_time_is_the_files_in_local_time(zone):
    modified = calendar.timegm((2024, 2, 29, 12, 34, 56))
    offset = {
        "UTC": 0,
        "Asia/Seoul": 9 * 3600,
        "America/St_Johns": -(3 * 3600 + 1800),
        "Pacific/Kiritimati": 14 * 3600,
    }[zone]
    data = encoded(Image.new("RGB", (30, 20)))
    described = photos.describe(data, modified * 1_000_000_000 + 999_999_999)
    assert described.taken == modified + offset


def test_without_exif_the_time_of_a_zip_member_is_what_the_zip_says(tmp_path, zone):
    write_zip(tmp_path / "x.zip", {"1.jpg": encoded(Image.new("RGB", (30, 20)))})
    (photo,), _ = found_in(tmp_path)
    described = photos.describe(photo.read(), photo.modified)
    assert described.taken == seconds(2023, 6, 15, 12, 30, 40)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2023:06:15 01:02:03", (2023, 6, 15, 1, 2, 3)),
        ("2023:06:15 01:02:03\0", (2023, 6, 15, 1, 2, 3)),
        ("2023:06:15 01:02:03.25", (2023, 6, 15, 1, 2, 3)),
        (" 2023:06:15 01:02:03 ", (2023, 6, 15, 1, 2, 3)),
        ("1899:12:31 00:00:00", (1899, 12, 31)),
        ("9999:12:31 23:59:59", (9999, 12, 31, 23, 59, 59)),
        ("0000:00:00 00:00:00", None),
        ("    :  :     :  :  ", None),
        ("2023:13:01 00:00:00", None),
        ("2023:02:30 00:00:00", None),
        ("yesterday", None),
        ("", None),
    ],
)
def test_dates_of_cameras(text, expected):
    data = encoded(Image.new("RGB", (30, 20)), exif=with_exif(text))
    taken = images.facts(data)[2]
    assert taken == (None if expected is None else seconds(*expected))


@pytest.mark.parametrize("orientation", [None, *range(1, 9), 0, 9, 65535])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "MPO"])
def test_size_date_and_thumbnail_are_as_pillow_reads_them(format, orientation):
    """Size, date and thumbnail equal those that Pillow reads from a photo, turned upright."""
    generator = np.random.default_rng(0)
    picture = generator.integers(0, 255, (4, 6, 3), np.uint8).repeat(160, 0).repeat(160, 1)
    exif = with_exif("2021:03:04 05:06:07", orientation)
    try:
        data = encoded(Image.fromarray(picture), format, exif=exif)
    except (OSError, KeyError):
        pytest.skip(f"this Pillow does not write {format}")
    opened = Image.open(io.BytesIO(data))
    opened.load()
    upright = ImageOps.exif_transpose(opened).convert("RGB")
    described = photos.describe(data, 0)
    assert (described.width, described.height) == upright.size
    assert upright.size == ((640, 960) if orientation in (5, 6, 7, 8) else (960, 640))
    text = Image.open(io.BytesIO(data)).getexif().get_ifd(ExifTags.IFD.Exif)
    text = text[ExifTags.Base.DateTimeOriginal]
    assert described.taken == calendar.timegm(time.strptime(text, "%Y:%m:%d %H:%M:%S"))

    thumbnail = Image.open(io.BytesIO(described.thumbnail))
    assert thumbnail.format == "JPEG"
    assert max(thumbnail.size) == photos.THUMBNAIL
    assert ExifTags.Base.Orientation not in thumbnail.getexif()
    upright.thumbnail((photos.THUMBNAIL, photos.THUMBNAIL))
    assert thumbnail.size == upright.size
    difference = np.asarray(thumbnail, np.float32) - np.asarray(upright, np.float32)
    assert np.abs(difference).mean() < 12  # another orientation would differ by 60 or more


@pytest.mark.parametrize("place", ["before the pixels", "after the pixels"])
def test_exif_of_a_png_anywhere_in_it(place):
    data = encoded(Image.new("RGB", (30, 20)), "PNG")
    content = with_exif("2021:03:04 05:06:07", 6).removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(content)) + b"eXIf" + content
    chunk += struct.pack(">I", zlib.crc32(b"eXIf" + content))
    at = data.index(b"IDAT" if place.startswith("before") else b"IEND") - 4
    described = photos.describe(data[:at] + chunk + data[at:], 0)
    assert described.taken == seconds(2021, 3, 4, 5, 6, 7)
    assert (described.width, described.height) == (20, 30)
    assert Image.open(io.BytesIO(described.thumbnail)).size == (20, 30)


def test_a_png_without_exif_is_not_decoded_for_its_facts(monkeypatch):
    data = encoded(Image.new("RGB", (30, 20)), "PNG")

    def load(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr(Image.Image, "load", load)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    assert images.facts(data) == (30, 20, None)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_exif_leaves_a_photo_of_use():
    """Size and thumbnail stay right; the time is the date in the EXIF data or the file's time."""
    generator = random.Random(5)
    exif = with_exif("2021:03:04 05:06:07", 1)
    whole = encoded(Image.linear_gradient("L"), exif=exif)
    start, dates = whole.index(exif), set()
    # The EXIF data is cut short, but its segment states a valid length.
    for length in range(0, len(exif), 3):
        data = encoded(Image.linear_gradient("L"), exif=exif[:length])
        described = photos.describe(data, 7_000_000_000)
        assert (described.width, described.height) == (256, 256)
        dates.add(described.taken)
    for _ in range(150):
        changed = bytearray(whole)
        for _ in range(generator.choice((1, 3, 30))):
            changed[start + generator.randrange(6, len(exif))] = generator.randrange(256)
        described = photos.describe(bytes(changed), 7_000_000_000)
        assert (described.width, described.height) == (256, 256)
        assert -(2**62) < described.taken < 2**62
        assert Image.open(io.BytesIO(described.thumbnail)).size == (256, 256)
        dates.add(described.taken)
    local = calendar.timegm(time.localtime(7))
    assert {local, seconds(2021, 3, 4, 5, 6, 7)} <= dates


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (320, 320), (321, 320), (2000, 3), (3, 2000)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "1", "I;16"])
def test_thumbnails_of_any_size_and_mode(size, mode):
    data = encoded(Image.new(mode, size), "PNG")
    described = photos.describe(data, 0)
    assert (described.width, described.height) == size
    thumbnail = Image.open(io.BytesIO(described.thumbnail))
    thumbnail.load()
    assert max(thumbnail.size) == min(max(size), photos.THUMBNAIL)
    assert min(thumbnail.size) >= 1


def test_thumbnails_of_noise_are_small_enough_for_every_store():
    noise = np.random.default_rng(0).integers(256, size=(320, 320, 3), dtype=np.uint8)
    described = photos.describe(encoded(Image.fromarray(noise), "PNG"), 0)
    assert 10_000 < len(described.thumbnail) <= photos.THUMBNAIL_BYTES


@pytest.mark.parametrize("data", [b"", b"no photo", b"\xff\xd8\xff\xe0", b"GIF89a"])
def test_what_is_no_photo_is_an_image_error(data):
    with pytest.raises(images.ImageError):
        photos.describe(data, 0)
    with pytest.raises(images.ImageError):
        images.facts(data)


# How paths are kept for filters


@pytest.mark.parametrize(
    ("path", "folder", "name"),
    [
        ("/a/B/C.JPG", "/a/b/", "c.jpg"),
        ("/C.JPG", "/", "c.jpg"),
        ("/Ärger/STRASSE/x.zip/ß.jpg", "/ärger/strasse/x.zip/", "ss.jpg"),
        ("/A\N{COMBINING DIAERESIS}rger/1.jpg", "/ärger/", "1.jpg"),
        ("/x/ΐ.jpg", "/x/", "ΐ.jpg"),
        ("/x/Ι\N{COMBINING DIAERESIS}\N{COMBINING ACUTE ACCENT}.jpg", "/x/", "ΐ.jpg"),
    ],
)
def test_folder_and_name_are_folded(path, folder, name):
    assert photos.folder_of(path) == folder
    assert photos.name_of(path) == name


def test_identifiers():
    assert photos.identifier("/a.jpg") == photos.identifier("/a.jpg")
    assert photos.identifier("/a.jpg") != photos.identifier("/A.jpg")
    assert len(photos.identifier("/ä.jpg")) == 20
    assert set(photos.identifier("/ä.jpg")) <= set("0123456789abcdef")
