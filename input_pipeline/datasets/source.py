"""What a data set is to those who train and evaluate on it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable


class Example(NamedTuple):
    """An encoded image, and what is said of it."""

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
    """The encoded images of a source alone."""

    def __init__(self, source: Source):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, row: int) -> bytes:
        return self._source[row].image


@runtime_checkable
class Opened(Protocol):
    """A data set that can be read: `captioned_images.PreparedSet` says what each member is."""

    name: str
    splits: Sequence[str]
    keeps_order: bool
    translations: Callable[[str], dict[str, list[str]]] | None

    def source(self, splits: str, exclude: Callable[[str], object] = ...) -> Any:
        """A source of one or more splits, less the photos whose names `exclude` accepts."""

    def filed_under(self, split: str) -> str:
        """What results on a split are filed under."""


def nothing_missing(folder: str, annotations: str) -> str:
    """Of a data set whose `open` says itself what is missing."""
    return ""


@dataclasses.dataclass(frozen=True)
class DataSet:
    """How the data set of a name is opened, and what else is known of it.

    Attributes:
      open: takes `config.data.dir` and `config.data.annotations`, prepares the set into the cache
        where it is not there yet, and gives it.
      missing: takes the same, and says what is not at hand and how to get it; empty where nothing
        is missing. It takes no time.
      in_folder: whether it needs `config.data.dir`.
      terms: its licence, for the card of a model that was trained on it; empty: not known.
    """

    open: Callable[[str, str], Opened]
    missing: Callable[[str, str], str] = nothing_missing
    in_folder: bool = True
    terms: str = ""
