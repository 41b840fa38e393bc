"""Turns photos into the rows of a store."""

import dataclasses
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from xlir.encoder import Encoder, encode_each
from xlir.search import photos
from xlir.search.stores import Store, schema

# Photos are stored when there are this many, or after this many seconds.
ROWS_AT_ONCE, SECONDS_AT_ONCE = 512, 5.0


def embedded(
    encoder: Encoder, found: Iterable[photos.Photo], skip: Callable[[str], None]
) -> Iterator[pa.Table]:
    """Embeds photos; yields their rows when there are enough, or after some seconds.

    Args:
      encoder: computes the embeddings.
      found: the photos, in the order of `photos.find`.
      skip: called with one line for each photo that can't be read or decoded.
    """
    waiting, since = [], time.monotonic()
    for part in _batches(encoder, found, skip):
        waiting.append(part)
        full = sum(map(len, waiting)) >= ROWS_AT_ONCE
        if full or time.monotonic() - since >= SECONDS_AT_ONCE:
            yield pa.concat_tables(waiting)
            waiting, since = [], time.monotonic()
    if waiting:
        yield pa.concat_tables(waiting)


def table(
    batch: Sequence[photos.Photo],
    described: Sequence[photos.Described],
    vectors: Float[np.ndarray, "photos dim"],
) -> pa.Table:
    """The rows of photos in the columns of a store."""
    columns = {
        "id": [photo.id for photo in batch],
        "path": [photo.path for photo in batch],
        "folder": [photos.folder_of(photo.path) for photo in batch],
        "name": [photos.name_of(photo.path) for photo in batch],
        "size": [photo.size for photo in batch],
        "modified": [photo.modified for photo in batch],
    }
    for field in dataclasses.fields(photos.Described):
        columns[field.name] = [getattr(one, field.name) for one in described]
    flat = pa.array(vectors.astype(np.float16).reshape(-1))
    columns["vector"] = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    return pa.table(columns, schema=schema(vectors.shape[1]))


def _batches(
    encoder: Encoder, found: Iterable[photos.Photo], skip: Callable[[str], None]
) -> Iterator[pa.Table]:
    decode = encoder.embedder.decode

    def read(photo: photos.Photo) -> tuple[np.ndarray, photos.Described]:
        data = photo.read()
        try:
            described = photos.describe(data, photo.modified)
            return decode(data, photo.path), described
        except ValueError as error:
            text = str(error)
            named = text if text.startswith(photo.path) else f"{photo.path}: {text}"
            raise ValueError(named) from error

    in_order = (photos.loaded(photo) for photo in found)
    for batch, described, vectors in encode_each(encoder, in_order, read, skip):
        yield table(batch, described, vectors)


def read_embeddings(
    vectors: pathlib.Path, paths: pathlib.Path, dim: int
) -> tuple[Float[np.ndarray, "photos dim"], list[str]]:
    """Maps embeddings from elsewhere into memory, and reads the path of each row's photo.

    Args:
      vectors: a .npy file.
      paths: a text file with one path per line.
      dim: the width that the embeddings must have.

    Raises:
      ValueError: the files do not match each other or the index, or a path occurs twice.
    """
    array = np.load(vectors, mmap_mode="r", allow_pickle=False)
    named = paths.read_text(encoding="utf8").splitlines()
    if array.ndim != 2 or array.shape[1] != dim or len(array) != len(named):
        raise ValueError(
            f"{vectors} has the shape {list(array.shape)}; for this index and the "
            f"{len(named):,} paths in {paths}, it should be [{len(named)}, {dim}]"
        )
    if len(set(named)) < len(named):
        raise ValueError(f"{paths} names a path twice")
    return array, named


def known(store: Store) -> dict[str, tuple[int, int]]:
    """Id -> (size, modified) of all photos in a store."""
    found = {}
    for batch in store.scan(["id", "size", "modified"]):
        columns = (batch[name].to_pylist() for name in ("id", "size", "modified"))
        found |= {name: (size, modified) for name, size, modified in zip(*columns, strict=True)}
    return found


def gone(
    store: Store, places: Sequence[str | os.PathLike], found: set[str], unread: Sequence[str]
) -> list[str]:
    """The ids of a store's photos that were in some places and are no longer found there.

    Photos whose folder or archive can't be read now are not among them.

    Args:
      store: holds the photos.
      places: see `photos.find`.
      found: the ids of the photos that were found there.
      unread: the lines about folders and archives that could not be read.

    Raises:
      ValueError: no photo was found at all.
    """
    if not found:
        raise ValueError(
            f"no photos are found in {', '.join(map(os.fspath, places))}, so nothing is "
            "removed from the index. Is a disk not mounted?"
        )
    prefixes = tuple(f"{root.rstrip('/')}/" for root in photos.roots(places))

    def is_gone(name: str, path: str) -> bool:
        if name in found or not path.startswith(prefixes):
            return False
        folders = [str(folder) for folder in pathlib.Path(path).parents]
        lines = tuple(folder + end for folder in folders for end in (":", " "))
        return not any(line.startswith(lines) for line in unread)

    return [
        name
        for batch in store.scan(["id", "path"])
        for name, path in zip(*(batch[x].to_pylist() for x in ("id", "path")), strict=True)
        if is_gone(name, path)
    ]
