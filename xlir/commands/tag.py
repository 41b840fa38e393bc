"""Tag images with the names of a vocabulary, in one or several languages.

IMAGES are files, folders (searched at any depth) and patterns. A photo may take $XLIR_PHOTO_MB
megabytes of memory while it is read and decoded (default: 500). Larger photos and broken photos are
skipped; the log counts and names them.

The number beside a tag is its calibrated percentile, a measure of how far the tag stands out among
the photo's best tags: 0.98 means that 98% of all pairs of a validation photo and a tag stand out
less. If the run's data set is missing, the number is the cosine similarity of image and tag.

Examples:
  python -m xlir.main tag --workdir=runs/flickr8k --vocabulary=coco --language=de,ja PHOTOS
  python -m xlir.main tag --workdir=runs/flickr8k --vocabulary=coco --threshold=0.99 \\
      --output=tags.jsonl --sheet=tags.png PHOTOS
"""

import dataclasses
import glob
import json
import logging
import os
import pathlib
import sys
from collections.abc import Sequence

from absl.flags import FlagValues

from input_pipeline import files, photo_limits
from xlir.commands import outputs, processes
from xlir.commands.errors import UsageError
from xlir.commands.flags import Flags

log = logging.getLogger(__name__)

WORDS = "IMAGES..."


def define(flags: Flags) -> None:
    """Declares the flags."""
    flags.workdir()
    flags.string(
        "vocabulary",
        "coco, flickr8k, emoji, or a file: one tag per line, or a table of languages as in "
        "input_pipeline/vocabularies.",
        needed=True,
    )
    flags.strings(
        "language", "One language, or several joined with commas; default: en.", default="en"
    )
    flags.integer(
        "top_k",
        "Largest number of tags for an image; default: 5, or no limit with --threshold.",
        least=1,
    )
    flags.number(
        "threshold",
        "Keep only tags with at least this calibrated percentile, from 0 to 1. With 0.99, 1% of "
        "the vocabulary become tags of a photo on average, in every language.",
    )
    outputs.define(flags, "the tags", "the first images with their tags")


def run(values: FlagValues, *images: str) -> None:
    """Tags images."""
    # Invalid values are refused before JAX is imported, which takes seconds.
    _check(values, images)
    from input_pipeline import vocabularies

    vocabulary = vocabularies.load(values.vocabulary)
    languages = list(dict.fromkeys(language.strip() for language in values.language))
    for language in languages:
        vocabulary.names_in(language)
    found = find_images(images)
    photo_limits.limit()
    processes.start_jax(values)
    from xlir.encoder import Encoder

    workdir = pathlib.Path(values.workdir)
    encoder = Encoder.load(workdir)
    taggers = _taggers(encoder, workdir, vocabulary, languages)
    if values.threshold is not None:
        # Fails now, not after the first batch, if there are no validation photos to calibrate with.
        next(iter(taggers.values())).prominence_at(values.threshold)
    sheet = _tag(encoder, taggers, found, values)
    if values.sheet:
        _draw(sheet, pathlib.Path(values.sheet))


def _check(values: FlagValues, images: Sequence[str]) -> None:
    """Refuses invalid values of flags, and files that can't be written."""
    if not images:
        raise UsageError("tag needs images: files, folders or patterns")
    if not values.language:
        raise UsageError("--language= names no language")
    if values.threshold is not None and not 0 <= values.threshold <= 1:
        raise UsageError(f"--threshold={values.threshold} is not between 0 and 1")
    outputs.check(values)


def find_images(paths: Sequence[str]) -> list[pathlib.Path]:
    """The image files that the paths name: files, folders (at any depth) or patterns.

    Raises:
      FileNotFoundError: a path does not exist, or there are no images.
    """
    from xlir.search.photos import SUFFIXES

    found: dict[pathlib.Path, None] = {}
    for path in paths:
        places = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        if not places:
            raise FileNotFoundError(f"there is no image {path}")
        for place in map(pathlib.Path, places):
            if place.is_dir():
                inside = sorted(place.rglob("*"))
                images = [file for file in inside if file.suffix.lower() in SUFFIXES]
            else:
                # A file named on the command line counts as an image, whatever its extension.
                images = [place]
            found |= dict.fromkeys(images)
    if not found:
        raise FileNotFoundError(f"there are no images in {', '.join(paths)}")
    return list(found)


def _taggers(encoder, workdir: pathlib.Path, vocabulary, languages: Sequence[str]) -> dict:
    """A tagger for each language; it scores by cosine if the run's data set is missing."""
    from xlir import reference_photos, tagging

    photos = None
    try:
        photos = reference_photos.reference(encoder, workdir)
    except (ValueError, FileNotFoundError) as error:
        reason, *_ = str(error).splitlines()
        log.warning(
            "scores are plain cosines, because there are no calibrated percentiles: %s", reason
        )
    return {
        language: tagging.Tagger(encoder, vocabulary, language, photos) for language in languages
    }


def _tag(
    encoder, taggers: dict, images: Sequence[pathlib.Path], values: FlagValues
) -> list[tuple[pathlib.Path, list[dict]]]:
    """Tags the images and prints the tags; returns the records for the contact sheet.

    Files that can't be decoded are skipped, with one line in the log for each, and counted.

    Raises:
      ValueError: no file can be decoded.
    """
    from xlir import tagging

    skipped: list[str] = []
    sheet: list[tuple[pathlib.Path, list[dict]]] = []

    def skip(reason: str) -> None:
        skipped.append(reason)
        log.warning("skipped: %s", files.printable(reason))

    top_k = values.top_k or (None if values.threshold is not None else 5)
    with outputs.opened(values.output) as output:
        for batch, embeddings in tagging.embed_files(encoder, images, skip):
            tags = {
                language: tagger.tag(embeddings, top_k, values.threshold)
                for language, tagger in taggers.items()
            }
            for row, file in enumerate(batch):
                records = [record(file, language, tags[language][row]) for language in tags]
                if output:
                    output.writelines(json_line(one) + "\n" for one in records)
                if output is not sys.stdout:
                    print(_table_rows(records))
                if len(sheet) < tagging.SHEET_PHOTOS:
                    sheet.append((file, records))
    if skipped:
        log.warning("%d of %d images were skipped", len(skipped), len(images))
    if len(skipped) == len(images):
        raise ValueError("none of the images can be decoded")
    return sheet


def record(file: pathlib.Path, language: str, tags: Sequence) -> dict:
    """The tags of an image in a language, each with the fields of `xlir.tagging.Tag`."""
    return {
        "image": str(file),
        "language": language,
        "tags": [dataclasses.asdict(tag) for tag in tags],
    }


def json_line(record: dict) -> str:
    r"""A record as one line of JSON.

    A byte of a file name that is not UTF-8, such as 0xe9, is escaped as \udce9 (PEP 383): Python's
    `os.fsencode(json.loads(line)["image"])` is the name again, byte for byte.
    """
    tags = [
        {key: round(value, 5) if isinstance(value, float) else value for key, value in tag.items()}
        for tag in record["tags"]
    ]
    line = json.dumps({**record, "tags": tags}, ensure_ascii=False)
    return line.encode("utf8", "backslashreplace").decode()


def _table_rows(records: Sequence[dict]) -> str:
    """An image's tags for the terminal, a row per language; the first row has the file name."""
    rows = []
    name = files.printable(records[0]["image"])
    for one in records:
        cells = [
            f"{tag['name']} {tag['cosine'] if tag['percentile'] is None else tag['percentile']:.3f}"
            for tag in one["tags"]
        ]
        rows.append(f"{name:<40}  {one['language']:<3} {', '.join(cells) or '-'}")
        name = ""
    return "\n".join(rows)


def _draw(sheet: Sequence[tuple[pathlib.Path, list[dict]]], file: pathlib.Path) -> None:
    """Draws a contact sheet of images with their best tags in each language."""
    from xlir import figures, tagging

    tags: dict[str, list[list[str]]] = {}
    for _, records in sheet:
        for one in records:
            names = [tag["name"] for tag in one["tags"][: tagging.SHEET_TAGS]]
            tags.setdefault(one["language"], []).append(names)
    figures.plot_tags([image for image, _ in sheet], tags, file)
