"""The photos for an index: finding them, leaving some out, and reading them."""

import contextlib
import io
import os
import pathlib
import random
import signal
import struct
import sys
import tarfile
import tempfile
import unicodedata
import zipfile

import pytest
from PIL import ExifTags, Image

from input_pipeline import photo_limits
from xlir.search import photos

TAR_MODES = {"x.tar": "w", "x.tar.gz": "w:gz", "x.tgz": "w:gz", "x.tar.bz2": "w:bz2"}
TAR_MODES["x.tar.xz"] = "w:xz"


@pytest.fixture(autouse=True)
def never_waits():
    """Ends a test that blocks, for example on a FIFO or on a tar archive that goes in circles."""

    def stop(*_):
        pytest.fail("takes more than 5 s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(5)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """An empty folder whose path has no links in it."""
    made = pathlib.Path(os.path.realpath(tmp_path)) / "photos"
    made.mkdir()
    return made


def write(folder: pathlib.Path, *names: str) -> None:
    """Files whose content is their name."""
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(name.encode())


def write_zip(file: pathlib.Path, contents: dict[str, bytes], packed=zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in contents.items():
            member = zipfile.ZipInfo(name, (2023, 6, 15, 12, 30, 40))
            archive.writestr(member, content, packed)


def write_tar(file: pathlib.Path, contents: dict[str, bytes], mode: str = "w", **fields) -> None:
    with tarfile.open(file, mode, format=tarfile.PAX_FORMAT) as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for key, value in fields.items():
                setattr(member, key, value)
            archive.addfile(member, io.BytesIO(content))


def write_archive(file: pathlib.Path, contents: dict[str, bytes]) -> None:
    if file.suffix == ".zip":
        write_zip(file, contents)
    else:
        write_tar(file, contents, TAR_MODES["x" + "".join(file.suffixes)])


def found_in(*places, exclude=()) -> tuple[list[photos.Photo], list[str]]:
    """The photos, and the reasons for what was skipped, each of which must be one plain line."""
    reasons: list[str] = []
    found = [photos.loaded(photo) for photo in photos.find(places, exclude, reasons.append)]
    for reason in reasons:
        assert reason.isprintable(), reason
        assert 10 < len(reason) < 400, reason
    return found, reasons


def names_in(folder: pathlib.Path, *places, exclude=()) -> list[str]:
    """The paths that are found, relative to `folder`; nothing may be skipped."""
    found, reasons = found_in(*(places or [folder]), exclude=exclude)
    assert reasons == []
    assert len({photo.id for photo in found}) == len(found)
    return [photo.path.removeprefix(f"{folder}/") for photo in found]


def encoded(image: Image.Image, format: str = "JPEG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def with_exif(taken: object = None, orientation: int | None = None) -> bytes:
    exif = Image.Exif()
    if orientation is not None:
        exif[ExifTags.Base.Orientation] = orientation
    if taken is not None:
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] = taken
    return exif.tobytes()  # given an `Exif`, Pillow drops the dates from TIFF and AVIF


# Where photos are found


def test_photos_of_a_folder_at_any_depth_in_order(folder):
    write(folder, "b.JPG", "a/2.png", "a/10.webp", "a/deep/er/x.Jpeg", ".hidden/y.tiff", "c.avif")
    write(folder, "notes.txt", "jpg", "a.jpg.part", "a/readme", ".jpg")
    assert names_in(folder) == [
        ".hidden/y.tiff",
        "a/10.webp",
        "a/2.png",
        "a/deep/er/x.Jpeg",
        "b.JPG",
        "c.avif",
    ]


def test_size_and_time_of_a_file_are_its_own(folder):
    write(folder, "a.jpg")
    os.utime(folder / "a.jpg", ns=(0, 1_700_000_000_123_456_789))
    (photo,), _ = found_in(folder)
    assert (photo.path, photo.size) == (str(folder / "a.jpg"), 5)
    assert photo.modified == 1_700_000_000_123_456_789
    assert photo.read() == b"a.jpg"


def test_a_named_file_is_a_photo_whatever_its_extension(folder):
    write(folder, "a.dat", "b", "c.jpg")
    assert names_in(folder, folder / "b", folder / "a.dat") == ["b", "a.dat"]


@pytest.mark.parametrize("name", ["x.backup", "x", "x.cbz"])
@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_a_named_archive_is_read_whatever_its_extension(folder, name, kind):
    write_archive(folder / f"x.{kind}", {"in/1.jpg": b"1"})
    (folder / f"x.{kind}").rename(folder / name)
    assert names_in(folder, folder / name) == [f"{name}/in/1.jpg"]
    assert names_in(folder) == []  # the place is its folder, not the archive


@pytest.mark.parametrize("name", ["x.zip", *TAR_MODES, "X.ZIP", "X.TAR.GZ"])
def test_photos_of_archives_in_folders_and_named(folder, name):
    contents = {"1.jpg": b"one", "in/2.PNG": b"two", "./in/../3.gif": b"three", "4.txt": b"four"}
    contents["..five.jpg"] = contents["...six/7.jpg"] = b"more"
    (folder / "sub").mkdir()
    write_archive(folder / name.lower(), contents)
    (folder / name.lower()).rename(folder / "sub" / name)
    expected = ["1.jpg", "in/2.PNG", "3.gif", "..five.jpg", "...six/7.jpg"]
    expected = [f"sub/{name}/{inside}" for inside in expected]
    assert names_in(folder) == expected
    assert names_in(folder, folder / "sub" / name) == expected
    assert names_in(folder, folder / "s*" / "*") == expected
    found, _ = found_in(folder)
    assert [photo.read() for photo in found] == [b"one", b"two", b"three", b"more", b"more"]
    assert [photo.size for photo in found] == [3, 3, 5, 4, 4]


def test_a_folder_may_be_named_like_an_archive_or_a_photo(folder):
    write(folder, "x.zip/1.jpg", "y.jpg/2.jpg", "z.tar.gz/3.jpg")
    assert names_in(folder) == ["x.zip/1.jpg", "y.jpg/2.jpg", "z.tar.gz/3.jpg"]


def test_each_photo_once_when_places_overlap(folder, monkeypatch):
    write(folder, "a.jpg", "sub/b.jpg")
    write_zip(folder / "sub/z.zip", {"c.jpg": b"c", "./c.jpg": b"again", "d/../c.jpg": b"again"})
    (folder / "link").symlink_to(folder / "sub")
    monkeypatch.chdir(folder)
    places = [
        "sub/b.jpg",
        folder / "sub",
        "sub/../sub/",
        folder,
        "link",
        "*",
        "**/*.jpg",
        "link/z.zip",
    ]
    assert names_in(folder, *places) == ["sub/b.jpg", "sub/z.zip/c.jpg", "a.jpg"]


def test_files_that_macos_adds_are_no_photos(folder):
    write(folder, "1.jpg", "._1.jpg")
    write_zip(folder / "x.zip", {"2.jpg": b"2", "__MACOSX/._2.jpg": b"attributes"})
    assert names_in(folder) == ["1.jpg", "x.zip/2.jpg"]
    # A file that is itself a place is taken.
    assert names_in(folder, folder / "._1.jpg") == ["._1.jpg"]


def test_patterns(folder):
    write(folder, "2022/raw/a.jpg", "2023/raw/b.jpg", "2023/done/c.jpg", "2023/raw/x/d.png")
    assert names_in(folder, folder / "*/raw") == [
        "2022/raw/a.jpg",
        "2023/raw/b.jpg",
        "2023/raw/x/d.png",
    ]
    assert names_in(folder, folder / "202[3]/*/?.jpg") == ["2023/done/c.jpg", "2023/raw/b.jpg"]
    assert names_in(folder, folder / "**/?.png") == ["2023/raw/x/d.png"]
    assert names_in(folder, f"{folder}/**/raw/") == names_in(folder, folder / "*/raw")


def test_a_name_with_characters_of_patterns_is_that_file(folder):
    write(folder, "a[1].jpg", "a1.jpg", "b?.jpg")
    assert names_in(folder, folder / "a[1].jpg") == ["a[1].jpg"]
    assert names_in(folder, folder / "b?.jpg") == ["b?.jpg"]


@pytest.mark.parametrize("place", ["none", "none/*.jpg", "**/none", "", "a.jpg/b.jpg", "dangling"])
def test_a_missing_place_is_an_error_that_names_it(folder, monkeypatch, place):
    write(folder, "a.jpg")
    (folder / "dangling").symlink_to(folder / "nowhere.jpg")
    monkeypatch.chdir(folder)
    with pytest.raises(FileNotFoundError) as error:
        found_in(folder, place)
    assert str(error.value) == f"there is no file or folder {place}"


# What is left out


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        ("*.png", ["a[1].jpg", "a1.jpg", "private/2.jpg", "sub/private/deep/3.jpg"]),
        ("private", ["a[1].jpg", "a1.jpg", "1.png"]),
        ("private/", ["a[1].jpg", "a1.jpg", "1.png"]),
        (
            "private/*.png",
            ["a[1].jpg", "a1.jpg", "1.png", "private/2.jpg", "sub/private/deep/3.jpg"],
        ),
        ("sub/private", ["a[1].jpg", "a1.jpg", "1.png", "private/2.jpg", "private/4.png"]),
        ("sub/*/deep", ["a[1].jpg", "a1.jpg", "1.png", "private/2.jpg", "private/4.png"]),
        (
            "a[1].jpg",
            ["a1.jpg", "1.png", "private/2.jpg", "private/4.png", "sub/private/deep/3.jpg"],
        ),
        ("?.jpg", ["a[1].jpg", "a1.jpg", "1.png", "private/4.png"]),
        ("*", []),
        ("*.PNG", None),
        ("riv", None),
        ("", None),
        ("*/*/*/*/*/*/*/*/*/*/*/*/*/*/*/*/*/*/*/*/*", None),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "zip", "tar.gz"])
def test_excluded_names_folders_and_parts_of_paths(folder, pattern, left, kind):
    names = ["a[1].jpg", "a1.jpg", "1.png", "private/2.jpg", "private/4.png"]
    names += ["sub/private/deep/3.jpg"]
    if kind == "folder":
        write(folder, *names)
    else:
        write_archive(folder / f"x.{kind}", {name: b"" for name in names})
    place = folder if kind == "folder" else folder / f"x.{kind}"
    found = names_in(place, exclude=[pattern]) if kind == "folder" or pattern != "*" else []
    assert sorted(found) == sorted(names if left is None else left)


def test_excluded_archives_and_named_files(folder):
    write(folder, "a.jpg", "b.jpg")
    write_zip(folder / "x.zip", {"c.jpg": b""})
    assert names_in(folder, exclude=["*.zip"]) == ["a.jpg", "b.jpg"]
    everything = [folder / "a.jpg", folder / "x.zip", folder / "b.jpg"]
    assert names_in(folder, *everything, exclude=["x.zip", "a.*"]) == ["b.jpg"]
    # `exclude` does not apply to the name of a folder that is itself a place.
    assert names_in(folder, folder, exclude=["photos"]) == ["a.jpg", "b.jpg", "x.zip/c.jpg"]


def test_excluded_names_may_have_accents_in_either_unicode_form(folder):
    composed, separate = (unicodedata.normalize(form, "Ärger") for form in ("NFC", "NFD"))
    write(folder, f"1/{composed}/1.jpg", f"2/{separate}/2.jpg", "3.jpg")
    for name in (composed, separate):
        assert names_in(folder, exclude=[name]) == ["3.jpg"]


def test_links_inside_are_not_followed_but_named_ones_are(folder, tmp_path):
    outside = pathlib.Path(os.path.realpath(tmp_path)) / "outside"
    write(outside, "1.jpg", "deep/2.jpg")
    write_zip(outside / "z.zip", {"3.jpg": b"3"})
    for target in ("1.jpg", "deep", "z.zip"):
        (folder / target).symlink_to(outside / target)
    (folder / "up").symlink_to(folder)
    write(folder, "own.jpg")
    assert names_in(folder) == ["own.jpg"]
    named = [folder / "1.jpg", folder / "deep", folder / "z.zip"]
    assert names_in(outside, *named) == ["1.jpg", "deep/2.jpg", "z.zip/3.jpg"]
    (outside.parent / "link").symlink_to(folder)
    assert names_in(folder, outside.parent / "link") == ["own.jpg"]


def test_patterns_do_not_follow_links_at_any_depth_nor_in_circles(folder, tmp_path):
    write(folder, "a/own.jpg")
    outside = tmp_path / "outside"
    write(outside, "deep/2.jpg")
    (folder / "a/elsewhere").symlink_to(outside)
    for name in ("one", "two", "three"):  # with links followed, 3 ** 40 paths
        (folder / "a" / name).symlink_to(folder)
    assert names_in(folder, folder / "**/*.jpg") == ["a/own.jpg"]


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_links_in_archives_are_not_photos(folder, kind):
    write(folder, "secret.jpg")
    file = folder / f"x.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            link = zipfile.ZipInfo("link.jpg")
            link.external_attr = 0o120777 << 16
            archive.writestr(link, "secret.jpg")
            archive.writestr("own.jpg", "own")
    else:
        with tarfile.open(file, "w") as archive:
            for name, type in (("l.jpg", tarfile.SYMTYPE), ("h.jpg", tarfile.LNKTYPE)):
                link = tarfile.TarInfo(name)
                link.type, link.linkname = type, str(folder / "secret.jpg")
                archive.addfile(link)
            for name, type in (("fifo.jpg", tarfile.FIFOTYPE), ("device.jpg", tarfile.CHRTYPE)):
                special = tarfile.TarInfo(name)
                special.type = type
                archive.addfile(special)
            own = tarfile.TarInfo("own.jpg")
            own.size = 3
            archive.addfile(own, io.BytesIO(b"own"))
    found, reasons = found_in(file)
    assert [(photo.path, photo.read()) for photo in found] == [(f"{file}/own.jpg", b"own")]
    assert reasons == []


# Broken files: each gives one line, and the rest is found


def skipped_in(folder: pathlib.Path, rest: list[str]) -> str:
    """The one reason for which something in a folder is skipped; the rest must be found."""
    found, reasons = found_in(folder)
    assert [photo.path.removeprefix(f"{folder}/") for photo in found] == rest
    (reason,) = reasons
    assert reason.startswith(str(folder)), reason
    return reason.removeprefix(str(folder))


@pytest.mark.parametrize("name", ["m.zip", "m.tar", "m.tar.gz", "m.tgz", "m.tar.bz2", "m.tar.xz"])
@pytest.mark.parametrize("content", [b"", b"no archive", random.Random(0).randbytes(3000)])
def test_broken_archives(folder, name, content):
    write(folder, "a.jpg", "z.jpg")
    (folder / name).write_bytes(content)
    assert skipped_in(folder, ["a.jpg", "z.jpg"]).startswith(f"/{name} can't be read: ")


@pytest.mark.parametrize("name", list(TAR_MODES))
def test_a_cut_tar_archive_gives_what_comes_before(folder, name):
    contents = {f"{number}.jpg": random.Random(number).randbytes(5000) for number in range(9)}
    write_archive(folder / name, contents)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    write(folder, "z.jpg")
    found, reasons = found_in(folder)
    assert found[-1].path == str(folder / "z.jpg")
    assert len(reasons) == 1
    assert reasons[0].startswith(f"{folder / name} can't be read: ")
    good = 0
    for photo in found[:-1]:
        with contextlib.suppress(ValueError):
            assert photo.read() == contents[os.path.basename(photo.path)]
            good += 1
    assert good >= (0 if name.endswith("bz2") else 2)  # bzip2 packs blocks of 900 kB


def test_a_damaged_header_inside_a_tar_archive_is_reported(folder):
    write_tar(folder / "m.tar", {"1.jpg": b"1", "2.jpg": b"2", "3.jpg": b"3"})
    data = bytearray((folder / "m.tar").read_bytes())
    data[1024 + 150] ^= 1  # in the checksum of the second member's header
    (folder / "m.tar").write_bytes(data)
    assert skipped_in(folder, ["m.tar/1.jpg"]).startswith("/m.tar can't be read: it is damaged")


def test_a_tar_archive_without_zeros_at_its_end_is_whole(folder):
    write_tar(folder / "m.tar", {"1.jpg": b"1", "2.jpg": b"2"})
    data = (folder / "m.tar").read_bytes()
    (folder / "m.tar").write_bytes(data[:2048])
    assert names_in(folder) == ["m.tar/1.jpg", "m.tar/2.jpg"]


def header(name: str, size: int, **fields) -> bytes:
    """A header of a tar archive, with a size that may be negative."""
    member = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(member, key, value)
    data = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    data[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data)
    return bytes(data)


@pytest.mark.parametrize("size", [-1, -512, -1024, -(10**6)])
@pytest.mark.parametrize("type", [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.XHDTYPE])
def test_a_tar_archive_that_would_go_in_circles(folder, size, type):
    parts = [header("1.jpg", 0), header("2.jpg", size, type=type), header("3.jpg", 0)]
    (folder / "m.tar").write_bytes(b"".join(parts) + bytes(10240))
    found, reasons = found_in(folder)
    assert found[0].path == f"{folder}/m.tar/1.jpg"
    assert len(found) <= 3
    if type != tarfile.DIRTYPE:  # the size of a folder is ignored
        assert len(reasons) == 1
        assert "m.tar can't be read: it has a " in reasons[0]


@pytest.mark.parametrize("type", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_tar_archive_with_a_huge_header_is_not_read_into_memory(folder, type):
    size = 1 << 36
    (folder / "m.tar").write_bytes(header("1.jpg", 0) + header("x", size, type=type))
    os.truncate(folder / "m.tar", 2 << 36)  # a sparse file, which takes no room on the disk
    reason = skipped_in(folder, ["m.tar/1.jpg"])
    assert reason == "/m.tar can't be read: it has a header of 68,719,476,736 bytes"


@pytest.mark.parametrize("mtime", ["inf", "-inf", "nan", "1e300", "-99999999999999", "12.5"])
def test_any_time_in_a_tar_archive_fits_64_bits(folder, mtime):
    write_tar(folder / "m.tar", {"1.jpg": b"1", "2.jpg": b"2"}, pax_headers={"mtime": mtime})
    found, reasons = found_in(folder)
    assert len(found) == 2
    assert reasons == []
    assert all(-(2**63) <= photo.modified < 2**63 for photo in found)
    if mtime == "12.5":
        assert found[0].modified == 12_500_000_000
    encoded_photo = encoded(Image.new("RGB", (8, 8)))
    assert isinstance(photos.describe(encoded_photo, found[0].modified).taken, int)


def damaged(data: bytes, generator: random.Random) -> bytes:
    """The bytes of a file, of which some are changed, added, or left out."""
    changed = bytearray(data)
    for _ in range(generator.choice((1, 1, 4, 20))):
        place = generator.randrange(len(changed))
        if generator.random() < 0.8:
            changed[place] = generator.choice((0, 255, generator.randrange(256)))
        else:
            changed[place : place + generator.randrange(40)] = generator.randbytes(
                generator.randrange(40)
            )
    return bytes(changed)


@pytest.mark.parametrize("name", ["x.zip", "lzma.zip", "bzip2.zip", *TAR_MODES])
def test_damaged_archives_give_photos_or_a_line(folder, name):
    """Damage raises no other error, and every photo that is read has its stated size."""
    generator = random.Random(name)
    contents = {f"{number}/ä.jpg": generator.randbytes(300) * 3 for number in range(3)}
    method = {"lzma.zip": zipfile.ZIP_LZMA, "bzip2.zip": zipfile.ZIP_BZIP2}.get(name)
    if name.endswith(".zip"):
        write_zip(folder / name, contents, method or zipfile.ZIP_DEFLATED)
    else:
        write_tar(folder / name, contents, TAR_MODES[name])
    whole = (folder / name).read_bytes()
    failures = unread = named = 0
    for _ in range(60):
        (folder / name).write_bytes(damaged(whole, generator))
        found, reasons = found_in(folder)
        failures += len(reasons)
        for photo in found:
            try:
                assert len(photo.read()) <= photo.size
            except ValueError as error:
                unread += 1
                named += str(error).startswith(photo.path)
    assert failures + unread > 15
    assert named == unread


def test_a_damaged_zip_member_that_lzma_has_packed(folder):
    content = bytes(random.Random(1).choices(b"abcd", k=20_000))
    write_zip(folder / "x.zip", {"1.jpg": content, "2.jpg": b"two"}, zipfile.ZIP_LZMA)
    data = bytearray((folder / "x.zip").read_bytes())
    data[1500:1560] = b"\xff" * 60
    (folder / "x.zip").write_bytes(data)
    found, reasons = found_in(folder)
    assert reasons == []
    with pytest.raises(ValueError, match=r"^\S+/x\.zip/1\.jpg: "):
        found[0].read()
    assert found[1].read() == b"two"


def test_a_zip_member_without_a_name(folder):
    write_zip(folder / "x.zip", {"1.jpg": b"one", "": b"", "2.jpg": b"two"})
    assert names_in(folder) == ["x.zip/1.jpg", "x.zip/2.jpg"]


def test_encrypted_members_and_unknown_methods_of_zip(folder):
    write_zip(folder / "m.zip", {"1.jpg": b"one", "2.jpg": b"two", "3.jpg": b"three"})
    data = bytearray((folder / "m.zip").read_bytes())
    central = [place for place in range(len(data)) if data[place : place + 4] == b"PK\1\2"]
    local = [place for place in range(len(data)) if data[place : place + 4] == b"PK\3\4"]
    for place in (local[0] + 6, central[0] + 8):
        data[place] |= 1  # encrypted
    for place in (local[1] + 8, central[1] + 10):
        data[place] = 97  # a method that Python does not know
    (folder / "m.zip").write_bytes(data)
    found, reasons = found_in(folder)
    assert reasons == []
    with pytest.raises(ValueError, match=r"^\S+m\.zip/1\.jpg: .*encrypted"):
        found[0].read()
    with pytest.raises(ValueError, match=r"^\S+m\.zip/2\.jpg: .*compression method"):
        found[1].read()
    assert found[2].read() == b"three"


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz"])
def test_members_over_the_limit_are_not_read(folder, monkeypatch, name):
    monkeypatch.setenv(photo_limits.VARIABLE, "1")
    contents = {"1.jpg": b"one", "2.jpg": bytes(1_000_001), "3.jpg": bytes(1_000_000)}
    write_archive(folder / name, contents)
    found, reasons = found_in(folder)
    assert reasons == []
    with pytest.raises(ValueError, match=r"^\S+/2\.jpg: .* at most 1 MB .*XLIR_PHOTO_MB"):
        found[1].read()
    assert [len(found[place].read()) for place in (0, 2)] == [3, 1_000_000]


def test_a_zip_member_that_states_too_small_a_size_gives_no_more_than_that(folder):
    with zipfile.ZipFile(folder / "m.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.jpg", bytes(10_000_000))
    data = bytearray((folder / "m.zip").read_bytes())
    central = data.rindex(b"PK\1\2")
    data[central + 24 : central + 28] = struct.pack("<I", 1000)
    (folder / "m.zip").write_bytes(data)
    (photo,), _ = found_in(folder)
    assert photo.size == 1000
    with pytest.raises(ValueError, match="CRC"):
        photo.read()


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_members_leading_out_of_the_archive(folder, kind):
    bad = ["../x.jpg", "/abs.jpg", "a/../../x.jpg", "//abs.jpg"]
    contents = {name: b"" for name in bad}
    write_archive(folder / f"m.{kind}", {"1.jpg": b"", **contents, "a/../2.jpg": b""})
    found, reasons = found_in(folder)
    assert [os.path.relpath(photo.path, folder / f"m.{kind}") for photo in found] == [
        "1.jpg",
        "2.jpg",
    ]
    assert len(reasons) == len(bad)
    for name, reason in zip(bad, reasons, strict=True):
        assert os.path.normpath(name) in reason
        assert reason.startswith(f"{folder}/m.{kind}: ")
        assert reason.endswith(" lies outside the archive")


@pytest.mark.skipif(sys.platform == "darwin", reason="file names are UTF-8 on macOS")
def test_names_that_are_not_utf8(folder):
    raw = os.fsencode(folder)
    write(folder, "good.jpg")
    for name in (b"b\xff.jpg", b"f\xff/1.jpg", b"line\nend\xfe.jpg"):
        os.makedirs(os.path.dirname(raw + b"/" + name), exist_ok=True)
        with open(raw + b"/" + name, "wb"):
            pass
    write_zip(folder / "x.zip", {"1.jpg": b""})
    os.rename(folder / "x.zip", raw + b"/z\xff.zip")
    write_tar(folder / "m.tar", {"b\udcff.jpg": b"bad", "ü.jpg": b"good"}, pax_headers={})
    found, reasons = found_in(folder)
    assert [os.path.relpath(photo.path, folder) for photo in found] == ["good.jpg", "m.tar/ü.jpg"]
    assert len(reasons) == 5
    assert all("not valid UTF-8" in reason for reason in reasons)
    shown = " ".join(reasons)
    for name in (r"b\udcff.jpg", r"f\udcff/1.jpg", r"line\nend\udcfe.jpg", r"z\udcff.zip"):
        assert name in shown
    for photo in found:
        assert photos.identifier(photo.path)


@pytest.mark.parametrize("name", ["fifo.jpg", "fifo.zip", "fifo.tar.gz", "fifo"])
def test_fifos(folder, name):
    os.mkfifo(folder / name)
    write(folder, "a.jpg", "z.jpg")
    places = [folder] if name != "fifo" else [folder, folder / name]
    found, reasons = found_in(*places)
    assert [os.path.basename(photo.path) for photo in found] == ["a.jpg", "z.jpg"]
    assert reasons == [f"{folder}/{name} is not a regular file"]


def test_unreadable_folders_files_and_archives():
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(os.path.realpath(name))
        write(folder, "a.jpg", "closed/1.jpg", "listed/2.jpg", "secret.jpg", "z.jpg")
        write_zip(folder / "closed.zip", {"3.jpg": b""})
        modes = {"closed": 0, "listed": 0o444, "secret.jpg": 0, "closed.zip": 0}
        folder.chmod(0o755)
        for path, mode in modes.items():
            (folder / path).chmod(mode)
        if not os.getuid():
            os.seteuid(65534)  # becomes nobody, because root may read everything
        try:
            found, reasons = found_in(folder)
            with pytest.raises(PermissionError):
                found[1].read()
        finally:
            os.seteuid(os.getuid())
            for path in modes:
                (folder / path).chmod(0o755)
    assert [os.path.basename(photo.path) for photo in found] == ["a.jpg", "secret.jpg", "z.jpg"]
    assert reasons == [
        f"{folder}/closed: Permission denied",
        f"{folder}/closed.zip can't be read: Permission denied",
        f"{folder}/listed/2.jpg: Permission denied",
    ]


# Reading in any order


@pytest.mark.parametrize("name", ["x.zip", *TAR_MODES])
def test_loaded_photos_are_read_in_any_order(folder, name):
    generator = random.Random(1)
    contents = {f"{number:02}.jpg": generator.randbytes(10_000) for number in range(20)}
    write_archive(folder / name, contents)
    write(folder, "own.jpg")
    contents["own.jpg"] = b"own.jpg"
    found, _ = found_in(folder)
    generator.shuffle(found)
    assert len(found) == len(contents)
    for photo in found:
        assert photo.read() == contents[os.path.basename(photo.path)]
        assert photo.read() == contents[os.path.basename(photo.path)]


def test_photos_in_files_are_not_read_until_they_are_needed(folder):
    write(folder, "a.jpg")
    (photo,), _ = found_in(folder)
    (folder / "a.jpg").write_bytes(b"later")
    assert photo.read() == b"later"


def test_a_photo_that_changes_has_another_size_or_time(folder):
    moments = []
    for content in (b"one", b"two"):
        write_zip(folder / "x.zip", {"1.jpg": content})
        (photo,), _ = found_in(folder)
        moments.append((photo.size, photo.modified))
    assert moments[0] != moments[1]
