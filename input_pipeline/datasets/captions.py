"""Captioned data sets in the JSON format of Karpathy and Li: COCO, Flickr8k, Flickr30k.

    {"images": [{"filename": "a.jpg", "split": "train", "sentences": [{"raw": "A dog."}, ...]}]}

COCO's file also has `filepath` (train2014 or val2014) and `cocoid`. Karpathy and Li 2015,
"Deep Visual-Semantic Alignments for Generating Image Descriptions".
"""

import functools
import hashlib
import json
import logging
import os
import pathlib
import re
import unicodedata
from typing import NamedTuple

import tensorflow_datasets as tfds

from input_pipeline import images, photo_limits
from input_pipeline.cache import fingerprint
from input_pipeline.datasets import photo_files, records
from input_pipeline.datasets.captioned_images import PreparedSet
from input_pipeline.datasets.source import DataSet

log = logging.getLogger(__name__)

EXPECTED = (
    'expected Karpathy and Li\'s JSON: {"images": [{"filename", "split", "sentences": [{"raw"}]}]}'
)


class Photo(NamedTuple):
    """An entry of the JSON, and the photo's file (None: missing)."""

    filename: str
    split: str
    image_id: int
    captions: list[str]
    file: photo_files.FileInFolder | photo_files.FileInZip | None


def prepare(
    folder: str | os.PathLike, annotations: str | os.PathLike = ""
) -> tfds.core.DatasetBuilder:
    """The prepared set of a folder. It is prepared into the cache if the cache does not have it.

    Photos that are missing, can't be decoded, would take too much memory (`photo_limits`), or have
    no caption are skipped. A log line counts them and names the first ones.

    Args:
      folder: holds the photos: directly, in `images`, in the folders that `filepath` names, or in
        zip archives of these folders, which are read without unpacking.
      annotations: the JSON; empty: the folder's only dataset_*.json. The JSON may also be in a zip
        archive in the folder, such as Karpathy's caption_datasets.zip.

    Raises:
      FileNotFoundError: the folder, the JSON or all photos are missing.
      ValueError: the JSON has another format, or names a photo or an id twice; an archive is not
        complete; or no photo of a split can be decoded.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} (config.data.dir)")
    annotations, content = _find_annotations(folder, annotations)
    photos = _read(annotations, content, folder)
    present = [photo for photo in photos if photo.file and photo.captions]
    for what, skipped in (
        ("without a caption", [photo.filename for photo in photos if not photo.captions]),
        ("missing", [photo.filename for photo in photos if not photo.file]),
    ):
        records.warn(f"{annotations.name}: photos {what}", skipped)
    if not present:
        raise FileNotFoundError(
            f"none of the {len(photos)} photos of {annotations} is in {folder}, {folder / 'images'}"
            ", the folders that the file names, or a zip archive of them"
        )
    source = fingerprint(
        [hashlib.sha256(content).hexdigest(), [photo.file.identity for photo in present]]
    )
    splits: dict[str, list[records.Unread]] = {}
    for photo in present:
        example = records.Unread(
            photo.filename, photo.image_id, photo.captions, functools.partial(_read_photo, photo)
        )
        splits.setdefault(photo.split, []).append(example)
    name = set_name(annotations)
    files = [photo.file for photo in present]
    # identity[1] is the size in bytes, for files in folders and in archives.
    size = sum(file.identity[1] for file in files)
    return records.prepare(name, source, splits, lambda: photo_files.check(files), size)


def set_name(annotations: pathlib.Path) -> str:
    """The set's name: NAME of dataset_NAME.json.

    TFDS reads only names of word characters that begin with an ASCII letter. Other characters
    become "_", and a name that does not begin with a letter gets the prefix "set_".
    """
    name = annotations.stem.removeprefix("dataset_")
    if re.fullmatch(r"[a-zA-Z]\w*", name):
        return name
    name = re.sub(r"\W+", "_", unicodedata.normalize("NFC", name))
    return name if re.match("[a-zA-Z]", name) else f"set_{name}"


def _find_annotations(folder: pathlib.Path, given: str | os.PathLike) -> tuple[pathlib.Path, bytes]:
    """The JSON's path (ARCHIVE.zip/MEMBER if it is in an archive) and its content."""
    if given and pathlib.Path(given).is_file():
        return pathlib.Path(given), pathlib.Path(given).read_bytes()
    files = [file for file in sorted(folder.glob("dataset_*.json")) if file.is_file()]
    found = files or _in_archives(folder)
    if given:
        found = [file for file in found if file.name == str(given)]
        if not found:
            raise FileNotFoundError(f"there is no file {given} (config.data.annotations)")
    # Karpathy's archive holds three sets' JSON. If the folder holds COCO's photos, take COCO's.
    coco = [file for file in found if file.name == "dataset_coco.json"]
    if len(found) > 1 and coco and not coco[0].is_file() and _holds_coco(folder):
        found = coco
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise FileNotFoundError(
            f"{folder} should hold one dataset_*.json, found {names}: name it with "
            "--config.data.annotations=FILE"
        )
    if found[0].is_file():
        return found[0], found[0].read_bytes()
    archive = photo_files.open_archive(found[0].parent)
    return found[0], photo_files.FileInZip(archive, archive.getinfo(found[0].name), ()).unpack()


def _holds_coco(folder: pathlib.Path) -> bool:
    return any([*folder.glob("*2014*"), *folder.glob("images/*2014*")])


def _in_archives(folder: pathlib.Path) -> list[pathlib.Path]:
    """The dataset_*.json files at the top level of a folder's zip archives."""
    return [
        file / name
        for file in sorted(folder.glob("*.zip"))
        for name in photo_files.open_archive(file).namelist()
        if re.fullmatch(r"dataset_[^/]*\.json", name)
    ]


def _read(annotations: pathlib.Path, data: bytes, folder: pathlib.Path) -> list[Photo]:
    """Checks the JSON's entries and finds their files."""
    try:
        content = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{annotations} is not JSON ({error}); {EXPECTED}") from error
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        found = f"keys {sorted(content)}" if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{annotations} holds {found}; {EXPECTED}")
    files = photo_files.PhotoFiles(folder)
    photos = []
    for place, entry in enumerate(content["images"]):
        try:
            filename, filepath = entry["filename"], entry.get("filepath", "")
            captions = [" ".join(sentence["raw"].split()) for sentence in entry["sentences"]]
            image_id = _image_id(entry.get("cocoid", entry.get("imgid", place)))
            split = entry["split"]
            if not all(isinstance(text, str) for text in (filename, filepath, split)):
                raise TypeError("filename, filepath and split should be strings")
            # TFDS would parse "+" and "[" in a split's name; the name "all" means all splits.
            if not re.fullmatch(r"[\w-]+", split) or split == "all":
                raise ValueError(f"{split!r} can't be the name of a split")
            # Fails for half of a surrogate pair, which JSON allows and UTF-8 does not.
            "".join((filename, *captions)).encode()
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            fault = f"lacks {error}" if isinstance(error, KeyError) else f"is malformed: {error}"
            raise ValueError(f"{annotations}: image {place} {fault}; {EXPECTED}") from error
        if not _inside(filename) or (filepath and not _inside(filepath)):
            raise ValueError(f"{annotations}: image {place} is outside of {folder}: {filename}")
        file = files.find(filename, filepath)
        photos.append(Photo(filename, split, image_id, [c for c in captions if c], file))
    for what in ("filename", "image_id"):
        _check_unique(annotations, what, [getattr(photo, what) for photo in photos])
    return photos


def _image_id(value: object) -> int:
    """Checks that an id is not negative and fits into a signed integer of 64 bits."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63:
        raise ValueError(
            f"the id {repr(value)[:40]} is not a whole number from 0 to {(1 << 63) - 1}"
        )
    return value


def _inside(path: str) -> bool:
    parts = pathlib.PurePosixPath(path).parts
    return bool(parts) and ".." not in parts and not path.startswith("/")


def _check_unique(annotations: pathlib.Path, what: str, values: list) -> None:
    seen = set()
    for value in values:
        if value in seen:
            raise ValueError(f"{annotations}: {what} {value!r} occurs twice")
        seen.add(value)


def _read_photo(photo: Photo) -> bytes | None:
    """The photo's bytes, or None if they exceed the limits or can't be decoded."""
    try:
        data = photo.file.read()
        images.check(data)
    except (photo_limits.Refused, images.ImageError) as error:
        log.info("skipped: %s: %s", photo.filename, error)
        return None
    return data


def _open(folder: str, annotations: str) -> PreparedSet:
    builder = prepare(folder, annotations)
    return PreparedSet(builder, builder.name)


DATA_SET = DataSet(_open)
