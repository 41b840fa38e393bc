"""The interface of test sets: their content, their options, and the entry of a type."""

import dataclasses
from collections.abc import Callable, Collection, Sequence

import numpy as np

from input_pipeline.datasets.source import Opened
from input_pipeline.test_sets.classification_set import ClassificationSet

# What a test set measures.
RETRIEVAL, CLASSIFICATION = "retrieval", "classification"


@dataclasses.dataclass(frozen=True)
class RetrievalSet:
    """Images and their captions in one or more languages.

    Attributes:
      name: name of the results.
      images: the images, each as encoded bytes or as a path.
      captions: language -> captions.
      image_of: language -> the row of each caption's image.
      fingerprint: identifies the images' content, for the feature cache.
      filenames: the names of the images' files; empty if they have none.
      folds: (name, number), or None. The set is also split, in order, into this number of equal
        parts. Each part is searched separately, and the mean results are saved under this name.
    """

    name: str
    images: Sequence
    captions: dict[str, list[str]]
    image_of: dict[str, np.ndarray]
    fingerprint: str
    filenames: Sequence[str] = ()
    folds: tuple[str, int] | None = None


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of one test set: the fields of `config.evals.NAME` (see configs/base.py).

    Attributes:
      name: NAME, for messages.
      captions: the folder of the captions or class names; empty: the type's default.
      images: the folder that holds the photos, at any depth; empty: the type's default.
      split: a split of the run's data set.
      drop_junk: leave out captions that are known not to describe their photo.
      prompts: a file of prompts for class names; "names": none; empty: the type's default.
    """

    name: str
    captions: str = ""
    images: str = ""
    split: str = "test"
    drop_junk: bool = False
    prompts: str = ""


@dataclasses.dataclass(frozen=True)
class RunData:
    """The data set that a run is trained on. Test sets may take photos from it.

    Attributes:
      folder: `config.data.dir`; may be empty.
      open: returns the prepared set; raises ValueError if the run has no data set.
    """

    folder: str
    open: Callable[[], Opened]


def nothing_missing(options: Options, run: RunData) -> str:
    """A `missing` that reports nothing, for types whose `read` says what is missing."""
    return ""


def no_photos(options: Options, run: RunData) -> Collection[str]:
    """A `photos` for types whose photos may be trained on, or are kept out in another way."""
    return ()


@dataclasses.dataclass(frozen=True)
class Entry:
    """The entry of a type of test sets in the registry.

    Attributes:
      read: reads a test set; raises FileNotFoundError or ValueError if that fails.
      photos: returns the file names of the photos to keep out of training.
      missing: returns a message that says which files are missing and how to get them; empty if
        none is missing.
      download: downloads missing captions; None: this type is never downloaded.
      terms: licence of the test set; empty: depends on the user's files.
      authors: who wrote the captions or names; empty: depends on the user's files.
      origin: where the files come from; empty: depends on the user.
      task: what it measures. For `CLASSIFICATION`, `read` returns a ClassificationSet.
    """

    read: Callable[[Options, RunData], RetrievalSet | ClassificationSet]
    photos: Callable[[Options, RunData], Collection[str]] = no_photos
    missing: Callable[[Options, RunData], str] = nothing_missing
    download: Callable[[Options, RunData], None] | None = None
    terms: str = ""
    authors: str = ""
    origin: str = ""
    task: str = RETRIEVAL
