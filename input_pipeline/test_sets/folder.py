"""Multilingual test sets in XTD10's layout, each in its own folder."""

import pathlib
from collections.abc import Collection

from input_pipeline.test_sets import captioned_photos, line_aligned, xtd10
from input_pipeline.test_sets.retrieval_set import Entry, Options, RetrievalSet, RunData


def read(options: Options, run: RunData) -> RetrievalSet:
    """The test set of the folder `options.captions`. If this is XTD10, it is read as type xtd10.

    Raises:
      FileNotFoundError: the folder, one of its files, or a photo is missing.
      ValueError: the folder's files do not fit together.
    """
    folder = pathlib.Path(options.captions)
    if xtd10.is_xtd10(folder):
        return xtd10.read(options, run)
    captions = line_aligned.read(folder)
    images = options.images or run.folder
    if not images:
        raise FileNotFoundError("name the folder of the test set's photos with --images=DIR")
    return captioned_photos.with_photos_of_folder(captions, images)


def photos(options: Options, run: RunData) -> Collection[str]:
    """The names of the photos; none for XTD10, because `xtd10.origin` knows its photos."""
    folder = pathlib.Path(options.captions)
    return () if xtd10.is_xtd10(folder) else line_aligned.read(folder).filenames


ENTRIES = {"folder": Entry(read, photos)}
