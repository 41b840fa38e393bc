"""Babel-ImageNet: names of ImageNet's 1,000 classes in 93 languages, for zero-shot classification.

Geigle et al. 2024, https://arxiv.org/abs/2306.08658, https://github.com/gregor-ge/Babel-ImageNet.

`babel_imagenet.json` maps the code of a language, in upper case, to two lists of equal length: the
numbers of the classes that have a name in it, and these names. `babel_imagenet-298.json` has the
same form and more languages. `nllb_dist13b_prompts.json` maps a code to 80 prompts, in which {}
stands for the name; they were translated by a machine.

The photos are ImageNet's (ILSVRC 2012), by default its 50,000 validation photos, in a folder for
each class named by its WordNet id, such as n01440764. The number of a class is its place among
these 1,000 names in order, from 0.

The type `class_names` is any folder in this layout: its names are in `class_names.json`, and any
folders, in the order of their names, are the classes.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from input_pipeline.cache import fingerprint
from input_pipeline.lines import english_first
from input_pipeline.test_sets.classification_set import ClassificationSet
from input_pipeline.test_sets.retrieval_set import CLASSIFICATION, Entry, Options, RunData

PROMPTS = "nllb_dist13b_prompts.json"
# The value of `Options.prompts` for names without prompts.
NAMES = "names"


@dataclasses.dataclass(frozen=True)
class Layout:
    """A folder of class names, and the folders of the classes' photos.

    Attributes:
      type: its type in `config.evals`.
      files: the file of the names; the first that exists.
      folder: what the folder of a class is called, as a regular expression.
      example: a name that `folder` matches, for messages.
      count: the number of classes; 0: any.
      authors, origin, terms: as in `Entry`.
    """

    type: str
    files: tuple[str, ...]
    folder: str
    example: str
    count: int = 0
    authors: str = ""
    origin: str = ""
    terms: str = ""

    def entry(self) -> Entry:
        """The entry in the registry of test sets."""
        facts = {"authors": self.authors, "origin": self.origin, "terms": self.terms}
        return Entry(self.read, self.photos, task=CLASSIFICATION, **facts)

    def read(self, options: Options, run: RunData) -> ClassificationSet:
        """The test set.

        Raises:
          FileNotFoundError: a folder or a file is missing, or a class has no photos.
          ValueError: a file is not as described above, or the folders are not the classes.
        """
        folder = self._names_folder(options, run)
        photos = self._photos(options, run)
        classes, names = self._names(folder, len(photos))
        templates, source = self._templates(options, folder)
        images = [photo for of_class in photos for photo in of_class]
        identity = [
            (str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in images
        ]
        return ClassificationSet(
            name=(self.type if self.count else folder.resolve().name) + source,
            images=images,
            class_of=np.repeat(np.arange(len(photos)), [len(of_class) for of_class in photos]),
            classes=classes,
            names=names,
            templates=templates,
            fingerprint=fingerprint(identity),
        )

    def photos(self, options: Options, run: RunData) -> Collection[str]:
        """The names of the photos' files."""
        return [photo.name for of_class in self._photos(options, run) for photo in of_class]

    def _names_folder(self, options: Options, run: RunData) -> pathlib.Path:
        return pathlib.Path(options.captions or pathlib.Path(run.folder or "PATH") / self.type)

    def _photos(self, options: Options, run: RunData) -> list[list[pathlib.Path]]:
        """The photos of each class."""
        folder = pathlib.Path(options.images or self._names_folder(options, run))
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder of photos {folder}")
        places = sorted(
            place
            for place in folder.iterdir()
            if re.fullmatch(self.folder, place.name) and place.is_dir()
        )
        if len(places) != self.count if self.count else len(places) < 2:
            raise ValueError(
                f"{folder} has {len(places):,} folders of photos with names such as "
                f"{self.example}, not {f'{self.count:,}' if self.count else 'two or more'}: name "
                "the folder that holds one folder for each class with --images=DIR"
            )
        photos = [
            sorted(file for file in place.iterdir() if not file.name.startswith("."))
            for place in places
        ]
        if empty := [place for place, files in zip(places, photos, strict=True) if not files]:
            raise FileNotFoundError(
                f"{len(empty)} of {len(places):,} classes have no photos, such as {empty[0]}"
            )
        return photos

    def _names(
        self, folder: pathlib.Path, count: int
    ) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
        """Language -> the classes with a name in it, and their names."""
        file = next((folder / name for name in self.files if (folder / name).is_file()), None)
        if file is None:
            source = f"; get it from {self.origin}" if self.origin else ""
            raise FileNotFoundError(f"there is no {' or '.join(self.files)} in {folder}{source}")
        content = english_first(_languages(file, lambda value: _problem_of_names(value, count)))
        classes = {language: np.array(numbers) for language, (numbers, _) in content.items()}
        return classes, {language: names for language, (_, names) in content.items()}

    def _templates(
        self, options: Options, folder: pathlib.Path
    ) -> tuple[dict[str, list[str]], str]:
        """Language -> prompts, and what the results' name has for prompts that are not usual."""
        usual = folder / PROMPTS
        if options.prompts == NAMES or not (options.prompts or usual.is_file()):
            return {}, f"-{NAMES}"
        file = pathlib.Path(options.prompts or usual)
        found = _languages(file, _problem_of_templates)
        return found, "" if file.name == PROMPTS else f"-{file.stem}"


def _languages(file: pathlib.Path, problem: Callable[[Any], str]) -> dict[str, Any]:
    """The values of a JSON object by language, whose code becomes lower case.

    Args:
      file: the JSON file.
      problem: says what is wrong with the value of a language; empty if nothing is.

    Raises:
      FileNotFoundError: the file is missing.
      ValueError: the file is not JSON, or a value is wrong.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    try:
        content = json.loads(file.read_text("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error})") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{file} is not a JSON object with a field for each language")
    for code, value in content.items():
        if wrong := problem(value):
            raise ValueError(f"{file}: {code}: {wrong}")
    return {code.lower(): value for code, value in content.items()}


def _problem_of_names(value: Any, count: int) -> str:
    """What is wrong with a language's numbers and names of classes; `count`: number of classes."""
    if not (isinstance(value, list) and len(value) == 2 and all(map(_is_list, value))):
        return "not a list of class numbers and a list of class names"
    numbers, names = value
    if len(numbers) != len(names):
        return f"{len(numbers):,} class numbers, but {len(names):,} class names"
    if wrong := [n for n in numbers if type(n) is not int or not 0 <= n < count]:
        return f"class number {wrong[0]!r} is not between 0 and {count - 1:,}"
    if len(set(numbers)) < len(numbers):
        return "a class number occurs twice"
    if wrong := [name for name in names if not (isinstance(name, str) and name.strip())]:
        return f"class name {wrong[0]!r} is not a text"
    return ""


def _problem_of_templates(value: Any) -> str:
    """What is wrong with the prompts of a language."""
    if not _is_list(value):
        return "not a list of prompts"
    if wrong := [one for one in value if not (isinstance(one, str) and "{}" in one)]:
        return f"prompt {wrong[0]!r} has no {{}}, which stands for the name of a class"
    return ""


def _is_list(value: Any) -> bool:
    """Whether a value is a list with something in it."""
    return isinstance(value, list) and bool(value)


BABEL_IMAGENET = Layout(
    type="babel_imagenet",
    files=("babel_imagenet.json", "babel_imagenet-298.json"),
    folder=r"n\d{8}",
    example="n01440764",
    count=1000,
    authors="from BabelNet, without machine translation",
    origin="https://github.com/gregor-ge/Babel-ImageNet",
    terms="names: BabelNet Non-Commercial License; ImageNet's photos: for research",
)
CLASS_NAMES = Layout(
    type="class_names", files=("class_names.json",), folder=r"[^.].*", example="dog"
)
ENTRIES = {layout.type: layout.entry() for layout in (BABEL_IMAGENET, CLASS_NAMES)}
