"""Configuration -> training photos, and validation and test sets."""

import dataclasses
import logging
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from input_pipeline import datasets
from input_pipeline.cache import cache_folder, fingerprint

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RetrievalSet:
    """Images and their captions in one or more languages.

    Attributes:
      name: what results are filed under.
      images: what `Encoder.encode_image` takes, one item an image.
      captions: language -> captions.
      image_of: language -> for each caption the row of its image.
      fingerprint: identifies the images' content, for the feature cache.
    """

    name: str
    images: Sequence
    captions: dict[str, list[str]]
    image_of: dict[str, np.ndarray]
    fingerprint: str


def feature_cache() -> pathlib.Path:
    """Where the outputs of frozen towers are kept."""
    return cache_folder() / "features"


def training_photos(config: ConfigDict) -> datasets.CaptionedImages:
    """The training photos, less those of the test set.

    Raises:
      ValueError: the data set or a split is unknown, or a test photo would be trained on.
      FileNotFoundError: the data set is not where the configuration says.
    """
    builder = _builder(config)
    test_photos = _test_names(config)
    photos = datasets.CaptionedImages(builder, config.data.train, exclude=test_photos)
    log.info(
        "training on %d photos with %d captions; %d photos of the test set removed",
        *(len(photos), sum(map(len, photos.captions)), photos.excluded),
    )
    if test_photos & set(photos.filenames):
        raise ValueError("photos of the test set are left in the training split")
    return photos


def validation_set(config: ConfigDict) -> RetrievalSet:
    """The validation split: in every language for emoji, in English for captions."""
    return _split(config, config.data.validation)


def test_set(config: ConfigDict, folder: str = "", images: str = "") -> RetrievalSet:
    """A test set.

    Args:
      config: the run's configuration.
      folder: a folder in XTD10's layout; default: the run's own test set.
      images: the folder that holds its photos, at any depth; default: `data.dir`.

    Raises:
      FileNotFoundError: the folder, one of its files, or a photo is missing.
      ValueError: the folder's files do not fit together.
    """
    folder = folder or _test_folder(config)
    if not folder:
        return _split(config, "test")
    photos = images or config.data.dir
    if not photos:
        raise FileNotFoundError("name the folder of the test set's photos with --images=DIR")
    chosen = datasets.read_test_set(folder)
    files = datasets.find_photos(chosen, photos)
    identity = [
        (str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files
    ]
    return _line_aligned(chosen, files, fingerprint(identity))


def _builder(config: ConfigDict) -> datasets.Builder:
    """The prepared data set."""
    if config.data.name == "emoji":
        return datasets.emoji.prepare()
    if config.data.name == "captions":
        if not config.data.dir:
            raise ValueError("name the data set's folder with --config.data.dir=PATH")
        return datasets.captions.prepare(config.data.dir, config.data.annotations)
    raise ValueError(f"config.data.name is {config.data.name!r}; known: emoji, captions")


def _split(config: ConfigDict, name: str) -> RetrievalSet:
    """A split of the run's data set, to be evaluated on."""
    builder = _builder(config)
    photos = datasets.CaptionedImages(builder, name)
    if config.data.name == "emoji":
        return _line_aligned(datasets.emoji.multilingual(name), photos, photos.fingerprint)
    return RetrievalSet(
        name=f"{builder.name}-{name}",
        images=photos,
        captions={"en": [caption for captions in photos.captions for caption in captions]},
        image_of={"en": np.repeat(np.arange(len(photos)), [len(c) for c in photos.captions])},
        fingerprint=photos.fingerprint,
    )


def _line_aligned(
    test_set: datasets.TestSet, images: Sequence[bytes | os.PathLike], fingerprint: str
) -> RetrievalSet:
    """One caption a photo and language, in the order of the photos."""
    rows = np.arange(len(images))
    return RetrievalSet(
        name=test_set.name,
        images=images,
        captions=test_set.captions,
        image_of={language: rows for language in test_set.captions},
        fingerprint=fingerprint,
    )


def _test_folder(config: ConfigDict) -> pathlib.Path | None:
    """The folder of the configured test set; `data.test_set` is relative to `data.dir`."""
    if not config.data.test_set:
        return None
    return pathlib.Path(config.data.dir) / config.data.test_set


def _test_names(config: ConfigDict) -> set[str]:
    """The names of photos that must not be trained on."""
    folder = _test_folder(config)
    return set(datasets.read_test_set(folder).filenames) if folder else set()
