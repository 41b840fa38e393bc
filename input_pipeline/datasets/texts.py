"""Line-aligned texts in English and other languages, without photos: parallel corpora.

    train.en  train.de  train.ja  val.en  val.de  val.ja

A file is named SPLIT.LANGUAGE, as Moses and OPUS name theirs (https://opus.nlpl.eu): in
`Tatoeba.de-en.de`, the split is `Tatoeba.de-en`. Line i of all files of a split means the same.
English is required, because the teacher of a run reads it; other languages are optional.
"""

import os
import pathlib
import re
from collections.abc import Callable

import numpy as np
from jaxtyping import Int

from input_pipeline.cache import fingerprint
from input_pipeline.datasets.source import DataSet
from input_pipeline.files import digest
from input_pipeline.lines import english_first, read_lines

# A language code such as de, fil or zh_CN.
FILE = re.compile(r"(.+)\.([a-z]{2,3}(?:[_-][A-Za-z0-9]+)*)")


class Texts:
    """The lines of one or more splits.

    A row is a line. Lines with the same English text have the same id, as captions of one photo do.

    Args:
      folder: holds the files.
      splits: names of splits, joined with a plus; they may have different languages.

    Attributes:
      english: the English text of each row.
      images: none.
      captions: the texts of each row in all languages of its split; English comes first.
      image_ids: the id of each row, int64.
      fingerprint: identifies the texts.

    Raises:
      FileNotFoundError: a split has no English file.
      ValueError: a file is not UTF-8 or has an empty line, or files of a split have different
        numbers of lines.
    """

    images = ()

    def __init__(self, folder: pathlib.Path, splits: str):
        self._splits = [_read(folder, name) for name in splits.split("+")]
        self.english = [line for lines in self._splits for line in lines["en"]]
        self.captions = [
            list(texts) for lines in self._splits for texts in zip(*lines.values(), strict=True)
        ]
        seen: dict[str, int] = {}
        ids = [seen.setdefault(line, len(seen)) for line in self.english]
        self.image_ids = np.array(ids, np.int64)
        self.fingerprint = fingerprint(
            [
                {language: digest("\n".join(texts)) for language, texts in lines.items()}
                for lines in self._splits
            ]
        )

    def __len__(self) -> int:
        return len(self.english)

    def by_language(self) -> dict[str, tuple[list[str], Int[np.ndarray, " texts"]]]:
        """Language -> its texts, and the row of each; English comes first."""
        texts: dict[str, list[str]] = {}
        rows: dict[str, list[np.ndarray]] = {}
        start = 0
        for lines in self._splits:
            count = len(lines["en"])
            for language, own in lines.items():
                texts.setdefault(language, []).extend(own)
                rows.setdefault(language, []).append(start + np.arange(count))
            start += count
        return {
            language: (own, np.concatenate(rows[language]))
            for language, own in english_first(texts).items()
        }


class ParallelTexts:
    """A folder of line-aligned texts as a data set; see `source.Opened`."""

    keeps_order, translations = True, None

    def __init__(self, folder: str):
        self.folder = pathlib.Path(folder)
        self.name = os.path.basename(os.path.abspath(folder))
        self.splits = [name for name, languages in _languages(self.folder).items() if languages]

    def source(
        self, splits: str, exclude: Callable[[str], object] = lambda filename: False
    ) -> Texts:
        """The lines of some splits; no photo is there to exclude."""
        return Texts(self.folder, splits)

    def filed_under(self, split: str) -> str:
        """The name of results on a split."""
        return f"{self.name}-{split}"


def _languages(folder: pathlib.Path) -> dict[str, list[str]]:
    """Split -> its languages, for the splits that have an English file."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} (config.data.dir)")
    found: dict[str, list[str]] = {}
    for file in sorted(folder.iterdir()):
        if (match := FILE.fullmatch(file.name)) and file.is_file():
            found.setdefault(match[1], []).append(match[2])
    return {split: languages for split, languages in found.items() if "en" in languages}


def _read(folder: pathlib.Path, split: str) -> dict[str, list[str]]:
    """Language -> the lines of a split; English comes first."""
    known = _languages(folder)
    if split not in known:
        have = ", ".join(sorted(known)) or "none"
        raise FileNotFoundError(
            f"{folder} holds no {split}.en, the English lines of the split {split!r} "
            f"(splits with English lines: {have})"
        )
    lines = {language: read_lines(folder / f"{split}.{language}") for language in known[split]}
    if len(set(map(len, lines.values()))) > 1:
        found = ", ".join(f"{split}.{language} {len(own)}" for language, own in lines.items())
        raise ValueError(f"the files of {folder} have different numbers of lines: {found}")
    return english_first(lines)


def _open(folder: str, annotations: str) -> ParallelTexts:
    return ParallelTexts(folder)


DATA_SET = DataSet(_open)
