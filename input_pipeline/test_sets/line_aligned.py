"""Multilingual captions in XTD10's layout.

A folder holds `test_image_names.txt` and, for each language, `test_captions_LANG.txt` (in XTD10:
`test_1kcaptions_LANG.txt`). Line i of each file belongs to the same photo. The files may also be in
subfolders, as in XTD10, which has them in XTD10/, MIC/ and STAIR/.
"""

import os
import pathlib
import re

from input_pipeline.lines import read_lines
from input_pipeline.test_sets.captioned_photos import CaptionedPhotos, from_pairs

NAMES_FILE = "test_image_names.txt"
CAPTIONS_FILE = re.compile(r"test_(?:1k)?captions_([A-Za-z0-9_-]+)\.txt")
# XTD10 uses the country code for Japanese.
ALIASES = {"jp": "ja"}


def read(folder: str | os.PathLike) -> CaptionedPhotos:
    """Reads a folder in XTD10's layout.

    Lines may end in CRLF or LF. A byte order mark is allowed, a final newline is not required, and
    empty lines are allowed at a file's end only.

    Raises:
      FileNotFoundError: the folder, its list of names, or every caption file is missing.
      ValueError: files have different numbers of lines, a line is empty, or a language or a photo
        occurs twice.
    """
    folder = pathlib.Path(folder)
    files = text_files(folder)
    lists = [file for file in files if file.name == NAMES_FILE]
    if len(lists) != 1:
        found = str(len(lists)) if lists else "none"
        raise FileNotFoundError(f"{folder} should hold one {NAMES_FILE}, found {found}")
    names, lines = read_lines(lists[0]), {}
    counts = {lists[0]: len(names)}
    for file in files:
        match = CAPTIONS_FILE.fullmatch(file.name)
        if match:
            language = ALIASES.get(match[1].lower(), match[1].lower())
            if language in lines:
                raise ValueError(f"{folder} holds two caption files of language {language!r}")
            lines[language] = read_lines(file)
            counts[file] = len(lines[language])
    if not lines:
        raise FileNotFoundError(f"{folder} holds no test_captions_LANG.txt")
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{file.name} {count}" for file, count in counts.items())
        raise ValueError(f"the files of {folder} have different numbers of lines: {found}")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{lists[0]} names {twice} twice")
    name = os.path.basename(os.path.abspath(folder))
    pairs = {code: zip(names, of_one, strict=True) for code, of_one in lines.items()}
    return from_pairs(name, pairs, names)


def text_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """All files test_*.txt in a folder and in its subfolders."""
    return sorted([*folder.glob("test_*.txt"), *folder.glob("*/test_*.txt")])
