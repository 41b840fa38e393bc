"""Captions in several languages, and the photos that they belong to by name."""

import dataclasses
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from input_pipeline.cache import fingerprint
from input_pipeline.lines import english_first
from input_pipeline.test_sets.retrieval_set import Options, RetrievalSet, RunData

# Names of COCO 2014's photos; COCO 2017 names the same photos by their id alone.
COCO_2014 = re.compile(r"COCO_(?:train|val)2014_(\d{12}\.jpg)")
# Names of Flickr8k's photos, as on Flickr; Flickr30k names the same photos by their id alone.
FLICKR8K = re.compile(r"(\d+)_[0-9a-f]{10}\.jpg")


@dataclasses.dataclass(frozen=True)
class CaptionedPhotos:
    """The names of photos, and their captions.

    Attributes:
      name: name of the set.
      filenames: names of the photos.
      captions: language -> captions; English comes first.
      image_of: language -> the row of each caption's photo in `filenames`.
    """

    name: str
    filenames: list[str]
    captions: dict[str, list[str]]
    image_of: dict[str, list[int]]


def from_pairs(
    name: str, pairs: Mapping[str, Iterable[tuple[str, str]]], filenames: Sequence[str] = ()
) -> CaptionedPhotos:
    """A set from pairs of a photo's name and a caption.

    Args:
      name: name of the set.
      pairs: language -> (name of the photo, caption).
      filenames: the photos; pairs of other photos are left out. Default: all that `pairs` name.
    """
    given = {language: list(of_one) for language, of_one in pairs.items()}
    names = filenames or [photo for of_one in given.values() for photo, _ in of_one]
    rows = {photo: row for row, photo in enumerate(dict.fromkeys(names))}
    kept = {
        language: [(rows[photo], caption) for photo, caption in of_one if photo in rows]
        for language, of_one in english_first(given).items()
    }
    return CaptionedPhotos(
        name,
        list(rows),
        {language: [caption for _, caption in of_one] for language, of_one in kept.items()},
        {language: [row for row, _ in of_one] for language, of_one in kept.items()},
    )


def photo_key(filename: str) -> str:
    """A name that is the same for all names of a photo of COCO or of Flickr8k and Flickr30k.

    COCO_val2014_000000000042.jpg and 000000000042.jpg are one photo, as are
    1007129816_e794419615.jpg and 1007129816.jpg. For other photos, it is the file name.
    """
    name = filename.rsplit("/", 1)[-1]
    if match := COCO_2014.fullmatch(name):
        return match[1]
    if match := FLICKR8K.fullmatch(name):
        return f"{match[1]}.jpg"
    return name


def find_photos(captions: CaptionedPhotos, folder: str | os.PathLike) -> list[pathlib.Path]:
    """Finds the photos of a test set below a folder; returns them in the order of the set.

    A photo may also have another of its usual names (`photo_key`).

    Raises:
      FileNotFoundError: the folder or some of the photos are missing.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder of photos {folder}")
    wanted = set(captions.filenames)
    keys = {photo_key(name) for name in wanted}
    found: dict[str, pathlib.Path] = {}
    for place, _, names in os.walk(folder):
        for name in names:
            if name in wanted:
                found.setdefault(name, pathlib.Path(place) / name)
            elif photo_key(name) in keys:
                found.setdefault(photo_key(name), pathlib.Path(place) / name)
    files = [found.get(name) or found.get(photo_key(name)) for name in captions.filenames]
    missing = [name for name, file in zip(captions.filenames, files, strict=True) if not file]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(wanted)} photos of {captions.name} are not below "
            f"{folder}: {_first(missing)}"
        )
    return files


def with_photos_of_folder(captions: CaptionedPhotos, folder: str | os.PathLike) -> RetrievalSet:
    """The test set whose photos are below a folder.

    Raises:
      FileNotFoundError: the folder or some of the photos are missing.
    """
    files = find_photos(captions, folder)
    identity = [
        (str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files
    ]
    return _retrieval_set(captions, files, fingerprint(identity))


def with_photos_of_run(captions: CaptionedPhotos, options: Options, run: RunData) -> RetrievalSet:
    """The test set with photos from the run's data set, found by name in all of its splits.

    Raises:
      FileNotFoundError: the data set is missing, or does not have some of the photos.
    """
    data = run.open()
    source = data.source("+".join(data.splits))
    missing = sorted(set(captions.filenames) - set(source.filenames))
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(captions.filenames)} photos of {captions.name} are not in "
            f"the prepared {data.name} ({_first(missing)}): name a folder that holds "
            "them, at any depth, with --images=DIR (to train: "
            f"--config.evals.{options.name}.images=DIR)"
        )
    photos = source.select(captions.filenames)
    return _retrieval_set(captions, photos.images, photos.fingerprint)


def _first(names: Sequence[str]) -> str:
    """The first three names, and whether there are more."""
    return ", ".join([*names[:3], *(["..."] if len(names) > 3 else [])])


def _retrieval_set(captions: CaptionedPhotos, images: Sequence, fingerprint: str) -> RetrievalSet:
    image_of = {language: np.array(rows, int) for language, rows in captions.image_of.items()}
    return RetrievalSet(
        *(captions.name, images, captions.captions, image_of, fingerprint, captions.filenames)
    )
