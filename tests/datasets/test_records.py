"""Prepared sets that are damaged, and caches that can't be written: noticed, named, mended."""

import json
import logging
import shutil
import subprocess

import pytest

from input_pipeline.datasets import captions, records
from input_pipeline.datasets.captioned_images import CaptionedImages
from input_pipeline.files import SUMS
from tests.datasets import test_captions
from tests.datasets.test_captions import KILLED, entry, jpeg, read, run, write, write_json

# Fixtures.
cache, folder = test_captions.cache, test_captions.folder
SHARD = "pets-train.array_record-00000-of-00001"
SMALL = ["rows-train.json", "rows-val.json", "dataset_info.json", "features.json", SUMS]


@pytest.fixture
def prepared(folder, cache):
    """A set of two splits, and its folder."""
    write(folder, *(entry(f"{i}.jpg", "train" if i < 4 else "val") for i in range(6)))
    captions.prepare(folder)
    (info,) = cache.glob("datasets/pets/*/*/dataset_info.json")
    return info.parent


def flip(file, place=None):
    data = bytearray(file.read_bytes())
    data[len(data) // 2 if place is None else place] ^= 4
    file.write_bytes(data)


def cut(file):
    file.write_bytes(file.read_bytes()[:-3])


def empty(file):
    file.write_bytes(b"")


def refused(folder) -> str:
    """The one line that reading the photos of a set ends with."""

    def read_all():
        images = read(folder, "train+val")
        return [images.images[row] for row in range(len(images))]

    with pytest.raises(ValueError, match=r"Delete .*: the set is then prepared again") as error:
        read_all()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("spoil", [flip, cut, empty])
def test_a_damaged_file_is_named_with_the_way_out(folder, prepared, name, spoil):
    spoil(prepared / name)
    line = refused(folder)
    assert line.startswith(f"{prepared / name} is damaged") or name == SUMS
    assert line.startswith(str(prepared))
    assert f"Delete {prepared}: the set is then prepared again from its source" in line
    shutil.rmtree(prepared)
    assert read(folder, "train+val").images[5] == jpeg(5)


@pytest.mark.parametrize("name", SMALL[:-1])
def test_a_missing_file_is_named(folder, prepared, name):
    (prepared / name).unlink()
    assert refused(folder).startswith(str(prepared / name))


def test_a_set_without_digests_is_read(folder, prepared):
    """As version 49a03f1 prepared them."""
    (prepared / SUMS).unlink()
    assert read(folder, "train+val").images[5] == jpeg(5)


@pytest.mark.parametrize("name", SMALL[:-1])
@pytest.mark.parametrize("spoil", [cut, empty])
def test_what_is_damaged_is_named_without_digests_too(folder, prepared, name, spoil):
    (prepared / SUMS).unlink()
    spoil(prepared / name)
    line = refused(folder)
    assert str(prepared) in line
    assert name in line
    assert f"Delete {prepared}" in line


def test_rows_of_other_records_are_refused_without_digests_too(folder, prepared):
    (prepared / SUMS).unlink()
    file = prepared / "rows-train.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"rows": content["rows"][:-1]}))
    assert "3 rows for 4 photos" in refused(folder)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: flip(file, 300),
        lambda file: file.write_bytes(bytes(file.stat().st_size)),
        cut,
        empty,
        lambda file: file.unlink(),
    ],
    ids=["flip", "zeros", "cut", "empty", "gone"],
)
def test_a_damaged_shard_is_named_with_the_way_out(folder, prepared, spoil):
    """ArrayRecord notices; it raises errors of 95 lines that are neither ValueError nor OSError."""
    spoil(prepared / SHARD)
    line = refused(folder)
    assert line.startswith(f"{prepared / SHARD} can't be read: ")
    assert line.endswith(f"Delete {prepared}: the set is then prepared again from its source")


def test_the_shard_is_named_that_is_damaged(folder, cache, monkeypatch):
    monkeypatch.setattr(records, "SHARD", 2)
    write(folder, *(entry(f"{i}.jpg") for i in range(5)))
    images = read(folder)
    (shard,) = cache.rglob("*-00001-of-00003")
    empty(shard)
    assert [images.images[row] for row in (0, 1, 4)] == [jpeg(0), jpeg(1), jpeg(4)]
    for row in (2, 3):
        with pytest.raises(ValueError, match="-00001-of-00003 can't be read"):
            images.images[row]


def test_a_whole_shard_of_another_set_is_noticed(folder, prepared, cache):
    write(folder, *(entry(f"{i}.jpg", "train" if i else "val") for i in range(6)))
    captions.prepare(folder)
    (other,) = set(cache.rglob(SHARD)) - {prepared / SHARD}
    shutil.copyfile(prepared / SHARD, other)
    assert "it holds another photo" in refused(folder)


@pytest.mark.parametrize("spoil", [flip, cut, empty], ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize("pattern", ["incomplete.*/*-of-00006", "incomplete.*/*.shard.json"])
def test_a_damaged_shard_is_not_gone_on_with(folder, cache, monkeypatch, caplog, spoil, pattern):
    write(folder, *(entry(f"{i}.jpg") for i in range(6)))
    run(KILLED, folder)
    (damaged,) = (file for file in cache.rglob(pattern) if "train.array_record-00001" in file.name)
    spoil(damaged)
    seen = test_captions.photos_read(monkeypatch)
    monkeypatch.setattr(records, "SHARD", 1)
    images = read(folder)
    assert seen == ["1.jpg", "3.jpg", "4.jpg", "5.jpg"]
    assert [images.images[row] for row in range(6)] == [jpeg(row) for row in range(6)]
    (line,) = (r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)
    assert line.startswith(f"{damaged} is damaged")


def test_a_set_is_read_where_the_cache_cannot_be_written(folder, read_only, monkeypatch):
    place, forbid = read_only
    monkeypatch.setenv("XLIR_CACHE", str(place))
    builder = captions.prepare(write(folder, entry()))
    forbid()
    # What captions.prepare does once it knows the source; that folder is nobody's to read here.
    again = records.prepare("pets", builder.data_path.parent.name, {})
    assert CaptionedImages(again, "train").images[0] == jpeg(0)
    with pytest.raises(PermissionError, match=r"Permission denied.*XLIR_CACHE=DIR") as error:
        records.prepare("pets", "another", {})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("below", ["", "below"])
def test_a_file_in_the_place_of_the_cache_is_refused_in_one_line(folder, monkeypatch, below):
    write(folder, entry())
    place = folder.parent / "file"
    place.touch()
    monkeypatch.setenv("XLIR_CACHE", str(place / below))
    monkeypatch.setattr(records, "_write", None)
    with pytest.raises(OSError, match=r"the cache can't be written at .*XLIR_CACHE=DIR") as error:
        captions.prepare(folder)
    assert str(place / below) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture
def small_disk(tmp_path, monkeypatch):
    """A cache on a disk of 1 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if not shutil.which("mount"):
        pytest.skip("there is no mount(8)")
    words = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    mounted = subprocess.run(words, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"may not mount a small disk: {mounted.stderr.strip()}")
    monkeypatch.setenv("XLIR_CACHE", str(place))
    yield place
    # Lazily, as readers of ArrayRecord stay open until they are collected.
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_set_that_does_not_fit_is_refused_before_any_work(folder, small_disk, monkeypatch):
    write_json(folder, [entry("0.jpg"), entry("1.jpg")])
    for seed in (0, 1):
        (folder / "images" / f"{seed}.jpg").write_bytes(jpeg(seed, size=1000))
    with pytest.raises(OSError, match=r"takes 0\.\d GB in .*, where 0\.0 GB are free") as error:
        captions.prepare(folder)
    assert str(small_disk) in str(error.value)
    # On a disk that another program fills: it is noticed by who writes.
    monkeypatch.setattr(records, "_check_space", lambda folder, size: None)
    with pytest.raises(OSError, match="No space left on device") as error:
        captions.prepare(folder)
    assert "\n" not in str(error.value)
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    images = read(folder)
    assert [images.images[0], images.images[1]] == [jpeg(0, size=1000), jpeg(1, size=1000)]
