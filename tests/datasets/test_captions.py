"""Sets in Karpathy and Li's JSON: photos that are prepared or skipped, and refused files."""

import io
import json
import logging
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from input_pipeline import files
from input_pipeline.datasets import (
    captions,
    photo_files,
    records,
)
from input_pipeline.datasets.captioned_images import CaptionedImages
from tests.test_photo_limits import odd_files, png, within

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent.parent


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> pathlib.Path:
    """An empty cache for each test."""
    monkeypatch.setenv("XLIR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """An empty folder for a set."""
    (tmp_path / "set" / "images").mkdir(parents=True)
    return tmp_path / "set"


def jpeg(seed: int, size: int = 24) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def entry(filename="a.jpg", split="train", texts=("A dog.", "One dog."), **more):
    return {
        "filename": filename,
        "split": split,
        "sentences": [{"raw": text} for text in texts],
        **more,
    }


def write_json(folder, entries, name="dataset_pets.json"):
    (folder / name).write_text(json.dumps({"images": entries}), encoding="utf8")


def write(folder, *entries):
    """Writes the JSON, and a photo for each of its entries."""
    write_json(folder, entries)
    for seed, one in enumerate(entries):
        (folder / "images" / one["filename"]).write_bytes(jpeg(seed))
    return folder


def read(folder, splits="train", **options) -> CaptionedImages:
    return CaptionedImages(captions.prepare(folder), splits, **options)


def warnings(caplog) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("input_pipeline") and record.levelno == logging.WARNING
    ]


def run(script: str, *arguments) -> subprocess.CompletedProcess:
    """Runs a script in a new process."""
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_round_trip_in_order(folder):
    names = ["z.jpg", "a.jpg", "m.jpg"]
    write(
        folder,
        *(
            entry(name, texts=[f"{name} {i}" for i in range(5)], cocoid=900 - i)
            for i, name in enumerate(names)
        ),
    )
    images = read(folder)
    assert images.filenames == names
    assert images.image_ids.tolist() == [900, 899, 898]
    assert images.image_ids.dtype == np.int64
    assert images.captions == [[f"{name} {i}" for i in range(5)] for name in names]
    assert [images.images[row] for row in range(len(images))] == [jpeg(0), jpeg(1), jpeg(2)]
    assert images.excluded == []


def test_order_and_bytes_hold_beyond_one_block(folder, monkeypatch):
    monkeypatch.setattr(records, "AHEAD", 4)
    write(folder, *(entry(f"{i}.jpg", imgid=i) for i in range(11)))
    images = read(folder)
    assert images.filenames == [f"{i}.jpg" for i in range(11)]
    assert [images.images[row] for row in range(11)] == [jpeg(i) for i in range(11)]


def test_ids_are_cocoid_else_imgid_else_the_place(folder):
    write(
        folder,
        entry("a.jpg", cocoid=70, imgid=7),
        entry("b.jpg", imgid=8),
        entry("c.jpg"),
    )
    assert read(folder).image_ids.tolist() == [70, 8, 2]


def test_the_largest_id(folder):
    assert read(write(folder, entry(cocoid=2**63 - 1))).image_ids.tolist() == [2**63 - 1]


def test_white_space_in_captions_is_one_space(folder):
    write(folder, entry(texts=[" A\n dog \t runs. ", "  ", "犬\u3000が"]))
    assert read(folder).captions == [["A dog runs.", "犬 が"]]


def test_splits_and_their_union(folder):
    write(
        folder,
        entry("a.jpg", "train"),
        entry("b.jpg", "restval"),
        entry("c.jpg", "test"),
        entry("d.jpg", "train"),
    )
    images = read(folder, "train+restval")
    assert images.filenames == ["a.jpg", "d.jpg", "b.jpg"]
    assert [images.images[row] for row in range(3)] == [jpeg(0), jpeg(3), jpeg(1)]
    assert read(folder, "test").filenames == ["c.jpg"]


def test_a_split_of_another_name(folder):
    assert read(write(folder, entry(split="test-dev")), "test-dev").filenames == ["a.jpg"]


def test_unknown_split_lists_the_known_ones(folder):
    write(folder, entry("a.jpg", "train"), entry("b.jpg", "val"))
    with pytest.raises(ValueError, match="no split 'dev'; it has train, val"):
        read(folder, "train+dev")


def test_excluded_names_stay_out_and_are_counted(folder):
    write(folder, *(entry(f"{i}.jpg", "train" if i < 3 else "restval") for i in range(5)))
    left_out = {"1.jpg", "4.jpg", "elsewhere.jpg"}
    images = read(folder, "train+restval", exclude=left_out.__contains__)
    assert images.filenames == ["0.jpg", "2.jpg", "3.jpg"]
    assert images.excluded == ["1.jpg", "4.jpg"]
    assert [images.images[row] for row in range(3)] == [jpeg(0), jpeg(2), jpeg(3)]
    assert images.fingerprint != read(folder, "train+restval").fingerprint


def test_missing_photos_are_counted_and_named_in_one_line(folder, caplog):
    write(folder, *(entry(f"{i}.jpg") for i in range(6)))
    for i in (0, 2, 3, 5):
        (folder / "images" / f"{i}.jpg").unlink()
    assert read(folder).filenames == ["1.jpg", "4.jpg"]
    assert warnings(caplog) == [
        "dataset_pets.json: photos missing, skipped: 4 (0.jpg, 2.jpg, 3.jpg, ...)"
    ]


def test_a_dangling_link_or_a_folder_is_a_missing_photo(folder, caplog):
    write(folder, *(entry(f"{i}.jpg") for i in range(3)))
    for i in (0, 1):
        (folder / "images" / f"{i}.jpg").unlink()
    (folder / "images" / "0.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "images" / "1.jpg").mkdir()
    assert read(folder).filenames == ["2.jpg"]
    assert warnings(caplog) == ["dataset_pets.json: photos missing, skipped: 2 (0.jpg, 1.jpg)"]


def test_a_byte_order_mark_before_the_json_does_not_matter(folder):
    write(folder, entry())
    file = folder / "dataset_pets.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert read(folder).filenames == ["a.jpg"]


def test_photos_that_cannot_be_decoded_are_counted_and_named_in_one_line(folder, caplog):
    write(folder, *(entry(f"{i}.jpg") for i in range(5)))
    (folder / "images" / "0.jpg").write_bytes(b"<html>404</html>")
    (folder / "images" / "2.jpg").write_bytes(jpeg(2)[:-200])
    (folder / "images" / "3.jpg").write_bytes(b"")
    images = read(folder)
    assert images.filenames == ["1.jpg", "4.jpg"]
    assert [images.images[0], images.images[1]] == [jpeg(1), jpeg(4)]
    assert warnings(caplog) == ["photos that can't be decoded, skipped: 3 (0.jpg, 2.jpg, 3.jpg)"]


def skipped(caplog) -> list[str]:
    """The log lines about single photos that can't be decoded."""
    return [text for text in caplog.messages if text.startswith("skipped: ")]


def test_what_is_no_regular_file_is_no_photo(folder, caplog):
    names = ["fifo.jpg", "link.jpg", "device.jpg", "good.jpg"]
    write_json(folder, [entry(name) for name in names])
    odd_files(folder / "images")
    (folder / "images" / "good.jpg").write_bytes(jpeg(1))
    with within(20):
        assert read(folder).filenames == ["good.jpg"]
    (line,) = warnings(caplog)
    assert line == "dataset_pets.json: photos missing, skipped: 3 (fifo.jpg, link.jpg, device.jpg)"


@pytest.mark.parametrize("name", ["dataset_pets.json", "photos.zip"])
def test_a_fifo_in_the_place_of_a_file_is_one_line(folder, name):
    write_json(folder, [entry()], "dataset_pets.json" if name == "photos.zip" else "other.json")
    os.mkfifo(folder / name)
    message = "photos.zip is not a regular file" if name == "photos.zip" else "found none"
    with within(20), pytest.raises((ValueError, FileNotFoundError), match=message):
        captions.prepare(folder)


def test_a_photo_that_becomes_a_fifo_meanwhile_is_skipped(folder, caplog, monkeypatch):
    """Photos are read minutes after their files were found."""
    write(folder, entry("a.jpg"), entry("b.jpg"))
    check = photo_files.check

    def replace(files):
        (folder / "images" / "a.jpg").unlink()
        os.mkfifo(folder / "images" / "a.jpg")
        check(files)

    monkeypatch.setattr(photo_files, "check", replace)
    caplog.set_level(logging.INFO)
    with within(20):
        assert read(folder).filenames == ["b.jpg"]
    (line,) = skipped(caplog)
    assert line.startswith("skipped: a.jpg: ")
    assert line.endswith("is not a regular file")


def test_photos_that_would_take_too_much_memory_are_named_and_skipped(folder, caplog, monkeypatch):
    """A large file, a large member of an archive (which is not unpacked), a large picture."""
    monkeypatch.setenv("XLIR_PHOTO_MB", "40")
    names = ["file.jpg", "member.jpg", "picture.png", "good.jpg"]
    write_json(folder, [entry(name) for name in names])
    with open(folder / "images" / "file.jpg", "wb") as file:
        file.truncate(41_000_000)
    with zipfile.ZipFile(folder / "photos.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images/member.jpg", bytes(60_000_000))
    (folder / "images" / "picture.png").write_bytes(png(3000, 3000))
    (folder / "images" / "good.jpg").write_bytes(jpeg(1))
    caplog.set_level(logging.INFO)
    tracemalloc.start()
    assert read(folder).filenames == ["good.jpg"]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 30_000_000
    lines = sorted(skipped(caplog))
    assert [line.split(": ")[1] for line in lines] == names[:3]
    for line, amount in zip(lines, ("41 MB", "60 MB", "53 MB"), strict=True):
        assert f"would take {amount} in memory, but a photo may take at most 40 MB (set" in line
    assert warnings(caplog) == [
        "photos that can't be decoded, skipped: 3 (file.jpg, member.jpg, picture.png)"
    ]


def test_a_json_in_an_archive_may_be_larger_than_a_photo(folder, monkeypatch):
    monkeypatch.setenv("XLIR_PHOTO_MB", "10")
    content = json.dumps({"images": [entry()]}) + " " * 11_000_000
    with zipfile.ZipFile(folder / "captions.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("dataset_pets.json", content)
    (folder / "images" / "a.jpg").write_bytes(jpeg(1))
    assert read(folder).filenames == ["a.jpg"]


def test_a_limit_that_is_no_number_ends_the_preparation(folder, cache, monkeypatch):
    monkeypatch.setenv("XLIR_PHOTO_MB", "many")
    with pytest.raises(ValueError, match="XLIR_PHOTO_MB is 'many'"):
        read(write(folder, entry()))
    assert prepared_folders(cache) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *((name, name) for name in ("pets", "größe", "A_b9", "ab犬")),
        ("mein set", "mein_set"),
        ("gro\u0308ße 2", "größe_2"),
        ("a-b", "a_b"),
        ("a+b.c", "a_b_c"),
        ("30k", "set_30k"),
        ("犬", "set_犬"),
        ("", "set_"),
        ("caf\udce9", "caf_"),
    ],
    ids=ascii,
)
def test_a_set_of_any_name_can_be_read_back(folder, name, expected):
    """Names that TFDS can read do not change, so that prepared sets are found again."""
    write_json(folder, [entry()], f"dataset_{name}.json")
    (folder / "images" / "a.jpg").write_bytes(jpeg(3))
    builder = captions.prepare(folder)
    assert builder.name == expected
    images = CaptionedImages(builder, "train")
    assert images.images[0] == jpeg(3)
    assert CaptionedImages(captions.prepare(folder), "train").fingerprint == images.fingerprint


def test_a_photo_without_a_caption_is_skipped(folder, caplog):
    write(folder, entry("a.jpg", texts=[]), entry("b.jpg"), entry("c.jpg", texts=[" ", ""]))
    assert read(folder).filenames == ["b.jpg"]
    assert warnings(caplog) == [
        "dataset_pets.json: photos without a caption, skipped: 2 (a.jpg, c.jpg)"
    ]


def test_a_whole_set_warns_of_nothing(folder, caplog):
    read(write(folder, entry()))
    assert warnings(caplog) == []


def test_every_photo_missing_names_the_folders(folder):
    write_json(folder, [entry("a.jpg"), entry("b.jpg")])
    with pytest.raises(FileNotFoundError, match="none of the 2 photos") as error:
        captions.prepare(folder)
    assert str(folder) in str(error.value)
    assert str(folder / "images") in str(error.value)


def test_a_split_without_one_good_photo_is_named(folder, cache):
    write(folder, entry("a.jpg"), entry("b.jpg", "val"))
    (folder / "images" / "b.jpg").write_bytes(b"no photo")
    for _ in range(2):
        with pytest.raises(ValueError, match="no photo of split 'val' can be decoded"):
            captions.prepare(folder)
    assert prepared_folders(cache) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<html>404</html>", "is not JSON"),
        ("", "is not JSON"),
        ('{"images": [', "is not JSON"),
        (b"\xff\xfe{", "is not JSON"),
        ("[1, 2]", "holds list"),
        ('{"annotations": [], "info": {}}', r"holds keys \['annotations', 'info'\]"),
        ('{"images": {"a.jpg": []}}', r"holds keys \['images'\]"),
        ('{"images": ["a.jpg"]}', "image 0 is malformed"),
        ('{"images": [{"filename": "a.jpg", "split": "train"}]}', "image 0 lacks 'sentences'"),
        ({"filename": None}, "image 1 is malformed"),
        ({"filename": 5}, "image 1 is malformed"),
        ({"filepath": 5}, "image 1 is malformed"),
        ({"split": None}, "image 1 is malformed"),
        ("[" * 100_000, "is not JSON"),
        ({"split": ""}, "'' can't be the name of a split"),
        ({"split": "all"}, "'all' can't be the name of a split"),
        ({"split": "train+val"}, "can't be the name of a split"),
        ({"split": "../train"}, "can't be the name of a split"),
        ({"filename": "\udcff.jpg"}, "image 1 is malformed"),
        ({"sentences": [{"raw": "A dog \ud83d"}]}, "image 1 is malformed"),
        ({"cocoid": "x"}, "image 1 is malformed"),
        ({"cocoid": 2**63}, "image 1 is malformed: the id 9223372036854775808 is not a whole"),
        ({"imgid": 10**300}, "image 1 is malformed: the id 1000"),
        ({"cocoid": -1}, "image 1 is malformed: the id -1 is not a whole"),
        ({"cocoid": 1.5}, "image 1 is malformed: the id 1.5 is not a whole"),
        ({"cocoid": 1e400}, "image 1 is malformed: the id inf is not a whole"),
        ({"cocoid": True}, "image 1 is malformed: the id True is not a whole"),
        ({"cocoid": None}, "image 1 is malformed: the id None is not a whole"),
        ({"sentences": None}, "image 1 is malformed"),
        ({"sentences": ["A dog."]}, "image 1 is malformed"),
        ({"sentences": [{"raw": None}]}, "image 1 is malformed"),
        ({"sentences": [{"tokens": ["a"]}]}, "image 1 lacks 'raw'"),
    ],
    ids=lambda value: ascii(value)[:60],
)
def test_a_wrong_json_is_one_line_that_says_what_was_expected(folder, content, message):
    if isinstance(content, dict):
        content = json.dumps({"images": [entry("0.jpg"), entry("1.jpg") | content]})
    content = content if isinstance(content, bytes) else content.encode()
    (folder / "dataset_pets.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        captions.prepare(folder)
    assert str(folder / "dataset_pets.json") in str(error.value)
    assert "expected Karpathy and Li's JSON" in str(error.value)
    assert "\n" not in str(error.value)


def test_cocos_own_captions_json_is_refused(folder):
    """COCO's captions_train2014.json has `images` too, but without captions in them."""
    content = {
        "info": {},
        "images": [{"license": 5, "file_name": "a.jpg", "id": 9, "height": 480, "width": 640}],
        "annotations": [{"image_id": 9, "id": 1, "caption": "A dog."}],
    }
    (folder / "dataset_coco.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="image 0 lacks 'filename'; expected Karpathy"):
        captions.prepare(folder)


def test_a_file_name_twice_is_refused(folder):
    write(folder, entry("a.jpg", cocoid=1), entry("b.jpg", cocoid=2), entry("a.jpg", cocoid=3))
    with pytest.raises(ValueError, match=r"filename 'a\.jpg' occurs twice"):
        captions.prepare(folder)


def test_an_id_twice_is_refused(folder):
    write(folder, entry("a.jpg", cocoid=7), entry("b.jpg", cocoid=7))
    with pytest.raises(ValueError, match="image_id 7 occurs twice"):
        captions.prepare(folder)


@pytest.mark.parametrize(
    "where",
    [
        {"filename": "../secret.jpg"},
        {"filename": "x/../../secret.jpg"},
        {"filename": "/secret.jpg"},
        {"filename": ""},
        {"filename": "secret.jpg", "filepath": ".."},
        {"filename": "secret.jpg", "filepath": "train2014/../.."},
        {"filename": "secret.jpg", "filepath": "/"},
    ],
    ids=str,
)
def test_paths_out_of_the_folder_are_refused(folder, where):
    (folder.parent / "secret.jpg").write_bytes(jpeg(0))
    write_json(folder, [entry() | where])
    with pytest.raises(ValueError, match=f"image 0 is outside of {re.escape(str(folder))}"):
        captions.prepare(folder)


def test_file_names_beyond_ascii(folder):
    names = ["größe 1.jpg", "犬.jpg", "a'b\"c.jpg", "😀.jpg"]
    write(folder, *map(entry, names))
    images = read(folder)
    assert images.filenames == names
    assert [images.images[row] for row in range(4)] == [jpeg(row) for row in range(4)]


@pytest.mark.parametrize("above", ["", "images"])
def test_cocos_folders(folder, above):
    places = ["train2014", "val2014"]
    write_json(
        folder,
        [entry(f"{i}.jpg", filepath=place, cocoid=i) for i, place in enumerate(places)],
        "dataset_coco.json",
    )
    for i, place in enumerate(places):
        (folder / above / place).mkdir()
        (folder / above / place / f"{i}.jpg").write_bytes(jpeg(i))
    # A file of the same name in another folder is another photo.
    (folder / above / "val2014" / "0.jpg").write_bytes(jpeg(99))
    images = read(folder)
    assert images.filenames == ["0.jpg", "1.jpg"]
    assert [images.images[0], images.images[1]] == [jpeg(0), jpeg(1)]


def test_photos_beside_the_json(folder):
    write_json(folder, [entry()])
    (folder / "a.jpg").write_bytes(jpeg(5))
    assert read(folder).images[0] == jpeg(5)


def test_two_jsons_are_named_and_one_can_be_chosen(folder):
    write(folder, entry(texts=["One."]))
    write_json(folder, [entry(texts=["Other."])], "dataset_other.json")
    with pytest.raises(FileNotFoundError, match=r"dataset_other\.json, dataset_pets\.json: name"):
        captions.prepare(folder)
    builder = captions.prepare(folder, folder / "dataset_other.json")
    assert CaptionedImages(builder, "train").captions == [["Other."]]


def test_no_json_no_folder_no_chosen_file(folder):
    with pytest.raises(FileNotFoundError, match=r"one dataset_\*\.json, found none"):
        captions.prepare(folder)
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        captions.prepare(folder / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no file .*x\.json \(config.data.annotations\)"):
        captions.prepare(folder, folder / "x.json")


def prepared_folders(cache) -> list[pathlib.Path]:
    """The folders that TFDS would accept as complete sets."""
    found = (file.parent for file in cache.glob("datasets/**/dataset_info.json"))
    return sorted(place for place in found if not place.name.startswith("incomplete"))


def test_an_unchanged_set_is_not_prepared_again(folder, cache, monkeypatch):
    first = read(write(folder, entry()))

    def refuse(*_):
        raise AssertionError("prepared again")

    monkeypatch.setattr(captions, "_read_photo", refuse)
    monkeypatch.setattr(records, "_write", refuse)
    second = read(folder)
    assert second.fingerprint == first.fingerprint
    assert second.captions == first.captions
    assert second.images[0] == first.images[0]
    assert len(prepared_folders(cache)) == 1


def test_a_changed_photo_is_prepared_anew(folder, cache):
    first = read(write(folder, entry()))
    (folder / "images" / "a.jpg").write_bytes(jpeg(7, size=32))
    second = read(folder)
    assert second.images[0] == jpeg(7, size=32)
    assert second.fingerprint != first.fingerprint
    assert len(prepared_folders(cache)) == 2


def test_a_photo_that_turns_up_is_prepared(folder):
    write(folder, entry("a.jpg"), entry("b.jpg"))
    (folder / "images" / "b.jpg").unlink()
    assert len(read(folder)) == 1
    (folder / "images" / "b.jpg").write_bytes(jpeg(1))
    assert len(read(folder)) == 2


def test_other_captions_are_prepared_anew(folder):
    first = read(write(folder, entry(texts=["A dog."])))
    write_json(folder, [entry(texts=["A cat."])])
    second = read(folder)
    assert second.captions == [["A cat."]]
    assert second.fingerprint != first.fingerprint


def test_fingerprint_covers_the_split(folder):
    write(folder, entry("a.jpg"), entry("b.jpg", "val"))
    assert read(folder, "train").fingerprint != read(folder, "val").fingerprint


KILLED = """
import os, signal, sys
from input_pipeline.datasets import captions, photo_files, records
records.AHEAD = records.SHARD = 1
read = photo_files.FileInFolder.read
def read_then_die(file):
    if file.path.name == "3.jpg":
        os.kill(os.getpid(), signal.SIGKILL)
    return read(file)
photo_files.FileInFolder.read = read_then_die
captions.prepare(sys.argv[1])
"""


def photos_read(monkeypatch) -> list[str]:
    """The names of the photos that are read from now on."""
    seen, read_file = [], photo_files.FileInFolder.read

    def watch(file):
        seen.append(file.path.name)
        return read_file(file)

    monkeypatch.setattr(photo_files.FileInFolder, "read", watch)
    return seen


def forbid_records(monkeypatch, builder):
    """Makes it an error to read any record of a prepared set."""
    opened = type(builder).as_data_source

    class Unreadable(Sequence):
        def __init__(self, *arguments, **options):
            self._length = len(opened(*arguments, **options))

        def __len__(self):
            return self._length

        def __getitem__(self, place):
            raise AssertionError("a record was read")

    def unreadable(*arguments, **options):
        return Unreadable(*arguments, **options)

    monkeypatch.setattr(type(builder), "as_data_source", unreadable)


@pytest.mark.parametrize("last_split", ["train", "val"])
def test_a_killed_preparation_leaves_nothing_readable(folder, cache, last_split):
    write(folder, *(entry(f"{i}.jpg", "train" if i < 3 else last_split) for i in range(6)))
    assert run(KILLED, folder).returncode == -signal.SIGKILL
    assert list(cache.rglob("*.array_record*")), "it was killed too early"
    assert prepared_folders(cache) == []
    images = read(folder, "train" if last_split == "train" else "train+val")
    assert images.filenames == [f"{i}.jpg" for i in range(6)]
    assert [images.images[row] for row in range(6)] == [jpeg(row) for row in range(6)]
    assert len(prepared_folders(cache)) == 1
    assert list(cache.rglob("incomplete*")) == []


def test_a_killed_preparation_goes_on_where_it_was(folder, monkeypatch):
    write(folder, *(entry(f"{i}.jpg", "train" if i < 2 else "val") for i in range(6)))
    run(KILLED, folder)
    seen = photos_read(monkeypatch)
    monkeypatch.setattr(records, "SHARD", 1)
    images = read(folder, "train+val")
    assert seen == ["3.jpg", "4.jpg", "5.jpg"]
    assert [images.images[row] for row in range(6)] == [jpeg(row) for row in range(6)]


def test_what_was_broken_before_the_kill_is_still_named(folder, monkeypatch, caplog):
    write(folder, *(entry(f"{i}.jpg") for i in range(5)))
    (folder / "images" / "1.jpg").write_bytes(b"no photo")
    run(KILLED, folder)
    monkeypatch.setattr(records, "SHARD", 1)
    images = read(folder)
    assert images.filenames == ["0.jpg", "2.jpg", "3.jpg", "4.jpg"]
    assert images.images[3] == jpeg(4)
    assert warnings(caplog) == ["photos that can't be decoded, skipped: 1 (1.jpg)"]


def test_the_leavings_of_another_source_are_removed(folder, cache):
    write(folder, *(entry(f"{i}.jpg") for i in range(5)))
    run(KILLED, folder)
    (left,) = cache.rglob("incomplete.*")
    write_json(folder, [entry("0.jpg")])
    read(folder)
    assert not left.exists()
    assert len(prepared_folders(cache)) == 1


def test_a_full_disk_keeps_earlier_sets_and_finished_shards(folder, cache, monkeypatch):
    first = read(write(folder, entry("0.jpg")))
    write(folder, *(entry(f"{i}.jpg") for i in range(4)))
    write_digested, written = files.write_digested, []

    def full(file, content):
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(file)
        write_digested(file, content)

    monkeypatch.setattr(records, "SHARD", 1)
    monkeypatch.setattr(files, "write_digested", full)
    with pytest.raises(OSError, match="No space left"):
        read(folder)
    assert len(prepared_folders(cache)) == 1
    assert first.images[0] == jpeg(0)
    assert all(file.exists() for file in written)


def test_two_that_prepare_at_once_both_get_the_set(folder, cache):
    """The second process waits for the first."""
    write(folder, *(entry(f"{i}.jpg") for i in range(3)))
    arguments = [sys.executable, "-c", LIGHT, str(folder)]
    both = [subprocess.Popen(arguments, cwd=REPOSITORY, stdout=subprocess.PIPE) for _ in range(2)]
    printed = {process.communicate(timeout=60)[0] for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert len(printed) == 1
    assert len(prepared_folders(cache)) == 1
    assert list(cache.rglob("incomplete*")) == []


def test_rows_are_written_with_the_records(folder, cache, monkeypatch):
    """Otherwise, the first use of COCO would read 18 GB."""
    builder = captions.prepare(write(folder, entry("a.jpg"), entry("b.jpg", "val")))
    forbid_records(monkeypatch, builder)
    assert CaptionedImages(builder, "train+val").filenames == ["a.jpg", "b.jpg"]


def test_tfds_opens_what_was_prepared(folder):
    import tensorflow_datasets as tfds

    builder = captions.prepare(write(folder, entry("a.jpg"), entry("b.jpg")))
    source = tfds.builder_from_directory(builder.data_path).as_data_source("train")
    assert [example["image/filename"] for example in source] == [b"a.jpg", b"b.jpg"]
    assert source[0]["image"].shape == (24, 24, 3)


def test_the_same_photos_elsewhere_have_the_same_fingerprint(folder, tmp_path):
    first = read(write(folder, entry()))
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    assert read(tmp_path / "copy").fingerprint == first.fingerprint


def test_a_photo_of_the_same_size_in_its_place_is_noticed(folder):
    first = read(write(folder, entry()))
    file = folder / "images" / "a.jpg"
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    file.write_bytes(data)
    assert read(folder).images[0] == bytes(data) != first.images[0]


def test_a_file_name_with_a_subfolder(folder, caplog):
    write_json(folder, [entry("sub/a.jpg"), entry("b/c.jpg", filepath="val2014")])
    (folder / "images" / "sub").mkdir()
    (folder / "images" / "sub" / "a.jpg").write_bytes(jpeg(0))
    (folder / "val2014" / "b").mkdir(parents=True)
    (folder / "val2014" / "b" / "c.jpg").write_bytes(jpeg(1))
    images = read(folder)
    assert images.filenames == ["sub/a.jpg", "b/c.jpg"]
    assert [images.images[0], images.images[1]] == [jpeg(0), jpeg(1)]
    assert warnings(caplog) == []


LIGHT = """
import sys
from input_pipeline.datasets import captions
from input_pipeline.datasets.captioned_images import CaptionedImages
images = CaptionedImages(captions.prepare(sys.argv[1]), "train")
print(len(images), len(images.images[0]))
print(sorted({"tensorflow", "torch", "jax"} & set(sys.modules)))
"""


def test_preparing_and_reading_import_no_framework(folder):
    done = run(LIGHT, write(folder, entry()))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"1 {len(jpeg(0))}", "[]"]


def test_flickr8k(shared, caplog):
    builder = captions.prepare(shared / "flickr8k")
    sizes = {split: info.num_examples for split, info in builder.info.splits.items()}
    assert sizes == {"train": 5827, "val": 964, "test": 970}
    images = CaptionedImages(builder, "test")
    assert {len(texts) for texts in images.captions} == {5}
    for row in (0, len(images) - 1):
        file = shared / "flickr8k" / "images" / images.filenames[row]
        assert images.images[row] == file.read_bytes()
    assert warnings(caplog) == []


def test_coco_mini(shared):
    source = json.loads((shared / "coco_mini" / "dataset_coco.json").read_text())["images"]
    builder = captions.prepare(shared / "coco_mini")
    assert sum(info.num_examples for info in builder.info.splits.values()) == len(source) == 477
    for split in builder.info.splits:
        expected = [one for one in source if one["split"] == split]
        images = CaptionedImages(builder, split)
        assert images.filenames == [one["filename"] for one in expected]
        assert images.image_ids.tolist() == [one["cocoid"] for one in expected]
        one = expected[0]
        assert (
            images.images[0]
            == (shared / "coco_mini" / one["filepath"] / one["filename"]).read_bytes()
        )
