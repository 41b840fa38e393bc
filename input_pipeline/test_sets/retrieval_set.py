"""What a test set is to those who evaluate on it, and how one is asked for."""

import dataclasses
from collections.abc import Callable, Collection, Sequence

import numpy as np

from input_pipeline.datasets.source import Opened


@dataclasses.dataclass(frozen=True)
class RetrievalSet:
    """Images and their captions in one or more languages.

    Attributes:
      name: what results are filed under.
      images: encoded images or paths, one an image.
      captions: language -> captions.
      image_of: language -> for each caption the row of its image.
      fingerprint: identifies the images' content, for the feature cache.
      folds: (name, number) where results are also the mean over so many equal parts, taken in
        order, each searched alone; filed under that name.
    """

    name: str
    images: Sequence
    captions: dict[str, list[str]]
    image_of: dict[str, np.ndarray]
    fingerprint: str
    folds: tuple[str, int] | None = None


@dataclasses.dataclass(frozen=True)
class Options:
    """One test set of a run, as `config.evals.NAME` describes it (see configs/base.py).

    Attributes:
      name: NAME; for messages.
      captions: the folder of its captions; empty: the type's default.
      images: the folder that holds its photos, at any depth; empty: the type's default.
      split: of the run's data set.
      drop_junk: leave out captions that are known to say nothing of their photo.
    """

    name: str
    captions: str = ""
    images: str = ""
    split: str = "test"
    drop_junk: bool = False


@dataclasses.dataclass(frozen=True)
class RunData:
    """The data set that a run is trained on, which test sets may take their photos from.

    Attributes:
      folder: its folder, `config.data.dir`; may be empty.
      open: gives the prepared set; raises ValueError where the run has none.
    """

    folder: str
    open: Callable[[], Opened]


def nothing_missing(options: Options, run: RunData) -> str:
    """Of a test set whose `read` says itself what is missing."""
    return ""


def no_photos(options: Options, run: RunData) -> Collection[str]:
    """Of a test set whose photos are known in another way, or may be trained on."""
    return ()


@dataclasses.dataclass(frozen=True)
class Entry:
    """How test sets of a type are read, and what else is known of them.

    Attributes:
      read: reads a test set; raises FileNotFoundError or ValueError where it can't.
      photos: the names of its photos, which are kept out of training.
      missing: what is not at hand of it and how to get it; empty where nothing is missing.
      download: gets its captions where they are missing; None where nothing is ever downloaded.
      terms: its licence; empty where it depends on the user's own files.
    """

    read: Callable[[Options, RunData], RetrievalSet]
    photos: Callable[[Options, RunData], Collection[str]] = no_photos
    missing: Callable[[Options, RunData], str] = nothing_missing
    download: Callable[[Options, RunData], None] | None = None
    terms: str = ""
