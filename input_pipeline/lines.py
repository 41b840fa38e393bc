"""Files with one text per line, and the order of languages."""

import pathlib


def read_lines(file: pathlib.Path) -> list[str]:
    """The lines of a file, split only at LF and CRLF: captions may hold other line separators."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error})") from error
    lines = [line.removesuffix("\r").strip() for line in text.rstrip("\r\n").split("\n")]
    if "" in lines:
        raise ValueError(f"{file}: line {lines.index('') + 1} is empty")
    return lines


def english_first(lines: dict[str, list[str]]) -> dict[str, list[str]]:
    """The same mapping with English first and the other languages sorted by their codes."""
    languages = sorted(lines, key=lambda language: (language != "en", language))
    return {language: lines[language] for language in languages}
