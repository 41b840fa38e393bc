"""Files with one text per line, and the order of languages."""

import gzip
import pathlib
import zlib


def read_lines(file: pathlib.Path) -> list[str]:
    """The lines of a file, split only at LF and CRLF: captions may hold other line separators.

    A file whose name ends in .gz is decompressed.

    Raises:
      OSError: the file is missing or can't be read.
      ValueError: the file is not UTF-8, its compressed content is damaged, or a line is empty.
    """
    try:
        data = file.read_bytes()
        text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode("utf-8-sig")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error})") from error
    lines = [line.removesuffix("\r").strip() for line in text.rstrip("\r\n").split("\n")]
    if "" in lines:
        raise ValueError(f"{file}: line {lines.index('') + 1} is empty")
    return lines


def english_first(lines: dict[str, list]) -> dict[str, list]:
    """The same mapping with English first and the other languages sorted by their codes."""
    languages = sorted(lines, key=lambda language: (language != "en", language))
    return {language: lines[language] for language in languages}
