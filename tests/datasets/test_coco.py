"""COCO: from archives as downloaded, from TFDS, and what is said where it is missing."""

import io
import json
import pathlib
import zipfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from input_pipeline.datasets import captions, coco, coco_captions, photo_files
from input_pipeline.datasets.captioned_images import CaptionedImages
from tests.datasets import test_captions

# Karpathy's split -> COCO's folder.
PLACES = {"train": "train2014", "restval": "val2014", "val": "val2014", "test": "val2014"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> pathlib.Path:
    """An empty cache for each test."""
    monkeypatch.setenv("XLIR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 24, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def name_of(image_id: int, split: str) -> str:
    return f"COCO_{PLACES[split]}_{image_id:012d}.jpg"


def entries(count: int = 8) -> list[dict]:
    splits = list(PLACES)
    return [
        {
            "filename": name_of(i, splits[i % 4]),
            "filepath": PLACES[splits[i % 4]],
            "cocoid": i,
            "split": splits[i % 4],
            "sentences": [{"raw": f"caption {i} {k}"} for k in range(5)],
        }
        for i in range(count)
    ]


@pytest.fixture
def packed(tmp_path) -> pathlib.Path:
    """A folder as the three downloads leave it."""
    folder = tmp_path / "coco"
    folder.mkdir()
    for place in ("train2014", "val2014"):
        with zipfile.ZipFile(folder / f"{place}.zip", "w") as archive:
            for one in entries():
                if one["filepath"] == place:
                    archive.writestr(f"{place}/{one['filename']}", jpeg(one["cocoid"]))
    with zipfile.ZipFile(folder / "caption_datasets.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("coco", "flickr8k"):
            archive.writestr(f"dataset_{name}.json", json.dumps({"images": entries()}))
    return folder


def prepared_folders(cache) -> list[pathlib.Path]:
    return [
        file
        for file in cache.glob("datasets/**/dataset_info.json")
        if not file.parent.name.startswith("incomplete")
    ]


def test_archives_as_downloaded(packed):
    builder = captions.prepare(packed)
    assert builder.name == "coco"
    assert set(builder.info.splits) == {"train", "restval", "val", "test"}
    images = CaptionedImages(builder, "train+restval")
    assert images.image_ids.tolist() == [0, 4, 1, 5]
    assert [images.images[row] for row in range(4)] == [jpeg(0), jpeg(4), jpeg(1), jpeg(5)]
    assert images.captions[0] == [f"caption 0 {k}" for k in range(5)]


def test_photos_in_folders_come_first_and_archives_fill_the_gaps(packed):
    (packed / "val2014").mkdir()
    (packed / "val2014" / name_of(1, "restval")).write_bytes(jpeg(99))
    images = CaptionedImages(captions.prepare(packed), "restval")
    assert [images.images[0], images.images[1]] == [jpeg(99), jpeg(5)]


def test_extracted_and_packed_have_the_same_fingerprint(packed, tmp_path):
    first = CaptionedImages(captions.prepare(packed), "train")
    other = tmp_path / "extracted"
    for file in packed.glob("*.zip"):
        with zipfile.ZipFile(file) as archive:
            archive.extractall(other)
    (other / "dataset_flickr8k.json").unlink()
    assert CaptionedImages(captions.prepare(other), "train").fingerprint == first.fingerprint


def test_annotations_in_an_archive_can_be_chosen(packed):
    assert captions.prepare(packed, "dataset_flickr8k.json").name == "flickr8k"
    with pytest.raises(FileNotFoundError, match=r"no file dataset_x\.json"):
        captions.prepare(packed, "dataset_x.json")


def cut(file, folder):
    file.write_bytes(file.read_bytes()[:-40])


def empty(file, folder):
    file.write_bytes(b"")


def hole(file, folder):
    """As a download in pieces leaves: the end is there, something before is not."""
    data = bytearray(file.read_bytes())
    start = data.index(b"PK\x03\x04", 100)
    data[start : start + 200] = bytes(200)
    file.write_bytes(data)


def control_file(file, folder):
    (folder / f"{file.name}.aria2").touch()


def page(file, folder):
    file.write_bytes(b"<html>404</html>")


@pytest.mark.parametrize("damage", [cut, empty, hole, control_file, page])
@pytest.mark.parametrize("archive", ["train2014.zip", "val2014.zip"])
def test_a_partial_archive_is_refused_before_any_work(packed, cache, damage, archive):
    damage(packed / archive, packed)
    before = sorted(cache.rglob("*.array_record*"))
    with pytest.raises(ValueError, match="is a partial download or damaged") as error:
        captions.prepare(packed)
    message = str(error.value)
    assert str(packed / archive) in message
    assert f"{(packed / archive).stat().st_size:,} of {photo_files.PUBLISHED[archive]:,}" in message
    assert "\n" not in message
    assert sorted(cache.rglob("*.array_record*")) == before == []


def test_photos_that_were_altered_in_the_archive_are_noticed(packed, cache):
    """Earlier sets stay as they are."""
    first = CaptionedImages(captions.prepare(packed), "train")
    file = packed / "train2014.zip"
    file.write_bytes(file.read_bytes().replace(jpeg(4)[-60:], bytes(60)))
    # The table of contents is the same, so the prepared set is found.
    assert CaptionedImages(captions.prepare(packed), "train").images[1] == jpeg(4)
    (packed / "dataset_coco.json").write_text(json.dumps({"images": entries()[:6]}))
    with pytest.raises(ValueError, match=r"train2014\.zip .*Bad CRC-32.*"):
        captions.prepare(packed)
    assert first.images[1] == jpeg(4)
    assert len(prepared_folders(cache)) == 1


def test_a_json_in_the_archive_that_is_wrong_is_one_line(packed, cache):
    with zipfile.ZipFile(packed / "caption_datasets.zip", "w") as archive:
        archive.writestr("dataset_coco.json", "[]")
    with pytest.raises(ValueError, match=r"caption_datasets\.zip/dataset_coco\.json holds list"):
        captions.prepare(packed)
    assert list(cache.rglob("*.array_record*")) == []


def test_what_is_missing_comes_with_sizes_and_commands(tmp_path, packed):
    text = coco.missing(tmp_path / "none")
    for part in (
        "13.5 GB",
        "6.6 GB",
        "37 MB",
        "82,783 photos",
        "Nothing is downloaded automatically",
    ):
        assert part in text
    for url in (f"{coco.IMAGES_URL}/train2014.zip", coco.CAPTIONS_URL):
        assert f"wget -c -P {tmp_path / 'none'} {url}" in text
    assert not (tmp_path / "none").exists()
    assert coco.missing(packed) == ""
    (packed / "val2014.zip").unlink()
    text = coco.missing(packed)
    assert "val2014.zip" in text
    assert "train2014.zip" not in text
    (packed / "images" / "val2014").mkdir(parents=True)
    assert coco.missing(packed) == ""
    assert "wget -c -P PATH" in coco.missing("")


class CocoCaptions(tfds.core.GeneratorBasedBuilder):
    """With the name, version, configuration and schema of TFDS's coco_captions.

    `entries` and `jpeg` say what is in it.
    """

    name = "coco_captions"
    VERSION = tfds.core.Version("1.1.0")
    BUILDER_CONFIGS = (tfds.core.BuilderConfig(name="2014", version=VERSION),)
    pkg_dir_path = None
    entries, jpeg = staticmethod(entries), staticmethod(jpeg)

    def _info(self):
        objects = {
            "id": np.int64,
            "area": np.int64,
            "bbox": tfds.features.BBoxFeature(),
            "label": tfds.features.ClassLabel(num_classes=80),
            "is_crowd": np.bool_,
        }
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "image/filename": tfds.features.Text(),
            "image/id": np.int64,
            "objects": tfds.features.Sequence(objects),
            "captions": tfds.features.Sequence({"text": np.str_, "id": np.int64}),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in PLACES}

    def _generate_examples(self, split):
        for one in self.entries():
            if one["split"] == split:
                box = tfds.features.BBox(ymin=0.0, xmin=0.0, ymax=1.0, xmax=0.5)
                thing = {"id": 1, "area": 9, "bbox": box, "label": 3, "is_crowd": False}
                yield (
                    one["cocoid"],
                    {
                        "image": io.BytesIO(self.jpeg(one["cocoid"])),
                        "image/filename": one["filename"],
                        "image/id": one["cocoid"],
                        "objects": [thing] * (one["cocoid"] % 3),
                        "captions": [
                            {"text": f" {sentence['raw']}\n", "id": k}
                            for k, sentence in enumerate(one["sentences"])
                        ],
                    },
                )


@pytest.fixture
def tfds_data_dir(tmp_path) -> pathlib.Path:
    folder = tmp_path / "tensorflow_datasets"
    builder = CocoCaptions(config="2014", data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return folder


def test_tfds_coco_captions(tfds_data_dir, cache, monkeypatch):
    before = sorted(tfds_data_dir.rglob("*"))
    builder = coco_captions.prepared_by_tfds(tfds_data_dir)
    images = CaptionedImages(builder, "train+restval")
    assert sorted(images.image_ids.tolist()) == [0, 1, 4, 5]
    for row, image_id in enumerate(images.image_ids.tolist()):
        assert images.images[row] == jpeg(image_id)
        assert images.captions[row] == [f"caption {image_id} {k}" for k in range(5)]
    # What was read from the records is kept in the cache, not in somebody's folder.
    assert sorted(tfds_data_dir.rglob("*")) == before
    assert len(list(cache.glob("datasets/coco_captions/rows/*.json"))) == 2
    test_captions.forbid_records(monkeypatch, builder)
    again = CaptionedImages(
        coco_captions.prepared_by_tfds(tfds_data_dir / "coco_captions" / "2014" / "1.1.0"),
        "train+restval",
    )
    assert again.fingerprint == images.fingerprint


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[:-3],
        lambda data: b"",
        lambda data: data.replace(b"caption 0 0", b"caption 9 0"),
        # As version 49a03f1 wrote it.
        lambda data: data.partition(b"\n")[2],
    ],
    ids=["cut", "empty", "changed", "without digest"],
)
def test_what_was_read_of_tfds_records_is_read_anew_where_it_is_damaged(
    tfds_data_dir, cache, caplog, spoil
):
    builder = coco_captions.prepared_by_tfds(tfds_data_dir)
    before = CaptionedImages(builder, "train")
    (file,) = cache.glob("datasets/coco_captions/rows/*.json")
    whole = file.read_bytes()
    file.write_bytes(spoil(whole))
    again = CaptionedImages(builder, "train")
    assert (again.captions, again.fingerprint) == (before.captions, before.fingerprint)
    (line,) = (record.getMessage() for record in caplog.records if "again" in record.getMessage())
    assert line.startswith(f"{file} is damaged")
    assert file.read_bytes() == whole


def test_tfds_records_are_read_where_the_cache_cannot_be_written(
    tfds_data_dir, read_only, monkeypatch, caplog
):
    place, forbid = read_only
    moved = tfds_data_dir.rename(place / "data")
    (place / "cache").mkdir()
    monkeypatch.setenv("XLIR_CACHE", str(place / "cache"))
    forbid()
    images = CaptionedImages(coco_captions.prepared_by_tfds(moved), "train")
    assert sorted(images.image_ids.tolist()) == [0, 4]
    (line,) = (record.getMessage() for record in caplog.records if "kept" in record.getMessage())
    assert str(place / "cache") in line


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe"])
def test_damaged_metadata_of_tfds_is_named(tfds_data_dir, content):
    (info,) = tfds_data_dir.rglob("dataset_info.json")
    info.write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged .*prepare coco_captions again") as error:
        coco_captions.prepared_by_tfds(tfds_data_dir)
    assert str(info) in str(error.value)
    assert "\n" not in str(error.value)


def test_damaged_records_of_tfds_are_named(tfds_data_dir):
    shard = next(iter(tfds_data_dir.rglob("*-val.array_record*")))
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(ValueError, match="Prepare it again with TFDS, or restore") as error:
        CaptionedImages(coco_captions.prepared_by_tfds(tfds_data_dir), "val")
    assert str(error.value).startswith(str(shard))


def test_missing_coco_captions_comes_with_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="no coco_captions/2014") as error:
        coco_captions.prepared_by_tfds(tmp_path)
    assert "file_format='array_record').download_and_prepare()" in str(error.value)
    assert "\n" not in str(error.value)


def test_another_format_comes_with_the_command_that_converts(tfds_data_dir):
    (info,) = tfds_data_dir.rglob("dataset_info.json")
    content = json.loads(info.read_text())
    info.write_text(json.dumps(content | {"fileFormat": "tfrecord"}))
    with pytest.raises(ValueError, match=r"prepared as tfrecord.*tfds convert_format") as error:
        coco_captions.prepared_by_tfds(tfds_data_dir)
    assert "\n" not in str(error.value)
    # As `tfds convert_format` leaves it, both formats side by side.
    more = {"fileFormat": "tfrecord", "alternativeFileFormats": ["array_record"]}
    info.write_text(json.dumps(content | more))
    assert len(CaptionedImages(coco_captions.prepared_by_tfds(tfds_data_dir), "val")) == 2


def test_another_data_set_is_refused(packed):
    builder = captions.prepare(packed)
    with pytest.raises(ValueError, match="holds coco, not"):
        coco_captions.prepared_by_tfds(builder.data_path)
