"""Multilingual test sets in XTD10's layout.

Aggarwal and Kale 2020, "Towards Zero-shot Cross-lingual Image Retrieval",
https://github.com/adobe-research/Cross-lingual-Test-Dataset-XTD10.

A folder holds `test_image_names.txt` and, for each language, `test_captions_LANG.txt` (or XTD10's
own `test_1kcaptions_LANG.txt`): line i of each file belongs to the same photo. The folder may also
be XTD10 as published, where the files lie in XTD10/, MIC/ and STAIR/.
"""

import dataclasses
import os
import pathlib
import re

NAMES_FILE = "test_image_names.txt"
CAPTIONS_FILE = re.compile(r"test_(?:1k)?captions_([A-Za-z0-9_-]+)\.txt")
# XTD10 calls Japanese by its country's code.
ALIASES = {"jp": "ja"}


@dataclasses.dataclass(frozen=True)
class TestSet:
    """Photos by name, and one caption for each in every language.

    Attributes:
      name: of the set.
      filenames: of the photos.
      captions: language -> captions, in the order of `filenames`; English comes first.
    """

    __test__ = False  # not a test case, whatever pytest takes the name for

    name: str
    filenames: list[str]
    captions: dict[str, list[str]]


def read_test_set(folder: str | os.PathLike) -> TestSet:
    """Reads a folder in XTD10's layout.

    Line ends may be CRLF or LF, a byte order mark and a missing final newline are fine. A line of
    a caption file may be empty only at the file's end.

    Raises:
      FileNotFoundError: the folder, its list of names, or every caption file is missing.
      ValueError: files of differing line counts, an empty line, a language that stands there
        twice, or a photo that does.
    """
    folder = pathlib.Path(folder)
    files = sorted([*folder.glob("test_*.txt"), *folder.glob("*/test_*.txt")])
    lists = [file for file in files if file.name == NAMES_FILE]
    if len(lists) != 1:
        found = f"{len(lists)} of them" if lists else "none"
        raise FileNotFoundError(f"{folder} should hold one {NAMES_FILE}, found {found}")
    names, lines = _lines(lists[0]), {}
    counts = {lists[0]: len(names)}
    for file in files:
        match = CAPTIONS_FILE.fullmatch(file.name)
        if match:
            language = ALIASES.get(match[1].lower(), match[1].lower())
            if language in lines:
                raise ValueError(f"{folder} holds two caption files of language {language!r}")
            lines[language] = _lines(file)
            counts[file] = len(lines[language])
    if not lines:
        raise FileNotFoundError(f"{folder} holds no test_captions_LANG.txt")
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{file.name} {count}" for file, count in counts.items())
        raise ValueError(f"the files of {folder} have differing numbers of lines: {found}")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{lists[0]} names {twice} twice")
    languages = sorted(lines, key=lambda language: (language != "en", language))
    return TestSet(
        os.path.basename(os.path.abspath(folder)),
        names,
        {language: lines[language] for language in languages},
    )


def find_photos(test_set: TestSet, folder: str | os.PathLike) -> list[pathlib.Path]:
    """The photos of a test set below a folder, in its order.

    Raises:
      FileNotFoundError: the folder or some of the photos are missing.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder of photos {folder}")
    wanted = set(test_set.filenames)
    found: dict[str, pathlib.Path] = {}
    for place, _, names in os.walk(folder):
        for name in wanted.intersection(names):
            found.setdefault(name, pathlib.Path(place) / name)
    missing = [name for name in test_set.filenames if name not in found]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(wanted)} photos of {test_set.name} are not below "
            f"{folder}: {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
        )
    return [found[name] for name in test_set.filenames]


def _lines(file: pathlib.Path) -> list[str]:
    """The lines of a file, split at LF and CRLF only: captions may hold other separators."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error})") from error
    lines = [line.removesuffix("\r").strip() for line in text.rstrip("\r\n").split("\n")]
    if "" in lines:
        raise ValueError(f"{file}: line {lines.index('') + 1} is empty")
    return lines
