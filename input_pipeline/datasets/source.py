"""The interface of data sets for training and evaluation."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable


class Example(NamedTuple):
    """An encoded image and its texts."""

    image: bytes
    texts: list[str]


@runtime_checkable
class Source(Protocol):
    """Images with their texts, read by row; any number of threads may read."""

    def __len__(self) -> int:
        """Number of images."""

    def __getitem__(self, row: int) -> Example:
        """The image of a row, with its texts."""


class Images(Sequence):
    """The encoded images of a source, without texts."""

    def __init__(self, source: Source):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, row: int) -> bytes:
        return self._source[row].image


@runtime_checkable
class Opened(Protocol):
    """An opened data set. `captioned_images.PreparedSet` explains the members."""

    name: str
    splits: Sequence[str]
    keeps_order: bool
    translations: Callable[[str], dict[str, list[str]]] | None

    def source(self, splits: str, exclude: Callable[[str], object] = ...) -> Any:
        """One or more splits, without photos whose file names make `exclude` true."""

    def filed_under(self, split: str) -> str:
        """The name of results on a split."""


def nothing_missing(folder: str, annotations: str) -> str:
    """A `missing` that reports nothing, for sets whose `open` says what is missing."""
    return ""


@dataclasses.dataclass(frozen=True)
class DataSet:
    """The entry of a data set in the registry.

    Attributes:
      open: takes `config.data.dir` and `config.data.annotations`, prepares the set into the cache
        if necessary, and returns it.
      missing: takes the same arguments, and returns a message that says which files are missing and
        how to get them; empty if none is. It has to be fast.
      in_folder: whether the set needs `config.data.dir`.
      terms: licence of the set, for the card of a model that was trained on it; empty: unknown.
    """

    open: Callable[[str, str], Opened]
    missing: Callable[[str, str], str] = nothing_missing
    in_folder: bool = True
    terms: str = ""
