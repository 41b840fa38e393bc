"""Tag images with the names of a vocabulary, in one or several languages.

IMAGES are files, folders and patterns. A photo may take $XLIR_PHOTO_MB megabytes of memory while it
is read and decoded (default 500); larger ones, and broken ones, are named and skipped.

Examples:
  python -m xlir.main tag --workdir=runs/flickr8k --vocabulary=coco --language=de,ja PHOTOS
  python -m xlir.main tag --workdir=runs/flickr8k --vocabulary=coco --output=- 'PHOTOS/*.jpg' | head
"""

import pathlib
import sys

from absl.flags import FlagValues

from xlir.commands import processes
from xlir.commands.errors import UsageError
from xlir.commands.flags import Flags

WORDS = "IMAGES..."
# What a contact sheet may be.
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".svg")


def define(flags: Flags) -> None:
    """Declares the flags."""
    flags.workdir()
    flags.string(
        "vocabulary",
        "coco, flickr8k, emoji, or a file (a tag a line, or a table of languages as in "
        "input_pipeline/vocabularies).",
        needed=True,
    )
    flags.strings("language", "One language, or several joined with commas.", default="en")
    flags.integer(
        "top_k", "At most so many tags an image; default: 5, with --threshold all.", least=1
    )
    flags.number(
        "threshold",
        "A share, such as 0.98: tags that stand out more than in so many of the pairs of a "
        "held-out photo and a tag. It means the same in every language.",
    )
    flags.string("output", "File for the tags as JSON lines; -: print them instead of the table.")
    flags.string("sheet", f"File for a picture of the first images: {', '.join(PICTURES)}.")


def run(values: FlagValues, *images: str) -> None:
    """Tags images."""
    from input_pipeline import files, photo_limits, vocabularies

    # What can be refused is refused before JAX takes its seconds.
    if not images:
        raise UsageError("tag needs images: files, folders or patterns")
    vocabulary = vocabularies.load(values.vocabulary)
    languages = [language.strip() for language in values.language]
    for language in languages:
        vocabulary.names_in(language)
    if values.threshold is not None and not 0 <= values.threshold <= 1:
        raise UsageError(f"--threshold={values.threshold} is no share, between 0 and 1")
    if values.sheet and not values.sheet.lower().endswith(PICTURES):
        raise UsageError(f"--sheet={values.sheet} should end in {', '.join(PICTURES)}")
    for place in (values.output, values.sheet):
        if place not in (None, "-"):
            files.check_writable(pathlib.Path(place))
    photo_limits.limit()
    # JSON is UTF-8; what a terminal of another encoding can't show is written in escapes.
    encoding = "utf8" if values.output == "-" else None
    sys.stdout.reconfigure(encoding=encoding, errors="backslashreplace")
    processes.start_jax(values)
    from xlir import tagging

    tagging.run(
        pathlib.Path(values.workdir),
        vocabulary,
        languages,
        tagging.find_images(images),
        top_k=values.top_k or (None if values.threshold is not None else 5),
        threshold=values.threshold,
        output=values.output,
        sheet=values.sheet,
    )
