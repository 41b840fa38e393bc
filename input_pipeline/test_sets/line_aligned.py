"""Multilingual captions in XTD10's layout, and their photos.

A folder holds `test_image_names.txt` and, for each language, `test_captions_LANG.txt` (in XTD10:
`test_1kcaptions_LANG.txt`). Line i of each file belongs to the same photo. The files may also be in
subfolders, as in XTD10, which has them in XTD10/, MIC/ and STAIR/.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Sequence

import numpy as np

from input_pipeline.cache import fingerprint
from input_pipeline.lines import english_first, read_lines
from input_pipeline.test_sets.retrieval_set import Options, RetrievalSet, RunData

NAMES_FILE = "test_image_names.txt"
CAPTIONS_FILE = re.compile(r"test_(?:1k)?captions_([A-Za-z0-9_-]+)\.txt")
# XTD10 uses the country code for Japanese.
ALIASES = {"jp": "ja"}


@dataclasses.dataclass(frozen=True)
class LineAligned:
    """The names of photos, and one caption per photo in each language.

    Attributes:
      name: name of the set.
      filenames: names of the photos.
      captions: language -> captions, in the order of `filenames`; English comes first.
      dropped: language -> rows of the photos whose caption is left out of `captions`.
    """

    name: str
    filenames: list[str]
    captions: dict[str, list[str]]
    dropped: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    def rows(self, language: str) -> np.ndarray:
        """The row of each caption's photo, for a language; int64."""
        return np.delete(np.arange(len(self.filenames)), list(self.dropped.get(language, ())))


def read(folder: str | os.PathLike) -> LineAligned:
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
    return LineAligned(os.path.basename(os.path.abspath(folder)), names, english_first(lines))


def text_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """All files test_*.txt in a folder and in its subfolders."""
    return sorted([*folder.glob("test_*.txt"), *folder.glob("*/test_*.txt")])


def find_photos(captions: LineAligned, folder: str | os.PathLike) -> list[pathlib.Path]:
    """Finds the photos of a test set below a folder; returns them in the order of the set.

    Raises:
      FileNotFoundError: the folder or some of the photos are missing.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder of photos {folder}")
    wanted = set(captions.filenames)
    found: dict[str, pathlib.Path] = {}
    for place, _, names in os.walk(folder):
        for name in wanted.intersection(names):
            found.setdefault(name, pathlib.Path(place) / name)
    missing = [name for name in captions.filenames if name not in found]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(wanted)} photos of {captions.name} are not below "
            f"{folder}: {_first(missing)}"
        )
    return [found[name] for name in captions.filenames]


def with_photos_of_folder(captions: LineAligned, folder: str | os.PathLike) -> RetrievalSet:
    """The test set whose photos are below a folder.

    Raises:
      FileNotFoundError: the folder or some of the photos are missing.
    """
    files = find_photos(captions, folder)
    identity = [
        (str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files
    ]
    return _retrieval_set(captions, files, fingerprint(identity))


def with_photos_of_run(captions: LineAligned, options: Options, run: RunData) -> RetrievalSet:
    """The test set with photos from the run's data set, found by name in all of its splits.

    Raises:
      FileNotFoundError: the data set is missing, or does not have some of the photos.
    """
    data = run.open()
    source = data.source("+".join(data.splits))
    missing = sorted(set(captions.filenames) - set(source.filenames))
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(captions.filenames)} photos of {captions.name} are not in "
            f"the prepared {data.name} ({_first(missing)}): name a folder that holds "
            "them, at any depth, with --images=DIR (to train: "
            f"--config.evals.{options.name}.images=DIR)"
        )
    photos = source.select(captions.filenames)
    return _retrieval_set(captions, photos.images, photos.fingerprint)


def _first(names: Sequence[str]) -> str:
    """The first three names, and whether there are more."""
    return ", ".join([*names[:3], *(["..."] if len(names) > 3 else [])])


def _retrieval_set(captions: LineAligned, images: Sequence, fingerprint: str) -> RetrievalSet:
    rows = {language: captions.rows(language) for language in captions.captions}
    return RetrievalSet(captions.name, images, captions.captions, rows, fingerprint)
