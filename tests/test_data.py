"""Training photos and test sets of a configuration; XTD10's photos are never trained on."""

import io
import json
import logging
import pathlib
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from configs import base
from input_pipeline import datasets, test_sets
from input_pipeline.test_sets import captioned_photos, split, xtd10
from input_pipeline.test_sets.retrieval_set import Options
from tests.datasets.test_coco import CocoCaptions
from xlir import data


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> pathlib.Path:
    monkeypatch.setenv("XLIR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def jpeg(seed: int = 0) -> bytes:
    colour = tuple(np.random.default_rng(seed).integers(0, 256, 3).tolist())
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "JPEG")
    return file.getvalue()


def config_of(folder, name="coco", evals=(), **fields):
    config = base.get_config()
    config.data.name = name
    config.data.dir = str(folder)
    for field, value in fields.items():
        config.data[field] = value
    for test_set, options in dict(evals).items():
        config.evals[test_set] = options
    return config


def xtd10_names() -> list[str]:
    return [f"COCO_{place}_{number:012d}.jpg" for number, place in xtd10.origins().items()]


def coco_entries() -> list[dict]:
    """XTD10's 1,000 photos in Karpathy's train and restval, and 12 others in all splits."""
    names = xtd10_names()
    splits = ["train"] * 800 + ["restval"] * 200
    for number in range(12):
        split = ("train", "restval", "val", "test")[number % 4]
        names.append(f"COCO_{'train' if split == 'train' else 'val'}2014_{number:012d}.jpg")
        splits.append(split)
    return [
        {
            "filename": name,
            "filepath": name.split("_")[1],
            "cocoid": int(name[-16:-4]),
            "split": split,
            "sentences": [{"raw": f"a caption, {name}"}, {"raw": "another"}],
        }
        for name, split in zip(names, splits, strict=True)
    ]


@pytest.fixture(scope="module")
def coco_folder(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("coco")
    for entry in coco_entries():
        (folder / entry["filepath"]).mkdir(exist_ok=True)
        (folder / entry["filepath"] / entry["filename"]).write_bytes(jpeg(entry["cocoid"]))
    (folder / "dataset_coco.json").write_text(json.dumps({"images": coco_entries()}))
    return folder


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO)
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("name", ["coco", "captions"])
@pytest.mark.parametrize(
    ("train", "left", "removed"),
    [
        ("train", 3, "removed 800 photos of XTD10 (800 of train2014, 0 of val2014)"),
        ("train+restval", 6, "removed 1000 photos of XTD10 (800 of train2014, 200 of val2014)"),
        ("val", 3, "removed 0 photos of XTD10 (0 of train2014, 0 of val2014)"),
    ],
)
def test_no_photo_of_xtd10_is_trained_on(coco_folder, log, name, train, left, removed):
    """This does not need XTD10's captions."""
    photos = data.training_photos(config_of(coco_folder, name, train=train))
    assert len(photos) == left
    assert not set(photos.filenames) & set(xtd10_names())
    assert removed in log()


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("tfds")
    builder = CocoCaptions(config="2014", data_dir=folder, file_format="array_record")
    builder.entries, builder.jpeg = coco_entries, jpeg
    builder.download_and_prepare()
    return folder


def test_no_photo_of_xtd10_is_trained_on_from_tfds(tfds_folder, log):
    config = config_of(tfds_folder, "coco_captions", train="train+restval")
    photos = data.training_photos(config)
    assert len(photos) == 6
    assert not set(photos.filenames) & set(xtd10_names())
    assert "removed 1000 photos of XTD10 (800 of train2014, 200 of val2014)" in log()
    assert data.validation_set(config).name == "coco-val"
    assert data.test_sets(config)[0].name == "coco-test"


def test_xtd10_and_coco_from_the_prepared_set(coco_folder, tfds_folder, shared, log):
    """Photos are found by name, whether TFDS or this package prepared COCO."""
    evals = {
        "test": base.test_set("split"),
        "xtd10": base.test_set("xtd10", captions=str(shared / "xtd10")),
    }
    for config in (
        config_of(coco_folder, evals=evals),
        config_of(tfds_folder, "coco_captions", evals=evals),
    ):
        multilingual, english = data.test_sets(config)
        assert (multilingual.name, english.name) == ("xtd10", "coco-test")
        assert len(multilingual.captions) == 11
        assert len(multilingual.images) == 1000
        for row in (0, 799, 800, 999):
            assert multilingual.images[row] == jpeg(int(xtd10_names()[row][-16:-4]))
        assert english.captions["en"][1::2] == ["another"] * 3
        assert (
            "xtd10: 6 captions in 'de' are not translations; they are kept "
            "(config.evals.xtd10.drop_junk or --drop_junk leaves them out)" in log()
        )
        assert data.missing(config) == []
        data.training_photos(config)


def test_prepare_completes_xtd10s_captions(coco_folder, shared, tmp_path, monkeypatch):
    """Captions come from a local copy; files of an interrupted download are kept."""
    mirror, folder = tmp_path / "mirror", tmp_path / "xtd10"
    for commit, paths in xtd10.COMMITS.items():
        for path in paths:
            (file,) = (shared / "xtd10").rglob(path.split("/")[-1])
            (mirror / commit / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, mirror / commit / path)
    monkeypatch.setattr(xtd10, "RAW_URL", mirror.as_uri())
    config = config_of(coco_folder, evals={"xtd10": base.test_set("xtd10", captions=str(folder))})
    (japanese,) = mirror.rglob("test_1kcaptions_jp.txt")
    japanese.rename(tmp_path / "later")
    with pytest.raises(OSError, match="can't download"):
        data.prepare(config)
    (tmp_path / "later").rename(japanese)
    data.prepare(config)
    assert len(data.test_sets(config)[0].captions) == 11


def test_xtd10_without_junk(coco_folder, shared, log):
    options = base.test_set("xtd10", captions=str(shared / "xtd10"), drop_junk=True)
    (test_set,) = data.test_sets(config_of(coco_folder, evals={"xtd10": options}))
    assert test_set.name == "xtd10-without-junk"
    assert len(test_set.captions["de"]) == len(test_set.image_of["de"]) == 994
    assert 147 not in test_set.image_of["de"]
    assert len(test_set.images) == len(test_set.captions["fr"]) == 1000
    assert "xtd10: 6 captions in 'de' are not translations; they are left out" in log()


def test_xtd10s_photos_from_a_folder(coco_folder, photos, shared):
    """The run's own data set has none of them."""
    options = base.test_set(captions=str(shared / "xtd10"))
    config = config_of(photos, "captions", evals={"human": options})
    with pytest.raises(FileNotFoundError, match=r"1000 of the 1000 photos of xtd10.*--images=DIR"):
        data.test_sets(config)
    with pytest.raises(FileNotFoundError, match=r"prepared shapes .*config\.evals\.human\.images"):
        data.training_photos(config)
    config.evals.human.images = str(coco_folder)
    (test_set,) = data.test_sets(config)
    assert [file.name for file in test_set.images] == xtd10_names()


@pytest.mark.parametrize(("count", "names"), [(1, "0"), (3, "0, 1, 2"), (4, "0, 1, 2, ...")])
def test_photos_that_the_run_lacks_are_named(count, names, photos):
    captions = captioned_photos.CaptionedPhotos("mine", list(map(str, range(count))), {}, {})
    run = data.run_data(config_of(photos, "captions"))
    with pytest.raises(FileNotFoundError, match=re.escape(f"prepared shapes ({names}): name")):
        captioned_photos.with_photos_of_run(captions, Options("mine"), run)


def test_what_is_missing_is_said_before_anything_starts(tmp_path):
    config = config_of(tmp_path / "coco", evals={"xtd10": base.test_set("xtd10")})
    coco, captions = data.missing(config)
    assert all(part in coco for part in ("train2014.zip", "13.5 GB", "wget -c"))
    assert "git clone" in captions
    assert not (tmp_path / "coco").exists()
    (tfds,) = data.missing(config_of(tmp_path, "coco_captions"))
    assert "no coco_captions/2014" in tfds


def test_karpathys_test_split_has_folds(tmp_path, monkeypatch):
    """COCO has 5 folds of 1,000 photos; this set has 5 of 2. Five captions per photo are used."""
    monkeypatch.setattr(split, "COCO_TEST", 10)
    (tmp_path / "val2014").mkdir()
    entries = []
    for number in range(10):
        name = f"COCO_val2014_{number:012d}.jpg"
        (tmp_path / "val2014" / name).write_bytes(jpeg())
        captions = [{"raw": f"{number} {k}"} for k in range(5 + number % 2)]
        entries.append(
            {"filename": name, "filepath": "val2014", "split": "test", "sentences": captions}
        )
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": entries}))
    (test_set,) = data.test_sets(config_of(tmp_path, "captions"))
    assert (test_set.name, test_set.folds) == ("coco-test-5k", ("coco-test-1k", 5))
    assert test_set.image_of["en"].tolist() == np.repeat(np.arange(10), 5).tolist()
    assert test_set.captions["en"][5:10] == [f"1 {k}" for k in range(5)]


def test_prepare_says_where_and_how_many(coco_folder, cache):
    first, *splits = data.prepare(config_of(coco_folder)).splitlines()
    assert first.startswith(f"coco: {cache}")
    xtd10_removed = "photos of XTD10, which are never trained on)"
    assert [" ".join(line.split()) for line in splits] == [
        f"train 803 photos 1,606 captions (800 {xtd10_removed}",
        f"restval 203 photos 406 captions (200 {xtd10_removed}",
        "val 3 photos 6 captions",
        "test 3 photos 6 captions",
    ]


def test_a_data_set_says_how_it_is_filed_and_under_which_terms(coco_folder, tfds_folder):
    for name, folder in (("coco", coco_folder), ("coco_captions", tfds_folder)):
        assert data.prepared_set(config_of(folder, name)).name == "coco"
        assert "CC BY 4.0" in datasets.find(name).terms
    assert datasets.find("captions").terms == ""
    with pytest.raises(ValueError, match="no data set 'imagenet'; known: emoji, captions, coco"):
        datasets.find("imagenet")


def test_a_source_gives_an_image_with_its_texts(coco_folder):
    source = data.split_photos(config_of(coco_folder), "test")
    image, texts = source[2]
    assert (image, texts) == (source.images[2], source.captions[2])
    assert len(source) == len(source.images) == 3
    assert list(source.images) == [image for image, _ in source]


@pytest.fixture
def two_folders(photos, tmp_path):
    """A run with two test sets in `data.dir`, each with its own folder of photos."""
    shutil.copytree(photos, tmp_path / "set")
    names = (tmp_path / "set" / "multilingual_test" / "test_image_names.txt").read_text().split()
    other = tmp_path / "set" / "other"
    (other / "photos").mkdir(parents=True)
    (other / "test_image_names.txt").write_text("another.jpg\n")
    (other / "test_captions_sw.txt").write_text("picha\n")
    shutil.copy(next((tmp_path / "set").rglob(names[0])), other / "photos" / "another.jpg")
    evals = {
        "multilingual": base.test_set(captions="multilingual_test"),
        "swahili": base.test_set(captions="other", images="other/photos"),
        "val": base.test_set("split", split="val"),
    }
    return config_of(tmp_path / "set", "captions", evals=evals)


def test_each_test_set_has_options_of_its_own(two_folders):
    first, second, last = data.test_sets(two_folders)
    assert (first.name, second.name, last.name) == ("multilingual_test", "other", "shapes-val")
    assert [file.name for file in second.images] == ["another.jpg"]
    assert list(second.captions) == ["sw"]


def test_a_test_set_is_named_as_in_the_configuration(two_folders):
    (test_set,) = data.test_sets(two_folders, "swahili")
    assert [file.name for file in test_set.images] == ["another.jpg"]
    found = data.test_sets(two_folders, "val,split:test")
    assert [test_set.name for test_set in found] == ["shapes-val", "shapes-test"]
    folder = pathlib.Path(two_folders.data.dir) / "other"
    (test_set,) = data.test_sets(two_folders, str(folder), str(folder / "photos"))
    assert [file.name for file in test_set.images] == ["another.jpg"]


def test_photos_of_every_folder_are_kept_out_of_training(two_folders):
    (folder, *_) = data.test_sets(two_folders)
    names = {file.name for file in folder.images}
    assert not names & set(data.training_photos(two_folders).filenames)
    two_folders.evals = {}
    assert names & set(data.training_photos(two_folders).filenames)


def test_types_of_test_sets_are_a_registry():
    assert "noncommercial" in test_sets.find("xtd10").terms
    assert [type for type in test_sets.TYPES if test_sets.find(type).download] == ["xtd10"]
    with pytest.raises(ValueError, match="no type 'voc' of test sets; known: xtd10, folder, split"):
        test_sets.find("voc")
