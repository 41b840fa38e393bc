"""Published test sets: what is known about them, and the check of their files against it.

Their files come from the publisher; nothing is downloaded. `config.evals.NAME.captions` or
`--test_set=TYPE:FOLDER` names the folder of the captions, by default the one with the type's name
in the run's data folder. The photos are in `images`, or below the folder of the captions.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

from input_pipeline.lines import read_lines
from input_pipeline.test_sets import captioned_photos
from input_pipeline.test_sets.captioned_photos import CaptionedPhotos
from input_pipeline.test_sets.retrieval_set import Entry, Options, RetrievalSet, RunData

# Who wrote the captions.
WRITTEN = "written by people"
TRANSLATED = "translated by people"
MACHINE = "translated by a machine"


@dataclasses.dataclass(frozen=True)
class Published:
    """A published test set.

    Attributes:
      name: its type in `config.evals`, which is also the name of its results.
      title: its name in messages.
      read: reads the captions in a folder.
      languages: the languages of the captions; empty: any of the publisher's.
      captions: number of captions: of each language, or if `in_all` of all languages together; 0:
        not checked.
      in_all: see `captions`.
      photos: number of photos; 0: not checked.
      authors: who wrote the captions.
      origin: where the files come from.
      terms: the licence.
    """

    name: str
    title: str
    read: Callable[[pathlib.Path], CaptionedPhotos]
    authors: str
    origin: str
    terms: str
    languages: tuple[str, ...] = ()
    photos: int = 0
    captions: int = 0
    in_all: bool = False

    def entry(self) -> Entry:
        """The entry in the registry of test sets."""
        facts = {"authors": self.authors, "origin": self.origin, "terms": self.terms}
        return Entry(self._retrieval_set, self._photos, **facts)

    def checked(self, folder: pathlib.Path) -> CaptionedPhotos:
        """The captions in a folder.

        Raises:
          FileNotFoundError: the folder or one of its files is missing.
          ValueError: a file can't be read, or the numbers are not those that were published.
        """
        if not folder.is_dir():
            raise FileNotFoundError(
                f"there is no folder {folder} with {self.title}'s captions; get them from "
                f"{self.origin}"
            )
        found = self.read(folder)
        if wrong := self._differences(found):
            raise ValueError(f"{folder} is not the published {self.title}: {wrong}")
        return found

    def _differences(self, found: CaptionedPhotos) -> str:
        """What differs from the published numbers; empty if nothing does."""
        if self.languages and (absent := set(self.languages) - set(found.captions)):
            return f"it has no captions in {', '.join(sorted(absent))}"
        if self.photos and len(found.filenames) != self.photos:
            return f"it has {len(found.filenames):,} photos, not {self.photos:,}"
        counts = {language: len(texts) for language, texts in found.captions.items()}
        if self.in_all:
            counts = {"": sum(counts.values())}
        for language, count in counts.items():
            if self.captions and count != self.captions:
                where = f" in {language}" if language else ""
                return f"it has {count:,} captions{where}, not {self.captions:,}"
        return ""

    def _retrieval_set(self, options: Options, run: RunData) -> RetrievalSet:
        folder = self._folder(options, run)
        return captioned_photos.with_photos_of_folder(
            self.checked(folder), options.images or folder
        )

    def _photos(self, options: Options, run: RunData) -> Collection[str]:
        return self.checked(self._folder(options, run)).filenames

    def _folder(self, options: Options, run: RunData) -> pathlib.Path:
        return pathlib.Path(options.captions or pathlib.Path(run.folder or "PATH") / self.name)


def json_lines(file: pathlib.Path) -> Iterator[dict]:
    """The objects of a file with one JSON object per line.

    Raises:
      FileNotFoundError: the file is missing.
      ValueError: a line is not a JSON object.
    """
    for number, line in enumerate(read_lines(file), start=1):
        try:
            content = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}: line {number} is not JSON ({error})") from error
        if not isinstance(content, dict):
            raise ValueError(f"{file}: line {number} is not a JSON object")
        yield content


def field(content: dict, name: str, kind: type, file: pathlib.Path) -> Any:
    """A field of a JSON object; raises ValueError if it is missing or of another type."""
    value = content.get(name)
    if not isinstance(value, kind):
        raise ValueError(f"{file} has an entry without a {name!r}: {str(content)[:80]}")
    return value
