"""Multilingual captions in XTD10's layout, and where their photos are.

A folder holds `test_image_names.txt` and, for each language, `test_captions_LANG.txt` (or XTD10's
own `test_1kcaptions_LANG.txt`): line i of each file belongs to the same photo. The folder may also
be XTD10 as published, where the files lie in XTD10/, MIC/ and STAIR/.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Sequence

import numpy as np

from input_pipeline.cache import fingerprint
from input_pipeline.test_sets.retrieval_set import Options, RetrievalSet, RunData

NAMES_FILE = "test_image_names.txt"
CAPTIONS_FILE = re.compile(r"test_(?:1k)?captions_([A-Za-z0-9_-]+)\.txt")
# XTD10 calls Japanese by its country's code.
ALIASES = {"jp": "ja"}


@dataclasses.dataclass(frozen=True)
class LineAligned:
    """Photos by name, and one caption for each in every language.

    Attributes:
      name: of the set.
      filenames: of the photos.
      captions: language -> captions, in the order of `filenames`; English comes first.
      dropped: language -> rows whose caption is left out of `captions`.
    """

    name: str
    filenames: list[str]
    captions: dict[str, list[str]]
    dropped: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    def rows(self, language: str) -> np.ndarray:
        """The photo of each caption of a language, int64."""
        return np.delete(np.arange(len(self.filenames)), list(self.dropped.get(language, ())))


def read(folder: str | os.PathLike) -> LineAligned:
    """Reads a folder in XTD10's layout.

    Line ends may be CRLF or LF, a byte order mark and a missing final newline are fine. A line of
    a caption file may be empty only at the file's end.

    Raises:
      FileNotFoundError: the folder, its list of names, or every caption file is missing.
      ValueError: files of differing line counts, an empty line, a language that stands there
        twice, or a photo that does.
    """
    folder = pathlib.Path(folder)
    files = text_files(folder)
    lists = [file for file in files if file.name == NAMES_FILE]
    if len(lists) != 1:
        found = f"{len(lists)} of them" if lists else "none"
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
        raise ValueError(f"the files of {folder} have differing numbers of lines: {found}")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{lists[0]} names {twice} twice")
    return LineAligned(os.path.basename(os.path.abspath(folder)), names, english_first(lines))


def text_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of a test set, and others of the name test_*.txt."""
    return sorted([*folder.glob("test_*.txt"), *folder.glob("*/test_*.txt")])


def english_first(lines: dict[str, list[str]]) -> dict[str, list[str]]:
    """The same, English first and the other languages by their codes."""
    languages = sorted(lines, key=lambda language: (language != "en", language))
    return {language: lines[language] for language in languages}


def read_lines(file: pathlib.Path) -> list[str]:
    """The lines of a file, split at LF and CRLF only: captions may hold other separators."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error})") from error
    lines = [line.removesuffix("\r").strip() for line in text.rstrip("\r\n").split("\n")]
    if "" in lines:
        raise ValueError(f"{file}: line {lines.index('') + 1} is empty")
    return lines


def find_photos(captions: LineAligned, folder: str | os.PathLike) -> list[pathlib.Path]:
    """The photos of a test set below a folder, in its order.

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
            f"{folder}: {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
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
    """The test set whose photos are, by name, in any splits of the run's data set.

    Raises:
      FileNotFoundError: some are not there, or the data set is not at hand.
    """
    data = run.open()
    source = data.source("+".join(data.splits))
    missing = sorted(set(captions.filenames) - set(source.filenames))
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(captions.filenames)} photos of {captions.name} are not in "
            f"the prepared {data.name} ({', '.join(missing[:3])}, ...): name a folder that holds "
            "them, at any depth, with --images=DIR (to train: "
            f"--config.evals.{options.name}.images=DIR)"
        )
    photos = source.select(captions.filenames)
    return _retrieval_set(captions, photos.images, photos.fingerprint)


def _retrieval_set(captions: LineAligned, images: Sequence, fingerprint: str) -> RetrievalSet:
    rows = {language: captions.rows(language) for language in captions.captions}
    return RetrievalSet(captions.name, images, captions.captions, rows, fingerprint)
