"""Filters: which photos of an index a search considers.

A filter is terms joined by `and`, each of which may begin with `not`:

    folder holidays/greece and taken 2023-06..2023-08 and not name *.png

- `folder NAME/NAME`: photos in or below a folder whose path has these names, one directly after
  the other. With a leading slash, the path must begin with them. Case does not matter.
- `name PATTERN`: the file's name, with `*` for any text. Case does not matter.
- `taken DATE` or `taken DATE..DATE`: when the photo was taken. Both dates are included, and either
  may be missing. A date is 2023, 2023-06 or 2023-06-15.
- `width N..N`, `height N..N`: pixels. Both bounds are included, and either may be missing.

A value with spaces is put in quotes.
"""

import calendar
import dataclasses
import datetime
import re
import shlex
import unicodedata

_RANGES = ("taken", "width", "height")
COLUMNS = ("folder", "name", *_RANGES)
# The largest width and height that an index holds; bounds are clipped to it.
LARGEST = (1 << 31) - 1


@dataclasses.dataclass(frozen=True)
class Term:
    """One condition on a photo.

    Attributes:
      column: the column of an index that is compared: "folder", "name" or one of the ranges.
      pattern: for folder and name, case-folded text in which "*" stands for any text. None for
        ranges.
      least, most: for ranges, the bounds, which are included. None means no bound. The bounds of
        `taken` are seconds since 1970.
      negated: whether the condition is reversed, so that photos must not match it.
    """

    column: str
    pattern: str | None = None
    least: int | None = None
    most: int | None = None
    negated: bool = False


Filter = tuple[Term, ...]


def parse(text: str) -> Filter:
    """Reads a filter; an empty text matches all photos.

    Raises:
      ValueError: the text is not a filter; the message says what is wrong with it.
    """
    lexer = shlex.shlex(text, posix=True)
    lexer.whitespace_split, lexer.commenters, lexer.escape = True, "", ""
    try:
        words = list(lexer)
    except ValueError as error:
        raise ValueError(f"the filter {text!r} has a quote that is not closed") from error
    terms: list[Term] = []
    while words:
        if terms:
            _expect(words, "and", text)
        negated = words[0].lower() == "not" if words else False
        column, value = _pair(words[1:] if negated else words, text)
        del words[: 3 if negated else 2]
        terms.append(dataclasses.replace(_term(column, value), negated=negated))
    return tuple(terms)


def _expect(words: list[str], word: str, text: str) -> None:
    if words[0].lower() != word or len(words) == 1:
        raise ValueError(
            f"the filter {text!r} is not valid at {words[0]!r}: join terms with 'and', and put "
            "values with spaces in quotes"
        )
    del words[0]


def _pair(words: list[str], text: str) -> tuple[str, str]:
    column = words[0].lower() if words else ""
    if column not in COLUMNS:
        raise ValueError(
            f"the filter {text!r} has a term that does not begin with {', '.join(COLUMNS)}"
        )
    if len(words) == 1:
        raise ValueError(f"the filter {text!r} lacks a value for {column}")
    return column, words[1]


def _term(column: str, value: str) -> Term:
    if column == "folder":
        return Term(column, _folder_pattern(value))
    if column == "name":
        return Term(column, folded(value))
    first, dots, last = value.partition("..")
    bound = _date if column == "taken" else _number
    least = bound(first, column, last=False) if first else None
    most = bound(last if dots else first, column, last=True) if (last or not dots) else None
    if least is not None and most is not None and least > most:
        raise ValueError(f"{column} {value} begins after it ends: put the smaller bound first")
    return Term(column, least=least, most=most)


def _folder_pattern(value: str) -> str:
    """The pattern of "/greece/" anywhere in a path or, with a leading slash, at its beginning."""
    parts = [part for part in folded(value).split("/") if part]
    names = f"/{'/'.join(parts)}/" if parts else "/"
    return f"{names}*" if value.startswith("/") else f"*{names}*"


def folded(value: str) -> str:
    """The same text for all texts that differ only in case or in the Unicode form of accents."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", value).casefold())


def _number(value: str, column: str, *, last: bool) -> int:
    if not (value.isascii() and value.isdecimal()):
        raise ValueError(f"{column} takes whole numbers such as 1000..2000, not {value!r}")
    digits = value.lstrip("0") or "0"
    return min(int(digits[:20]), LARGEST)


def _date(value: str, column: str, *, last: bool) -> int:
    """The first or the last second of a year, month or day."""
    found = re.fullmatch(r"(\d{4})(?:-(\d\d?))?(?:-(\d\d?))?", value, re.ASCII)
    try:
        year, month, day = (int(part) if part else None for part in found.groups())
        if not last:
            return _seconds(year, 1 if month is None else month, 1 if day is None else day)
        month = 12 if month is None else month
        day = calendar.monthrange(year, month)[1] if day is None else day
        return _seconds(year, month, day) + 24 * 3600 - 1
    except (AttributeError, ValueError, calendar.IllegalMonthError) as error:
        raise ValueError(
            f"{column} takes dates such as 2023, 2023-06 or 2023-06-15..2023-07, not {value!r}"
        ) from error


def _seconds(year: int, month: int, day: int) -> int:
    return int((datetime.date(year, month, day) - datetime.date(1970, 1, 1)).total_seconds())
