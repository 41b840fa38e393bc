"""Where `tag` and `search` write: the flags --output and --sheet, and standard output."""

import contextlib
import pathlib
import sys
from collections.abc import Iterator
from typing import TextIO

from absl.flags import FlagValues

from input_pipeline import files
from xlir.commands.errors import UsageError
from xlir.commands.flags import Flags

# File name extensions of a contact sheet.
SHEET_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".svg")


def define(flags: Flags, results: str, pictures: str) -> None:
    """Declares the flags.

    Args:
      flags: the flags of the verb.
      results: what the JSON lines hold.
      pictures: what the contact sheet shows.
    """
    flags.string(
        "output",
        f"File for {results} as JSON lines; with -, they are printed instead of a table.",
    )
    flags.string(
        "sheet",
        f"File for a contact sheet, a picture of {pictures} ({', '.join(SHEET_SUFFIXES)}).",
    )


def check(values: FlagValues) -> None:
    """Raises an error if a file can't be written; prepares standard output for any language."""
    if values.sheet and not values.sheet.lower().endswith(SHEET_SUFFIXES):
        raise UsageError(f"--sheet={values.sheet} should end in {', '.join(SHEET_SUFFIXES)}")
    for place in (values.output, values.sheet):
        if place not in (None, "-"):
            files.check_writable(pathlib.Path(place))
    # JSON is UTF-8. In the table, characters that the terminal's encoding lacks are escaped.
    encoding = "utf8" if values.output == "-" else None
    sys.stdout.reconfigure(encoding=encoding, errors="backslashreplace")


@contextlib.contextmanager
def opened(output: str | None) -> Iterator[TextIO | None]:
    """Where JSON lines are written: a file, standard output for "-", or None."""
    if output in (None, "-"):
        yield sys.stdout if output else None
    else:
        with open(output, "w", encoding="utf8") as file:
            yield file
