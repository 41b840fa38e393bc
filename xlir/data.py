"""Configuration -> training photos, and validation and test sets."""

import collections
import dataclasses
import functools
import logging
import os
import pathlib
from collections.abc import Sequence

import numpy as np
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from input_pipeline import datasets
from input_pipeline.cache import cache_folder, fingerprint
from xlir.config import DATA_SETS

log = logging.getLogger(__name__)

# Karpathy's test split of COCO: photos, folds of the 1K protocol, captions a photo that count.
COCO_TEST, COCO_FOLDS, COCO_CAPTIONS = 5000, 5, 5


@dataclasses.dataclass(frozen=True)
class RetrievalSet:
    """Images and their captions in one or more languages.

    Attributes:
      name: what results are filed under.
      images: what `Encoder.encode_image` takes, one item an image.
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


def feature_cache() -> pathlib.Path:
    """Where the outputs of frozen towers are kept; each process of a run has its own folder."""
    import jax  # here, as `prepare` needs none

    folder = cache_folder() / "features"
    return folder if jax.process_count() == 1 else folder / f"process-{jax.process_index()}"


def missing(config: ConfigDict) -> list[str]:
    """What is not at hand of COCO and XTD10, where a configuration asks for them; takes no time.

    Returns:
      For each what it is, how large, and the commands that get it.

    Raises:
      FileNotFoundError, ValueError: what is there can't be used.
    """
    lacking = []
    try:
        if config.data.name in ("coco", "coco_captions"):
            _check_coco(config)
    except FileNotFoundError as error:
        lacking.append(str(error))
    if "xtd10" in _names(config.data.test_set):
        try:
            datasets.read_xtd10(_xtd10_folder(config))
        except FileNotFoundError as error:
            lacking.append(str(error))
    return lacking


def prepare(config: ConfigDict) -> str:
    """Prepares the data set where it is not prepared yet.

    Where the configuration is evaluated on XTD10, its captions (1 MB) are downloaded if they are
    not at hand; nothing else ever is.

    Returns:
      Where it is, and how many photos and captions each split holds.

    Raises:
      ValueError, FileNotFoundError: as `training_photos`.
    """
    builder = _builder(config)
    if "xtd10" in _names(config.data.test_set):
        try:
            datasets.read_xtd10(_xtd10_folder(config))
        except FileNotFoundError:
            datasets.xtd10.download(_xtd10_folder(config))
    lines = [f"{_set_name(builder)}: {builder.data_path}"]
    for split in builder.info.splits:
        photos = datasets.CaptionedImages(builder, split)
        xtd10 = sum(map(bool, map(datasets.xtd10.origin, photos.filenames)))
        lines.append(
            f"  {split:<10}{len(photos):>9,} photos{sum(map(len, photos.captions)):>11,} captions"
            + (f"  ({xtd10:,} photos of XTD10, which are never trained on)" if xtd10 else "")
        )
    return "\n".join(lines)


def training_photos(config: ConfigDict) -> datasets.CaptionedImages:
    """The training photos, less those of the test sets and, always, those of XTD10.

    Raises:
      ValueError: the data set or a split is unknown, or a test photo would be trained on.
      FileNotFoundError: the data set, or a test set, is not where the configuration says.
    """
    builder = _builder(config)
    # What is evaluated on at the end is looked for now, not after hours of training.
    test_sets(config)
    names = _test_names(config)

    def is_test_photo(filename: str) -> bool:
        return filename in names or datasets.xtd10.origin(filename) is not None

    photos = datasets.CaptionedImages(builder, config.data.train, exclude=is_test_photo)
    log.info(
        "%d training photos with %d captions; %d photos of the test set removed",
        *(len(photos), sum(map(len, photos.captions)), len(photos.excluded)),
    )
    origins = collections.Counter(map(datasets.xtd10.origin, photos.excluded))
    if _set_name(builder) == "coco" or set(origins) - {None}:
        log.info(
            "removed %d photos of XTD10 (%d of train2014, %d of val2014)",
            *(origins["train2014"] + origins["val2014"], origins["train2014"], origins["val2014"]),
        )
    if any(map(is_test_photo, photos.filenames)):
        raise ValueError("photos of the test set are left in the training split")
    return photos


def check_batch_size(config: ConfigDict, captions: int) -> None:
    """Raises ValueError where a batch is larger than the number of training captions."""
    if config.data.batch_size > captions:
        raise ValueError(
            f"config.data.batch_size is {config.data.batch_size:,}, but the training split "
            f"({config.data.train}) has {captions:,} captions: each pair would be in a batch "
            f"several times; it must be at most {captions:,}"
        )


def validation_set(config: ConfigDict) -> RetrievalSet:
    """The validation split: in every language for emoji, in English for captions."""
    return _split(config, config.data.validation)


def split_photos(config: ConfigDict, split: str) -> datasets.CaptionedImages:
    """The photos of a split of the run's data set, with their English captions.

    Raises:
      ValueError, FileNotFoundError: as `training_photos`.
    """
    return datasets.CaptionedImages(_builder(config), split)


def set_name(config: ConfigDict) -> str:
    """What results on the run's data set are filed under, less the split."""
    return _set_name(_builder(config))


def test_sets(
    config: ConfigDict, names: str = "", images: str = "", *, drop_junk: bool = False
) -> list[RetrievalSet]:
    """The test sets of a run, or others.

    Args:
      config: the run's configuration.
      names: one, or several joined with commas, of: "xtd10"; "split:NAME", a split of the run's
        data set in English; a folder in XTD10's layout. Default: the run's own, `data.test_set`.
      images: the folder that holds their photos, at any depth; default: `data.test_images`; else
        for XTD10 the run's data set, for another `data.dir`.
      drop_junk: leave out XTD10's German captions that translate nothing; also `data.drop_junk`.

    Raises:
      FileNotFoundError: a folder, one of its files, or a photo is missing.
      ValueError: the folder's files do not fit together.
    """
    chosen = names or config.data.test_set
    images = images or config.data.test_images
    drop_junk = drop_junk or config.data.drop_junk
    base = "" if names else config.data.dir
    return [_test_set(config, name, base, images, drop_junk) for name in _names(chosen)]


def _test_set(
    config: ConfigDict, name: str, base: str, images: str, drop_junk: bool
) -> RetrievalSet:
    """One test set; a folder is relative to `base`."""
    if name.startswith("split:") or not name:
        return _split(config, name.removeprefix("split:") or "test")
    folder = _xtd10_folder(config) if name == "xtd10" else pathlib.Path(base) / name
    if name != "xtd10" and not datasets.is_xtd10(folder):
        chosen = datasets.read_test_set(folder)
        images = images or config.data.dir
        if not images:
            raise FileNotFoundError("name the folder of the test set's photos with --images=DIR")
    else:
        chosen = datasets.read_xtd10(folder, drop_junk=drop_junk)
        for language, lines in datasets.xtd10.JUNK.items():
            what = "dropped" if drop_junk else "kept (config.data.drop_junk, --drop_junk)"
            log.info("xtd10: %d captions in %r are junk, %s", len(lines), language, what)
    if not images:
        photos = _prepared_photos(config, chosen)
        return _line_aligned(chosen, photos, photos.fingerprint)
    files = datasets.find_photos(chosen, images)
    identity = [
        (str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files
    ]
    return _line_aligned(chosen, files, fingerprint(identity))


def _prepared_photos(config: ConfigDict, chosen: datasets.TestSet) -> datasets.CaptionedImages:
    """A test set's photos, by name, from all splits of the run's data set."""
    builder = _builder(config)
    photos = datasets.CaptionedImages(builder, "+".join(builder.info.splits))
    missing = sorted(set(chosen.filenames) - set(photos.filenames))
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(chosen.filenames)} photos of {chosen.name} are not in the "
            f"prepared {_set_name(builder)} ({', '.join(missing[:3])}, ...): name a folder that "
            "holds them, at any depth, with --images=DIR (to train: --config.data.test_images=DIR)"
        )
    return photos.select(chosen.filenames)


def _check_coco(config: ConfigDict) -> None:
    """Raises FileNotFoundError where COCO is not at hand."""
    if config.data.name == "coco_captions":
        datasets.coco.open_tfds(config.data.dir)
    elif message := datasets.coco.missing(config.data.dir, config.data.annotations):
        raise FileNotFoundError(message)


def _builder(config: ConfigDict) -> tfds.core.DatasetBuilder:
    """The prepared data set; looked for once in a process, COCO's JSON takes seconds to read."""
    name, folder = config.data.name, config.data.dir
    if not name:
        raise ValueError(
            f"no data set is named (config.data.name is empty; known: {', '.join(DATA_SETS)}); a "
            "test set of its own needs none: --test_set=FOLDER --images=FOLDER"
        )
    if name == "coco":
        _check_coco(config)
    if name != "emoji" and not folder:
        raise ValueError("name the data set's folder with --config.data.dir=PATH")
    return _prepared(name, folder, config.data.annotations, cache_folder())


@functools.cache
def _prepared(
    name: str, folder: str, annotations: str, cache: pathlib.Path
) -> tfds.core.DatasetBuilder:
    if name == "emoji":
        return datasets.emoji.prepare()
    if name == "coco_captions":
        return datasets.coco.open_tfds(folder)
    if name == "coco":
        annotations = annotations or datasets.coco.ANNOTATIONS
    return datasets.captions.prepare(folder, annotations)


def _set_name(builder: tfds.core.DatasetBuilder) -> str:
    """COCO is filed under one name, whoever prepared it."""
    return "coco" if builder.name == "coco_captions" else builder.name


def _split(config: ConfigDict, name: str) -> RetrievalSet:
    """A split of the run's data set, to be evaluated on."""
    builder = _builder(config)
    photos = datasets.CaptionedImages(builder, name)
    if config.data.name == "emoji":
        return _line_aligned(datasets.emoji.multilingual(name), photos, photos.fingerprint)
    set_name, captions, folds = f"{_set_name(builder)}-{name}", photos.captions, None
    # As published: 5 captions a photo, all photos at once (5K) and the mean of 5 folds (1K). Folds
    # are in the order of Karpathy's file, which TFDS has shuffled.
    if set_name == "coco-test" and len(photos) == COCO_TEST:
        captions = [texts[:COCO_CAPTIONS] for texts in captions]
        set_name = "coco-test-5k"
        folds = ("coco-test-1k", COCO_FOLDS) if builder.name == "coco" else None
    return RetrievalSet(
        name=set_name,
        images=photos,
        captions={"en": [caption for texts in captions for caption in texts]},
        image_of={"en": np.repeat(np.arange(len(photos)), [len(texts) for texts in captions])},
        fingerprint=photos.fingerprint,
        folds=folds,
    )


def _line_aligned(
    test_set: datasets.TestSet, images: Sequence[bytes | os.PathLike], fingerprint: str
) -> RetrievalSet:
    """One caption a photo and language, in the order of the photos."""
    return RetrievalSet(
        name=test_set.name,
        images=images,
        captions=test_set.captions,
        image_of={language: test_set.rows(language) for language in test_set.captions},
        fingerprint=fingerprint,
    )


def _names(test_sets: str) -> list[str]:
    """Test sets that are joined with commas; a folder may have one in its name."""
    return [test_sets] if os.path.isdir(test_sets) else test_sets.split(",")


def _xtd10_folder(config: ConfigDict) -> pathlib.Path:
    """Where XTD10's captions are: `data.xtd10`, else xtd10 in `data.dir`."""
    given = config.data.xtd10
    return pathlib.Path(given or pathlib.Path(config.data.dir or "PATH") / "xtd10")


def _test_names(config: ConfigDict) -> set[str]:
    """The names of photos of the run's test sets, other than XTD10 and splits."""
    names: set[str] = set()
    for name in _names(config.data.test_set):
        if name and name != "xtd10" and not name.startswith("split:"):
            folder = pathlib.Path(config.data.dir) / name
            if not datasets.is_xtd10(folder):
                names |= set(datasets.read_test_set(folder).filenames)
    return names
