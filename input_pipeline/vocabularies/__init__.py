"""Vocabularies of tags, in many languages.

A vocabulary is a text file with a table. Its first line lists the languages, English first. Each
further line is a tag: its names in these languages, separated by tabs; several names in a language
are joined with `|`. The first English name identifies the tag.

    en          de                  fr
    couch       Sofa|Couch          canapé
    cell phone  Handy|Mobiltelefon  téléphone portable

A file without tabs is a list with a tag per line, which is used for every language.

This folder holds `coco`, COCO's 80 objects in XTD10's 11 languages, and `flickr8k`, the 200 most
frequent nouns of Flickr8k's training captions (`input_pipeline.nouns`) in 5 languages. The
translations are our own. Where the first translation of a tag also has another meaning, we added
further names and tested them on validation photos. `emoji`, the names of 1,914 emoji in 14
languages, comes from the PyPI package of that name.
"""

import dataclasses
import importlib.resources
import os
import pathlib
import re

from input_pipeline.datasets import emoji
from input_pipeline.test_sets.line_aligned import ALIASES

TABLES = ("coco", "flickr8k")
KNOWN = (*TABLES, "emoji")
LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z]+)?")
# Used instead of a language code for the names of a list, which serve every language.
ANY = ""

# The names of one tag in one language.
Names = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Tags and their names.

    Attributes:
      name: name of the vocabulary and of its results.
      tags: the name that identifies each tag: its first English name, or its name in a list.
      names: language -> the names of each tag, at least one.
    """

    name: str
    tags: list[str]
    names: dict[str, list[Names]]

    def languages(self) -> list[str]:
        """The languages of the table; none for a list."""
        return [language for language in self.names if language != ANY]

    def names_in(self, language: str) -> list[Names]:
        """The names of each tag in a language.

        Raises:
          ValueError: the vocabulary does not have this language.
        """
        names = self.names.get(ALIASES.get(language, language), self.names.get(ANY))
        if names is None:
            known = " ".join(self.languages())
            raise ValueError(f"vocabulary {self.name} has no language {language!r}; it has {known}")
        return names


def load(name: str | os.PathLike) -> Vocabulary:
    """Loads a vocabulary of this repository or of a file.

    Args:
      name: one of `KNOWN`, or the path of a file.

    Raises:
      FileNotFoundError: `name` is neither, or the package `emoji` is not installed.
      ValueError: the file is not a vocabulary, or gives two tags the same name.
    """
    if name == "emoji":
        return Vocabulary("emoji", *_emoji())
    if name in TABLES:
        text = importlib.resources.files(__package__).joinpath(f"{name}.tsv").read_bytes()
        return _parse(str(name), text)
    path = pathlib.Path(name)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no vocabulary {os.fspath(name)!r}: it is neither a file nor one of "
            f"{', '.join(KNOWN)}"
        )
    return _parse(os.fspath(name), path.read_bytes(), path.stem)


def _emoji() -> tuple[list[str], dict[str, list[Names]]]:
    """Tags and names of all emoji, by code point. English names are unique, others may not be."""
    table = emoji.names()
    return table["en"], {language: [(one,) for one in names] for language, names in table.items()}


def _parse(source: str, data: bytes, name: str = "") -> Vocabulary:
    """Parses the content of a file; `source` names the file in messages."""
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8 ({error})") from error
    rows = [
        (number, [cell.strip() for cell in line.split("\t")])
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    languages = [ANY]
    if rows and len(rows[0][1]) > 1:
        (_, languages), *rows = rows
        if languages[0] != "en" or not all(map(LANGUAGE.fullmatch, languages)):
            raise ValueError(
                f"{source}: line 1 should name the languages, English first, with tabs between "
                f"them; it is {' '.join(languages)!r}"
            )
        languages = [ALIASES.get(language, language) for language in languages]
        if len(set(languages)) < len(languages):
            raise ValueError(f"{source}: line 1 names a language twice")
    if not rows:
        raise ValueError(f"{source} holds no tags")
    names: dict[str, list[Names]] = {language: [] for language in languages}
    for number, cells in rows:
        if len(cells) != len(languages):
            raise ValueError(
                f"{source}: line {number} has {len(cells)} columns, expected {len(languages)}"
            )
        for language, cell in zip(languages, cells, strict=True):
            names[language].append(tuple(one.strip() for one in cell.split("|")))
    for language, column in names.items():
        _check_names(source, language, column, [number for number, _ in rows])
    return Vocabulary(name or source, [first for first, *_ in names[languages[0]]], names)


def _check_names(source: str, language: str, names: list[Names], numbers: list[int]) -> None:
    """Refuses empty names, and names that occur twice (upper and lower case count as equal)."""
    where = f" of {language!r}" if language else ""
    seen: dict[str, int] = {}
    for number, of_tag in zip(numbers, names, strict=True):
        for name in of_tag:
            if not name:
                raise ValueError(f"{source}: line {number} has an empty name{where}")
            if (first := seen.setdefault(name.casefold(), number)) != number or (
                of_tag.count(name) > 1
            ):
                raise ValueError(
                    f"{source}: {name!r}{where} occurs twice, in lines {first} and {number}"
                )
