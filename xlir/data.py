"""Configuration -> training photos, and validation and test sets."""

import collections
import dataclasses
import functools
import logging
import os
import pathlib
from collections.abc import Iterator

from ml_collections import ConfigDict

from configs import base
from input_pipeline import datasets
from input_pipeline import test_sets as test_set_types
from input_pipeline.cache import cache_folder
from input_pipeline.datasets.captioned_images import CaptionedImages, PreparedSet
from input_pipeline.datasets.shards import ShardedPhotos, ShardedSet
from input_pipeline.datasets.texts import ParallelTexts, Texts
from input_pipeline.test_sets import split, xtd10
from input_pipeline.test_sets.captioned_photos import photo_key
from input_pipeline.test_sets.classification_set import ClassificationSet
from input_pipeline.test_sets.retrieval_set import (
    CLASSIFICATION,
    RETRIEVAL,
    Entry,
    Options,
    RetrievalSet,
    RunData,
)

log = logging.getLogger(__name__)

TrainingData = CaptionedImages | ShardedPhotos | Texts


def feature_cache() -> pathlib.Path:
    """The folder that caches outputs of frozen towers; each process of a run has its own."""
    import jax  # imported here, because `prepare` does not need it

    folder = cache_folder() / "features"
    return folder if jax.process_count() == 1 else folder / f"process-{jax.process_index()}"


def missing(config: ConfigDict) -> list[str]:
    """Describes missing files of a run's data set and test sets, without reading the data.

    Returns:
      For each missing part, what it is, its size, and the commands that download it.

    Raises:
      FileNotFoundError, ValueError: files exist but can't be used.
    """
    lacking = []
    if config.data.name:
        data_set = datasets.find(config.data.name)
        lacking.append(data_set.missing(config.data.dir, config.data.annotations))
    lacking += [entry.missing(options, run_data(config)) for entry, options in _own(config)]
    return list(filter(None, lacking))


def prepare(config: ConfigDict) -> str:
    """Prepares the data set, if that was not done before.

    If the configuration has XTD10 as a test set and its captions (1 MB) are missing, they are
    downloaded; nothing else is ever downloaded.

    Returns:
      The folder of the prepared set, and the number of photos and captions (or of lines) in each
      split.

    Raises:
      ValueError, FileNotFoundError: as `training_photos`.
    """
    run = run_data(config)
    data = run.open()
    for entry, options in _own(config):
        if entry.download and entry.missing(options, run):
            entry.download(options, run)
    lines = [f"{data.name}: {data.folder}"]
    if not has_photos(config):
        return "\n".join(
            lines + [f"  {name:<10}{len(data.source(name)):>9,} lines" for name in data.splits]
        )
    if isinstance(data, ShardedSet):
        for name in data.splits:
            photos = data.source(name)
            counts = f"{len(photos):>13,} photos{photos.caption_count:>15,} captions"
            lines.append(f"  {name:<10}{counts}")
        return "\n".join(lines)
    for name in data.splits:
        photos = data.source(name)
        of_xtd10 = sum(map(bool, map(xtd10.origin, photos.filenames)))
        lines.append(
            f"  {name:<10}{len(photos):>9,} photos{sum(map(len, photos.captions)):>11,} captions"
            + (f"  ({of_xtd10:,} photos of XTD10, which are never trained on)" if of_xtd10 else "")
        )
    return "\n".join(lines)


def has_photos(config: ConfigDict) -> bool:
    """Whether the run's data set has photos; if not, it has texts only."""
    return config.data.name not in datasets.WITHOUT_PHOTOS


def training_photos(config: ConfigDict) -> TrainingData:
    """The training photos, without photos of the run's test sets; or the training texts.

    Photos of XTD10 are left out too, whether or not XTD10 is a test set of the run. From shards,
    `prepare` has left them out.

    Raises:
      ValueError: the data set or a split is unknown, or a test photo would be trained on.
      FileNotFoundError: the data set or a test set is missing from its configured folder.
    """
    run = run_data(config)
    data = run.open()
    # Find the test sets now, so that a missing one does not fail after hours of training.
    own_test_sets(config)
    if not has_photos(config):
        texts = data.source(config.data.train)
        log.info("%d training lines with %d texts", len(texts), sum(map(len, texts.captions)))
        return texts
    if isinstance(data, ShardedSet):
        return _sharded_photos(config, data)
    keys = set(map(photo_key, test_photo_names(config)))

    def is_test_photo(filename: str) -> bool:
        return photo_key(filename) in keys or xtd10.origin(filename) is not None

    photos = data.source(config.data.train, exclude=is_test_photo)
    log.info(
        "%d training photos with %d captions; %d photos of the test set removed",
        *(len(photos), sum(map(len, photos.captions)), len(photos.excluded)),
    )
    origins = collections.Counter(map(xtd10.origin, photos.excluded))
    if data.name == "coco" or set(origins) - {None}:
        log.info(
            "removed %d photos of XTD10 (%d of train2014, %d of val2014)",
            *(origins["train2014"] + origins["val2014"], origins["train2014"], origins["val2014"]),
        )
    if any(map(is_test_photo, photos.filenames)):
        raise ValueError("photos of the test set are left in the training split")
    return photos


def test_photo_names(config: ConfigDict) -> set[str]:
    """The names of the files to keep out of training, because the run's test sets have them."""
    run = run_data(config)
    return {name for entry, options in _own(config) for name in entry.photos(options, run)}


def _sharded_photos(config: ConfigDict, data: ShardedSet) -> ShardedPhotos:
    """The training photos of shards.

    Raises:
      ValueError: they may hold photos of a test set.
    """
    photos = data.source(config.data.train)
    log.info("%d training photos with %d captions", len(photos), photos.caption_count)
    for entry, options in _own(config):
        if not entry.photos(options, run_data(config)):
            continue
        test_set = entry.read(options, run_data(config))
        if not all(test_set.fingerprint in kept_out for kept_out in photos.kept_out):
            raise ValueError(
                f"{data.folder} may hold photos of the test set {options.name!r}: prepare the "
                f"splits {config.data.train} with --config (and this test set in config.evals), "
                "which leaves these photos out"
            )
    return photos


def count_captions(photos: TrainingData) -> int:
    """The number of captions of the training data."""
    if isinstance(photos, ShardedPhotos):
        return photos.caption_count
    return sum(map(len, photos.captions))


def captions_of(photos: TrainingData) -> Iterator[str]:
    """All captions of the training data, photo by photo."""
    if isinstance(photos, ShardedPhotos):
        return photos.texts()
    return (caption for of_one_photo in photos.captions for caption in of_one_photo)


def for_teacher(photos: CaptionedImages | Texts) -> list[str]:
    """The text that a teacher reads for each training text: the caption, or its English line."""
    if isinstance(photos, Texts):
        pairs = zip(photos.english, photos.captions, strict=True)
        return [english for english, texts in pairs for _ in texts]
    return list(captions_of(photos))


def check_batch_size(config: ConfigDict, captions: int) -> None:
    """Raises ValueError if a batch is larger than the number of training captions."""
    if config.data.batch_size > captions:
        raise ValueError(
            f"config.data.batch_size is {config.data.batch_size:,}, but the training split "
            f"({config.data.train}) has {captions:,} captions: a batch would hold a pair "
            f"more than once; the batch size must be at most {captions:,}"
        )


def validation_set(config: ConfigDict) -> RetrievalSet:
    """The validation split: in English, or in all languages of a data set with translations."""
    if not has_photos(config):
        data, name = prepared_set(config), config.data.validation
        return split.of_texts(data.filed_under(name), data.source(name))
    return split.read(Options("validation", split=config.data.validation), run_data(config))


def split_photos(config: ConfigDict, name: str) -> CaptionedImages | ShardedPhotos:
    """The photos of a split of the run's data set, with their English captions.

    Raises:
      ValueError, FileNotFoundError: as `training_photos`.
    """
    _check_has_photos(config, f"split:{name}")
    return prepared_set(config).source(name)


def _check_has_photos(config: ConfigDict, name: str) -> None:
    """Raises ValueError if a split that photos are needed of has none."""
    if not has_photos(config):
        raise ValueError(f"{name} has no photos: the run was trained on texts only")


def prepared_set(config: ConfigDict) -> PreparedSet | ParallelTexts | ShardedSet:
    """The run's data set; opened once per process, because COCO's JSON takes seconds to read.

    Raises:
      ValueError: the configuration names no data set, or does not name its folder.
      FileNotFoundError: the data set is missing.
    """
    name, folder = config.data.name, config.data.dir
    if not name:
        raise ValueError(
            "no data set is named (config.data.name is empty; known: "
            f"{', '.join(datasets.NAMES)}); to use a test set that needs none, give "
            "--test_set=FOLDER --images=FOLDER"
        )
    if datasets.find(name).in_folder and not folder:
        raise ValueError("name the data set's folder with --config.data.dir=PATH")
    return open_data_set(name, folder, config.data.annotations, cache_folder())


@functools.cache
def open_data_set(
    name: str, folder: str, annotations: str, cache: pathlib.Path
) -> PreparedSet | ParallelTexts | ShardedSet:
    """A data set by its name and folder; opened once per process and cache folder."""
    return datasets.find(name).open(folder, annotations)


def run_data(config: ConfigDict) -> RunData:
    """The run's data set, for test sets. A test set opens it only if it needs it."""
    return RunData(config.data.dir, functools.partial(prepared_set, config))


def test_sets(
    config: ConfigDict,
    names: str = "",
    images: str = "",
    *,
    task: str = RETRIEVAL,
    drop_junk: bool = False,
    prompts: str = "",
) -> list[RetrievalSet] | list[ClassificationSet]:
    """The test sets of a run, or others.

    Args:
      config: the run's configuration.
      names: one test set, or several joined with commas. Each is a name of `config.evals`,
        "split:NAME" for a split of the run's data set, "TYPE" or "TYPE:FOLDER" for a published set
        (`input_pipeline.test_sets.TYPES`) and the folder of its captions or class names, or a
        folder in XTD10's layout. Empty: all of `config.evals`; for retrieval, the split "test" if
        there are none.
      images: the folder of their photos, searched at any depth; empty: as the configuration says.
      task: what they measure, `RETRIEVAL` or `CLASSIFICATION`.
      drop_junk: leave out XTD10's German captions that are not translations, whatever the
        configuration says.
      prompts: as `Options.prompts`; empty: as the configuration says.

    Raises:
      FileNotFoundError: a folder, one of its files, or a photo is missing.
      ValueError: the folder's files contradict each other, a set measures something else, or
        there is none.
    """
    chosen = [_named(config, name) for name in listed(names)] if names else _own(config, task)
    chosen = list(chosen)
    for entry, options in chosen:
        if entry.task != task:
            raise ValueError(f"the test set {options.name!r} needs --task={entry.task}")
    if not chosen and task == CLASSIFICATION:
        raise ValueError(
            "config.evals has no test set for classification: name one with "
            "--test_set=babel_imagenet:FOLDER --images=FOLDER"
        )
    if not chosen:
        raise ValueError(
            f"there is no test set: the data set {config.data.name!r} {_no_default(config)}. Name "
            "one with --test_set=FOLDER --images=FOLDER"
        )
    changed = {"images": images and os.path.abspath(images)}
    changed |= {"drop_junk": drop_junk, "prompts": prompts}
    changed = {name: value for name, value in changed.items() if value}
    run = run_data(config)
    return [entry.read(dataclasses.replace(options, **changed), run) for entry, options in chosen]


def own_test_sets(config: ConfigDict, task: str = "") -> list[RetrievalSet | ClassificationSet]:
    """The test sets to evaluate at the end of a run: `config.evals`, or the default.

    Args:
      config: the run's configuration.
      task: only those that measure it; empty: all.
    """
    run = run_data(config)
    return [entry.read(options, run) for entry, options in _own(config, task)]


def _own(config: ConfigDict, task: str = "") -> Iterator[tuple[Entry, Options]]:
    """The test sets of `config.evals`; if none is for retrieval, also the data set's split "test".

    Texts and shards, which need not have such a split, have no test set by default. If `task` is
    not empty, only the sets that measure it.
    """
    # Multilingual sets first, because an export is checked on the first set.
    names = sorted(config.evals, key=lambda name: (config.evals[name].get("type") == "split", name))
    found = [_configured(config, name) for name in names]
    if all(entry.task != RETRIEVAL for entry, _ in found) and not _no_default(config):
        found.append(_named(config, "split:test"))
    return (pair for pair in found if task in ("", pair[0].task))


def _no_default(config: ConfigDict) -> str:
    """Why the data set's split "test" is not the default test set; empty if it is."""
    if not has_photos(config):
        return "has no photos"
    return "need not have a test split" if config.data.name in datasets.STREAMED else ""


def _configured(config: ConfigDict, name: str) -> tuple[Entry, Options]:
    """A test set of `config.evals`."""
    fields = base.test_set()
    fields.update(config.evals[name])

    def place(folder: str) -> str:
        return folder and os.path.join(config.data.dir, folder)

    options = Options(
        name=name,
        captions=place(fields.captions),
        images=place(fields.images),
        split=fields.split,
        drop_junk=fields.drop_junk,
        prompts=fields.prompts if fields.prompts == "names" else place(fields.prompts),
    )
    return test_set_types.find(fields.type), options


def _named(config: ConfigDict, name: str) -> tuple[Entry, Options]:
    """A test set that a user names."""
    if name in config.evals:
        return _configured(config, name)
    type, _, place = name.partition(":")
    if type == "split":
        _check_has_photos(config, name)
        return test_set_types.find("split"), Options(name, split=place)
    if type in test_set_types.TYPES and (place or type != "folder"):
        return test_set_types.find(type), Options(type, captions=place)
    return test_set_types.find("folder"), Options("NAME", captions=name)


def listed(names: str) -> list[str]:
    """Splits test sets at commas, unless they are one folder whose name contains a comma."""
    return [names] if os.path.isdir(names) else names.split(",")
