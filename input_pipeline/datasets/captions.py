"""Any captioned set in Karpathy and Li's JSON: COCO, Flickr8k, Flickr30k.

    {"images": [{"filename": "a.jpg", "split": "train", "sentences": [{"raw": "A dog."}, ...]}]}

COCO's file also has `filepath` (train2014 or val2014) and `cocoid`. Karpathy and Li 2015,
"Deep Visual-Semantic Alignments for Generating Image Descriptions".
"""

import concurrent.futures
import hashlib
import io
import json
import logging
import os
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

from PIL import Image

from input_pipeline.cache import fingerprint
from input_pipeline.datasets import records

log = logging.getLogger(__name__)

EXPECTED = (
    'expected Karpathy and Li\'s JSON: {"images": [{"filename", "split", "sentences": [{"raw"}]}]}'
)
# Names that a message lists before it only counts.
NAMED = 3
AHEAD = 256


class Photo(NamedTuple):
    """One entry of the JSON, with the file found for it (None: missing)."""

    filename: str
    split: str
    image_id: int
    captions: list[str]
    file: pathlib.Path | None


def prepare(folder: str | os.PathLike, annotations: str | os.PathLike = "") -> records.Builder:
    """The prepared set of a folder, built into the cache where it is not there yet.

    Photos that are missing, can't be decoded, or have no caption are counted, named and skipped.

    Args:
      folder: holds the photos, in itself, in `images`, or in folders named by `filepath`.
      annotations: the JSON; where not given, the folder's only dataset_*.json.

    Raises:
      FileNotFoundError: no folder, no JSON or no photo is there.
      ValueError: the file is not that JSON, or names a photo or an id twice; or no photo of a split
        can be decoded.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} (config.data.dir)")
    annotations = _find_annotations(folder, annotations)
    photos = _read(annotations, folder)
    present = [photo for photo in photos if photo.file and photo.captions]
    _warn(f"{annotations.name}: photos without a caption", [p for p in photos if not p.captions])
    _warn(f"{annotations.name}: photos missing", [p for p in photos if not p.file])
    if not present:
        raise FileNotFoundError(
            f"none of the {len(photos)} photos of {annotations} is in {folder}, {folder / 'images'}"
            " or the folders that the file names"
        )
    source = fingerprint(
        [
            hashlib.sha256(annotations.read_bytes()).hexdigest(),
            [(str(photo.file.relative_to(folder)), photo.file.stat().st_size) for photo in present],
        ]
    )
    splits: dict[str, list[Photo]] = {}
    for photo in present:
        splits.setdefault(photo.split, []).append(photo)
    return records.Builder(
        annotations.stem.removeprefix("dataset_"),
        source,
        {split: _decodable(chosen) for split, chosen in splits.items()},
        {split: len(chosen) for split, chosen in splits.items()},
    ).prepare()


def _find_annotations(folder: pathlib.Path, given: str | os.PathLike) -> pathlib.Path:
    if given:
        if not pathlib.Path(given).is_file():
            raise FileNotFoundError(f"there is no file {given} (config.data.annotations)")
        return pathlib.Path(given)
    found = sorted(folder.glob("dataset_*.json"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise FileNotFoundError(
            f"{folder} should hold one dataset_*.json, found {names}: name it with "
            "--config.data.annotations=FILE"
        )
    return found[0]


def _read(annotations: pathlib.Path, folder: pathlib.Path) -> list[Photo]:
    """The JSON's entries, checked, with the files found for them."""
    try:
        content = json.loads(annotations.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{annotations} is not JSON ({error}); {EXPECTED}") from error
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        found = f"keys {sorted(content)}" if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{annotations} holds {found}; {EXPECTED}")
    listings: dict[pathlib.Path, set[str]] = {}
    photos = []
    for place, entry in enumerate(content["images"]):
        try:
            filename, filepath = entry["filename"], entry.get("filepath", "")
            captions = [" ".join(sentence["raw"].split()) for sentence in entry["sentences"]]
            image_id = int(entry.get("cocoid", entry.get("imgid", place)))
            split = entry["split"]
            if not all(isinstance(text, str) for text in (filename, filepath, split)):
                raise TypeError("filename, filepath and split should be strings")
            # TFDS parses "+" and "[" in the name of a split, and takes "all" for every split.
            if not re.fullmatch(r"[\w-]+", split) or split == "all":
                raise ValueError(f"{split!r} can't be the name of a split")
            # Half of a surrogate pair is a str but not text that can be stored.
            "".join((filename, *captions)).encode()
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            fault = f"lacks {error}" if isinstance(error, KeyError) else f"is malformed: {error}"
            raise ValueError(f"{annotations}: image {place} {fault}; {EXPECTED}") from error
        if not _inside(filename) or (filepath and not _inside(filepath)):
            raise ValueError(f"{annotations}: image {place} is outside of {folder}: {filename}")
        file = _find(filename, filepath, folder, listings)
        photos.append(Photo(filename, split, image_id, [c for c in captions if c], file))
    for what in ("filename", "image_id"):
        _check_unique(annotations, what, [getattr(photo, what) for photo in photos])
    return photos


def _inside(path: str) -> bool:
    parts = pathlib.PurePosixPath(path).parts
    return bool(parts) and ".." not in parts and not path.startswith("/")


def _find(
    filename: str, filepath: str, folder: pathlib.Path, listings: dict[pathlib.Path, set[str]]
) -> pathlib.Path | None:
    """The photo's file; each folder is listed once, not asked for each of 100,000 photos."""
    for place in (folder / filepath, folder / "images" / filepath, folder / "images", folder):
        if place not in listings:
            listings[place] = set(os.listdir(place)) if place.is_dir() else set()
        # A dangling link, as git-annex leaves them, is listed too: that photo is missing.
        if filename in listings[place] and (place / filename).is_file():
            return place / filename
    return None


def _check_unique(annotations: pathlib.Path, what: str, values: list) -> None:
    seen = set()
    for value in values:
        if value in seen:
            raise ValueError(f"{annotations}: {what} {value!r} stands there twice")
        seen.add(value)


def _decodable(photos: list[Photo]) -> Iterator[records.Example]:
    """The photos that can be decoded, in order; threads decode ahead."""
    broken = []
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(photos), AHEAD):
            block = photos[start : start + AHEAD]
            for photo, data in zip(block, pool.map(_read_photo, block), strict=True):
                if data is None:
                    broken.append(photo)
                else:
                    yield data, photo.filename, photo.image_id, photo.captions
    _warn("photos that can't be decoded", broken)
    if len(broken) == len(photos):
        raise ValueError(f"no photo of split {photos[0].split!r} can be decoded")


def _read_photo(photo: Photo) -> bytes | None:
    """The photo's bytes, or None where decoding them fails anywhere."""
    data = photo.file.read_bytes()
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return data


def _warn(what: str, photos: list[Photo]) -> None:
    """One line that counts and names what is skipped."""
    if photos:
        names = ", ".join(photo.filename for photo in photos[:NAMED])
        more = ", ..." if len(photos) > NAMED else ""
        log.warning("%s, skipped: %d (%s%s)", what, len(photos), names, more)
