"""Photos with captions in the files that others publish or that img2dataset writes.

- Tar archives of img2dataset or of webdataset, compressed or not: members with the same name up to
  the first dot belong together, such as 000000012.jpg, 000000012.txt (the caption) and
  000000012.json (https://github.com/rom1504/img2dataset).
- Parquet files with a column of photos' bytes, as img2dataset or Hugging Face's `datasets` write
  them (there, a photo is a group with the field `bytes`).

`captions` (in JSON or Parquet) or several texts in a column are several captions of one photo.
"""

import contextlib
import json
import os
import pathlib
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from input_pipeline import archives, photo_limits

PHOTOS = ("jpg", "jpeg", "png", "webp", "image")
CAPTIONS = ("captions", "caption", "text", "txt", "TEXT", "CAPTION")
LANGUAGES = ("language", "LANGUAGE", "lang", "LANG")
# Bytes of a caption's or a JSON's member; larger ones are no captions.
LARGEST_TEXT = 1 << 20
# Rows of a Parquet file that are read at a time.
ROWS = 64


class Pair(NamedTuple):
    """A photo with its captions.

    Attributes:
      name: the name of the photo's file: the last part of its URL, if that is known.
      captions: its captions, with single spaces; may be empty.
      language: the code of the captions' language, or empty.
      image: the bytes of its file; None: it is missing, or too large for a photo.
    """

    name: str
    captions: list[str]
    language: str
    image: bytes | None


def is_tar(path: str | os.PathLike) -> bool:
    """Whether a file is taken for a tar archive, by its name."""
    return os.fspath(path).lower().endswith(archives.TAR_SUFFIXES)


def read(file: pathlib.Path) -> Iterator[Pair]:
    """The pairs of a tar archive or a Parquet file, in order, one at a time.

    Raises:
      ValueError: the file is of another kind, or has no column of photos or of captions.
      archives.DAMAGED: it is damaged; the pairs before the damage are yielded.
    """
    if is_tar(file):
        return _of_tar(file)
    if file.suffix == ".parquet":
        return _of_parquet(file)
    raise ValueError(f"{file} is neither a tar archive nor a Parquet file")


def _of_tar(file: pathlib.Path) -> Iterator[Pair]:
    key, parts = "", {}
    for path, size, _, member in archives.members(str(file)):
        folder, _, name = path.rpartition("/")
        stem, _, kind = name.partition(".")
        if f"{folder}/{stem}" != key and parts:
            yield _pair(key, parts)
            parts = {}
        key, kind = f"{folder}/{stem}", kind.lower()
        if kind in PHOTOS:
            parts[kind] = _at_most(photo_limits.limit(), size, member)
        elif kind in ("txt", "json"):
            parts[kind] = _at_most(LARGEST_TEXT, size, member)
    if parts:
        yield _pair(key, parts)


def _at_most(limit: int, size: int, member: Callable[[], bytes]) -> bytes | None:
    """A member's bytes, or None if there are more than the limit."""
    return member() if size <= limit else None


def _pair(key: str, parts: dict[str, bytes | None]) -> Pair:
    """The pair of the members with one name."""
    fields: Any = None
    with contextlib.suppress(ValueError, RecursionError):  # the caption may be in the .txt
        fields = json.loads(parts.get("json") or b"{}")
    fields = fields if isinstance(fields, dict) else {}
    if "captions" not in fields and parts.get("txt"):
        fields["caption"] = parts["txt"].decode(errors="replace")
    photos = {kind: parts[kind] for kind in PHOTOS if kind in parts}
    return _of_fields({"key": key, **fields, **photos})


def _of_fields(fields: Mapping[str, Any]) -> Pair:
    """The pair of the fields of a JSON, or of the columns of a row."""
    photo = _first(fields, PHOTOS)
    if isinstance(photo, Mapping):
        fields = {"key": photo.get("path"), **fields}
        photo = photo.get("bytes")
    texts = _first(fields, CAPTIONS)
    texts = texts if isinstance(texts, list) else [texts]
    captions = [" ".join(text.split()) for text in texts if isinstance(text, str)]
    url, language = fields.get("url"), _first(fields, LANGUAGES)
    path = str(fields.get("key") or "")
    if isinstance(url, str):
        path = urllib.parse.unquote(url.partition("?")[0].partition("#")[0])
    return Pair(
        name=path.rpartition("/")[2],
        captions=[caption for caption in captions if caption],
        language=language if isinstance(language, str) else "",
        image=photo if isinstance(photo, bytes) and len(photo) <= photo_limits.limit() else None,
    )


def _first(fields: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """The first field of these names that has a value."""
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def _of_parquet(file: pathlib.Path) -> Iterator[Pair]:
    import pyarrow.parquet  # imported here, because it takes a second

    table = pyarrow.parquet.ParquetFile(file)
    there = table.schema_arrow.names
    for what, names in (("photos", PHOTOS), ("captions", CAPTIONS)):
        if not set(names) & set(there):
            raise ValueError(
                f"{file} has no column of {what} ({', '.join(names)}); it has {', '.join(there)}"
            )
    columns = [name for name in there if name in (*PHOTOS, *CAPTIONS, *LANGUAGES, "url", "key")]
    for batch in table.iter_batches(ROWS, columns=columns):
        for row in batch.to_pylist():
            yield _of_fields(row)
