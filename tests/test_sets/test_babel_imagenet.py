"""Babel-ImageNet: files in their documented layout, and the published file if it is there."""

import dataclasses
import importlib.util
import json
import pathlib
import re

import pytest

from configs import base
from input_pipeline.test_sets.babel_imagenet import BABEL_IMAGENET, ENTRIES, PROMPTS
from input_pipeline.test_sets.retrieval_set import CLASSIFICATION, Options, RunData
from tests.test_data import config_of, jpeg
from xlir import data

# ImageNet has 1,000 classes.
SMALL = dataclasses.replace(BABEL_IMAGENET, count=3)
NO_DATA = RunData("", lambda: None)
WORDNET_IDS = ("n01440764", "n01443537", "n15075141")
NAMES = {
    "FR": [[0, 2], ["tanche", "papier {hygiénique}"]],
    "EN": [[0, 1, 2], ["tench", "goldfish", "toilet paper"]],
}


def write_names(folder: pathlib.Path, content=NAMES, prompts=None) -> pathlib.Path:
    folder.mkdir(exist_ok=True)
    (folder / "babel_imagenet.json").write_text(json.dumps(content))
    if prompts is not None:
        (folder / PROMPTS).write_text(json.dumps(prompts))
    return folder


@pytest.fixture
def validation(tmp_path) -> pathlib.Path:
    """Photos in a folder for each class, as ImageNet's validation photos, and other files."""
    folder = tmp_path / "val"
    number = 0
    for place, name in enumerate(reversed(WORDNET_IDS)):
        (folder / name).mkdir(parents=True)
        for _ in range(place + 1):
            number += 1
            file = folder / name / f"ILSVRC2012_val_{number:08d}.JPEG"
            file.write_bytes(jpeg(number))
    (folder / WORDNET_IDS[0] / ".DS_Store").write_bytes(b"x")
    (folder / "LOC_val_solution.csv").write_text("x")
    (folder / "devkit").mkdir()
    return folder


def read(captions: pathlib.Path, images: pathlib.Path, layout=SMALL, **options):
    return layout.read(Options("x", captions=str(captions), images=str(images), **options), NO_DATA)


def test_names_and_folders_are_read(tmp_path, validation):
    """Classes are numbered in the order of their WordNet ids, and may lack a name."""
    folder = write_names(tmp_path / "names", prompts={"FR": ["une photo de {} .", "{}, {}"]})
    found = read(folder, validation)
    assert found.name == "babel_imagenet"
    assert list(found.names) == ["en", "fr"]
    assert found.class_of.tolist() == [0, 0, 0, 1, 1, 2]
    folders = [file.parent.name for file in found.images]
    assert folders == [WORDNET_IDS[number] for number in found.class_of]
    assert found.classes["fr"].tolist() == [0, 2]
    assert found.prompts("fr")[1] == [
        "une photo de papier {hygiénique} .",
        "papier {hygiénique}, papier {hygiénique}",
    ]
    # There are no prompts in this language.
    assert found.prompts("en") == [["tench"], ["goldfish"], ["toilet paper"]]
    bare = read(folder, validation, prompts="names")
    assert (bare.name, bare.prompts("fr")[0]) == ("babel_imagenet-names", ["tanche"])
    assert bare.fingerprint == found.fingerprint

    own = tmp_path / "mine.json"
    own.write_text(json.dumps({"en": ["a photo of a {}"]}))
    own = read(folder, validation, prompts=str(own))
    assert (own.name, own.prompts("en")[0]) == ("babel_imagenet-mine", ["a photo of a tench"])
    assert own.only(["fr"]).prompts("fr")[0] == ["tanche"]
    with pytest.raises(ValueError, match=r"no class names in de, nl; it has names in en fr"):
        own.only(["de", "fr", "nl"])
    assert len(SMALL.photos(Options("x", images=str(validation)), NO_DATA)) == 6


def test_any_folders_are_classes_of_ones_own(tmp_path, validation):
    folder = tmp_path / "pets"
    folder.mkdir()
    (folder / "class_names.json").write_text(json.dumps({"de": [[1, 0], ["Hund", "Katze"]]}))
    (folder / "dog").mkdir()
    (folder / "dog" / "1.jpg").write_bytes(jpeg())
    (validation / WORDNET_IDS[0]).rename(folder / "cat")
    config = base.get_config()
    (found,) = data.test_sets(config, f"class_names:{folder}", task=CLASSIFICATION)
    assert (found.name, found.names) == ("pets-names", {"de": ["Hund", "Katze"]})
    assert found.class_of.tolist() == [0, 0, 0, 1]
    assert found.classes["de"].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "not a JSON object with a field for each language"),
        ({}, "not a JSON object with a field for each language"),
        ({"DE": [0, 1]}, "DE: not a list of class numbers and a list of class names"),
        ({"DE": [[0], []]}, "DE: not a list of class numbers and a list of class names"),
        ({"DE": [[0, 1], ["x"]]}, "DE: 2 class numbers, but 1 class names"),
        ({"DE": [[0, 3], ["x", "y"]]}, "DE: class number 3 is not between 0 and 2"),
        ({"DE": [["0"], ["x"]]}, "DE: class number '0' is not between 0 and 2"),
        ({"DE": [[1, 1], ["x", "y"]]}, "DE: a class number occurs twice"),
        ({"DE": [[0], [" "]]}, "DE: class name ' ' is not a text"),
    ],
)
def test_damaged_names_are_refused(tmp_path, validation, content, message):
    folder = write_names(tmp_path / "names", content)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read(folder, validation)
    assert "babel_imagenet.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_missing_or_damaged_is_named(tmp_path, validation):
    folder = tmp_path / "names"
    with pytest.raises(FileNotFoundError, match=re.escape(BABEL_IMAGENET.origin)):
        read(folder, validation)
    (write_names(folder) / "babel_imagenet.json").write_text("{")
    with pytest.raises(ValueError, match=r"babel_imagenet\.json is not JSON"):
        read(folder, validation)
    write_names(folder, prompts={"FR": ["une photo"]})
    with pytest.raises(ValueError, match=r"FR: prompt 'une photo' has no {}, which"):
        read(folder, validation)
    with pytest.raises(FileNotFoundError, match=r"there is no file nowhere\.json"):
        read(folder, validation, prompts="nowhere.json")
    with pytest.raises(FileNotFoundError, match="there is no folder of photos"):
        read(folder, tmp_path / "nowhere", prompts="names")
    with pytest.raises(ValueError, match=r"has 3 folders .* such as n01440764, not 1,000"):
        read(folder, validation, layout=BABEL_IMAGENET)
    for file in (validation / WORDNET_IDS[1]).iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match=f"1 of 3 classes have no photos.*{WORDNET_IDS[1]}"):
        read(folder, validation, prompts="names")


def test_sets_of_a_run_are_of_one_task_and_kept_out_of_training(tmp_path, validation, monkeypatch):
    """A photo of the test set is in the training split under the same name."""
    monkeypatch.setenv("XLIR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(ENTRIES, "babel_imagenet", SMALL.entry())
    folder = tmp_path / "train"
    folder.mkdir()
    entries = []
    photo = "ILSVRC2012_val_00000001.JPEG"
    for name, split in ((photo, "train"), ("7.jpg", "train"), ("8.jpg", "val")):
        (folder / name).write_bytes(jpeg(len(entries)))
        entries.append({"filename": name, "split": split, "sentences": [{"raw": name}]})
    (folder / "dataset_x.json").write_text(json.dumps({"images": entries}))
    write_names(tmp_path / "names")
    fields = {"captions": str(tmp_path / "names"), "images": str(validation)}
    test_sets = {"a": base.test_set("split", split="val")}
    config = config_of(folder, "captions", evals=test_sets)
    assert len(data.training_photos(config)) == 2
    with pytest.raises(ValueError, match=r"config\.evals has no test set for classification"):
        data.test_sets(config, task=CLASSIFICATION)
    test_sets["b"] = base.test_set("babel_imagenet", prompts="names", **fields)
    config = config_of(folder, "captions", evals=test_sets)
    assert data.training_photos(config).filenames == ["7.jpg"]
    assert [one.name for one in data.own_test_sets(config)] == ["babel_imagenet-names", "x-val"]
    assert [one.name for one in data.test_sets(config)] == ["x-val"]
    (found,) = data.test_sets(config, task=CLASSIFICATION)
    assert found.name == "babel_imagenet-names"
    with pytest.raises(ValueError, match="the test set 'b' needs --task=classification"):
        data.test_sets(config, "b")
    with pytest.raises(ValueError, match="the test set 'a' needs --task=retrieval"):
        data.test_sets(config, "a", task=CLASSIFICATION)


def test_the_published_file(tmp_path, validation):
    """CLIP_benchmark's package has a copy of the published names and prompts."""
    spec = importlib.util.find_spec("clip_benchmark")
    if spec is None:
        pytest.skip("needs clip-benchmark: pip install --no-deps clip-benchmark==1.6.2")
    folder = pathlib.Path(spec.origin).parent / "datasets"
    images = tmp_path / "imagenet"
    for number in range(1000):
        (images / f"n{number:08d}").mkdir(parents=True)
        (images / f"n{number:08d}" / "x.JPEG").touch()
    found = read(folder, images, layout=BABEL_IMAGENET)
    assert found.name == "babel_imagenet"
    assert len(found.names) == 93
    counts = {language: len(found.names[language]) for language in ("en", "de", "om", "zh")}
    assert counts == {"en": 1000, "de": 738, "om": 18, "zh": 885}
    assert set(found.names) - set(found.templates) == {"br", "fy", "la"}
    assert {len(templates) for templates in found.templates.values()} == {80}
