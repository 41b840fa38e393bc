"""Vocabularies of the repository and of files, the rule for nouns, and labels of photos."""

import json
import re

import numpy as np
import pytest

from input_pipeline import labels, nouns, vocabularies
from input_pipeline.datasets import emoji

COCO = """person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,
stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,
backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,
baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,
banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,
potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,
oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"""
SCRIPTS = {"ja": r"[぀-ヿ一-鿿]+", "ko": r"[가-힣 ]+", "ru": r"[А-Яа-яё -]+", "zh": r"[一-鿿T]+"}


@pytest.mark.parametrize(
    ("name", "count", "languages"),
    [
        ("coco", 80, ["en", "de", "es", "fr", "it", "ja", "ko", "pl", "ru", "tr", "zh"]),
        ("flickr8k", 200, ["en", "de", "es", "fr", "zh"]),
        ("emoji", 1914, list(emoji.LANGUAGES)),
    ],
)
def test_vocabularies_of_the_repository(name, count, languages):
    vocabulary = vocabularies.load(name)
    assert vocabulary.languages() == languages
    assert len(vocabulary.tags) == len(set(vocabulary.tags)) == count
    for language in languages:
        names = vocabulary.names_in(language)
        assert len(names) == count
        assert all(of_tag and all(one == one.strip() != "" for one in of_tag) for of_tag in names)
        if name != "emoji":
            # No two tags share a name, as loading checks.
            flat = [one.casefold() for of_tag in names for one in of_tag]
            assert len(flat) == len(set(flat))
            if language in SCRIPTS:
                assert [one for one in flat if not re.fullmatch(SCRIPTS[language], one, re.I)] == []
    assert [first for first, *_ in vocabulary.names_in("en")] == vocabulary.tags


def test_coco_tags_are_its_categories_in_order_and_japanese_has_two_codes():
    vocabulary = vocabularies.load("coco")
    assert vocabulary.tags == COCO.replace("\n", "").split(",")
    assert vocabulary.names_in("jp") == vocabulary.names_in("ja")


def test_flickr8k_is_what_the_rule_finds_in_its_training_captions(shared):
    content = json.loads((shared / "flickr8k" / "dataset_flickr8k.json").read_text())
    captions = [
        sentence["raw"]
        for image in content["images"]
        if image["split"] == "train"
        for sentence in image["sentences"]
    ]
    assert nouns.frequent_nouns(captions, 200) == vocabularies.load("flickr8k").tags


def test_the_rule_tells_nouns_from_adjectives_and_verbs():
    captions = [
        "A brown dog is running on the grass .",
        "Two brown dogs run in the grass .",
        "The dog runs .",
        "Two women are running with a dog in a picture .",
        "A woman runs and runs .",
        "A building .",
    ]
    assert nouns.frequent_nouns(captions, 9) == ["dog", "grass", "woman", "building"]
    assert nouns.frequent_nouns(captions, 2) == ["dog", "grass"]
    assert nouns.frequent_nouns([], 3) == []


@pytest.mark.parametrize(
    ("word", "one"),
    [
        *(("dogs", "dog"), ("buses", "bus"), ("men", "man"), ("babies", "baby"), ("dog", "dog")),
        *(("glass", "glass"), ("his", "his"), ("knives", "knife"), ("cats", "cats")),
    ],
)
def test_singular(word, one):
    assert nouns.singular(word, {"dog", "bus", "glas", "hi", "baby", "glass"}) == one


def write(folder, text):
    file = folder / "words.txt"
    file.write_bytes(text.encode())
    return file


def test_a_list_goes_with_any_language(tmp_path):
    vocabulary = vocabularies.load(write(tmp_path, "\ufeffHund|Köter\r\n\r\nKatze\r\n"))
    assert (vocabulary.name, vocabulary.tags) == ("words", ["Hund", "Katze"])
    assert vocabulary.languages() == []
    assert vocabulary.names_in("de") == vocabulary.names_in("fr") == [("Hund", "Köter"), ("Katze",)]


def test_a_table_has_its_languages(tmp_path):
    vocabulary = vocabularies.load(write(tmp_path, "en\tde\ncell phone\tHandy | Mobiltelefon\n"))
    assert vocabulary.names_in("de") == [("Handy", "Mobiltelefon")]
    with pytest.raises(ValueError, match="words has no language 'fr'; it has en de"):
        vocabulary.names_in("fr")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dog\ncat\nDog\n", r"'Dog' occurs twice, in lines 1 and 3"),
        ("dog|dog\n", r"'dog' occurs twice, in lines 1 and 1"),
        ("en\tde\ndog\tHund\nhound\tHund|Jagdhund\n", r"'Hund' of 'de' .* lines 2 and 3"),
        ("en\tde\ndog\n", "line 2 has 1 columns, expected 2"),
        ("en\tde\ndog\t\n", "line 2 has an empty name of 'de'"),
        ("dog||cat\n", "line 1 has an empty name"),
        ("dog\tHund\n", "line 1 should name the languages"),
        ("de\ten\nHund\tdog\n", "English first"),
        ("en\tjp\tja\ndog\ta\tb\n", "names a language twice"),
        ("", "holds no tags"),
        ("en\tde\n", "holds no tags"),
    ],
)
def test_faults_of_a_file_name_it_and_the_line(tmp_path, text, message):
    file = write(tmp_path, text)
    with pytest.raises(ValueError, match=message) as raised:
        vocabularies.load(file)
    assert str(raised.value).startswith(str(file))
    assert "\n" not in str(raised.value)


def test_what_is_no_vocabulary(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no vocabulary 'cocoa': .* coco, flickr8k, emoji"):
        vocabularies.load("cocoa")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="binary is not UTF-8"):
        vocabularies.load(tmp_path / "binary")


def test_mentions_in_captions():
    captions = [
        ["Two dogs.", "A hot dog!"],
        ["A doghouse and hot, dogged people"],
        ["FIRE HYDRANTS near buses"],
        [],
    ]
    tags = ["dog", "hot dog", "person", "fire hydrant", "bus"]
    found = labels.mentioned(captions, tags)
    expected = [[1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(found, np.array(expected, bool))


@pytest.fixture
def instances(tmp_path):
    """Two of COCO's files: three photos, one without an object, one with a crowd."""
    categories = [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}, {"id": 90, "name": "x"}]
    for name, images, annotations in (
        ("train2014", [9, 25], [(9, 18, 0), (9, 18, 0), (9, 90, 0)]),
        ("val2014", [42, 73], [(42, 1, 1)]),
    ):
        content = {
            "images": [{"id": image_id} for image_id in images],
            "categories": categories,
            "annotations": [
                {"image_id": image_id, "category_id": category, "iscrowd": crowd}
                for image_id, category, crowd in annotations
            ],
        }
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))
    return labels.instance_files(tmp_path)


def test_instances_of_coco(instances):
    found = labels.instances(instances, np.array([42, 9, 25]), ["dog", "person"])
    np.testing.assert_array_equal(found, [[False, True], [True, False], [False, False]])


def test_faults_of_instances(instances, tmp_path):
    with pytest.raises(ValueError, match=r"1 of 2 photos are not in instances_train2014\.json, "):
        labels.instances(instances, np.array([9, 10]), ["dog"])
    with pytest.raises(ValueError, match="has no category wolf"):
        labels.instances(instances, np.array([9]), ["dog", "wolf"])
    instances[0].write_text("{}")
    with pytest.raises(ValueError, match="is not COCO's instances"):
        labels.instances(instances, np.array([9]), ["dog"])
