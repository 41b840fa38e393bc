"""An index: the embeddings of photos, and the encoder that embeds queries.

    index = xlir.Index.create("photos.index", "runs/flickr8k")
    index.add(["/photos"])
    for hit in index.search("ein Hund am Strand"):
        print(hit.path, hit.cosine)

The folder of an index holds what a search needs: `index.json`, the encoder as a run's folder
(`encoder/`) and, unless a server stores them, the photos' rows (`store/`). It holds no photos.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Float
from tqdm import tqdm

from input_pipeline import files
from xlir import search
from xlir.decoding import Photo as AnyPhoto
from xlir.encoder import Encoder
from xlir.search import calibration, filters, photo_rows, photos, stores
from xlir.search.query import combined

log = logging.getLogger(__name__)

AnyPath = str | os.PathLike
VERSION = 1
INDEX_FILE, LOCK_FILE, ENCODER, STORE = "index.json", ".lock", "encoder", "store"
# The number of rows that `Index.add_embeddings` stores at a time.
EMBEDDED_AT_ONCE = 50_000


@dataclasses.dataclass(frozen=True)
class Hit:
    """A photo that a search found.

    Attributes:
      id: identifies the photo in the index.
      path: where the photo is (or was when it was indexed).
      cosine: cosine similarity of query and photo, -1 to 1.
      percentile: how well the photo fits a text query, 0 to 1 (`xlir.search.calibration`); None
        for queries with a photo, and if the index is not calibrated.
      taken: when it was taken, in seconds since 1970 by the camera's clock.
      width, height: of the photo, in pixels.
      size: of its file, in bytes.
    """

    id: str
    path: str
    cosine: float
    percentile: float | None
    taken: int
    width: int
    height: int
    size: int


# The fields of a hit that are columns of the store.
FIELDS = ("id", "path", "taken", "width", "height", "size")


@dataclasses.dataclass(frozen=True)
class Added:
    """What `Index.add` did, as numbers of photos."""

    new: int
    changed: int
    unchanged: int
    skipped: int
    removed: int


class Index:
    """The index of photos in a folder. Use `create` or `open` to get one.

    Attributes:
      folder: the folder.
      store: the address of the server that stores the rows; None if they are in the folder.
      calibration: computes the percentiles; None if the index is not calibrated.
      engine: the engine of the encoder.
    """

    def __init__(self, folder: pathlib.Path, content: Mapping, engine: str = "jax"):
        self.folder, self.store, self.engine = folder, content.get("store"), engine
        self._dim = int(content["dim"])
        self._store = stores.opened(folder / STORE, content)
        self.calibration = calibration.Calibration.read(folder, self._dim)

    @classmethod
    def create(
        cls, folder: AnyPath, workdir: AnyPath, store: str | None = None, engine: str = "jax"
    ) -> "Index":
        """A new index, with a copy of a run's encoder.

        Args:
          folder: the folder of the index; must not exist, or be empty.
          workdir: the folder of a run.
          store: a Milvus collection for the photos' rows, `milvus://HOST:PORT/COLLECTION`.
          engine: as `Encoder.load`; the graphs that it reads are copied into the index.

        Raises:
          ValueError: the folder is not empty, or the store failed.
          FileNotFoundError, ValueError: as `Encoder.load`.
        """
        folder = pathlib.Path(folder)
        if is_index(folder):
            raise ValueError(f"{folder} is an index already: open it")
        # Leftovers of an interrupted `create` are overwritten.
        ours = {ENCODER, STORE, LOCK_FILE, calibration.FILE}
        if folder.exists() and set(os.listdir(folder)) - ours:
            raise ValueError(f"{folder} is not empty and not an index: choose another folder")
        encoder = Encoder.load(workdir, engine=engine)
        files.make_writable_folder(folder)
        with _locked(folder):
            shutil.rmtree(folder / ENCODER, ignore_errors=True)
            encoder.save_run(folder / ENCODER)
            calibrated = calibration.of_run(encoder, pathlib.Path(workdir))
            if calibrated is not None:
                calibrated.write(folder)
            content = {
                "version": VERSION,
                "dim": encoder.config.embedding_dim,
                "model": encoder.fingerprint(),
                "store": store,
            }
            stores.opened(folder / STORE, content, create=True)
            files.write_whole(folder / INDEX_FILE, json.dumps(content, indent=1))
        index = cls(folder, content, engine)
        index.encoder = encoder
        return index

    @classmethod
    def open(cls, folder: AnyPath, workdir: AnyPath | None = None, engine: str = "jax") -> "Index":
        """An existing index.

        Args:
          folder: the folder of the index.
          workdir: if given, a run; the index must have been made with the same model.
          engine: as `Encoder.load`.

        Raises:
          FileNotFoundError: the folder is not an index.
          ValueError: a file is damaged, or the index was made with another model.
        """
        folder = pathlib.Path(folder)
        if not is_index(folder):
            raise FileNotFoundError(f"{folder} is not an index (it has no {INDEX_FILE})")
        try:
            content = json.loads((folder / INDEX_FILE).read_text(encoding="utf8"))
            version, _, model = content["version"], int(content["dim"]), content["model"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{folder / INDEX_FILE} is damaged: restore it from a copy, or make the index again"
            ) from error
        if version != VERSION:
            raise ValueError(f"{folder} was made by another version of xlir: make the index again")
        index = cls(folder, content, engine)
        if workdir is not None:
            encoder = Encoder.load(workdir, engine=engine)
            if encoder.fingerprint() != model:
                raise ValueError(
                    f"{folder} was made with another model than that of {workdir}, so their "
                    "embeddings can't be compared. Use another index, or leave --workdir out"
                )
            index.encoder = encoder
        return index

    @functools.cached_property
    def encoder(self) -> Encoder:
        """Embeds photos and queries; loaded on first use."""
        return Encoder.load(self.folder / ENCODER, engine=self.engine)

    def add(
        self,
        places: Sequence[AnyPath],
        *,
        exclude: Sequence[str] = (),
        prune: bool = False,
        engine: Literal["ray"] | None = None,
        skip: Callable[[str], None] = log.warning,
    ) -> Added:
        """Embeds the photos that are new or have changed since they were indexed.

        Rows are stored every few seconds. So if a call is interrupted, the next one resumes it.

        Args:
          places, exclude: see `photos.find`.
          prune: remove from the index photos that were in these places and are no longer there.
          engine: "ray" to embed on the machines of a cluster (`xlir.search.fleet`).
          skip: called with one line for each photo that can't be read or decoded.

        Raises:
          FileNotFoundError: a place does not exist.
          ValueError: another process is changing the index, or the store failed.
        """
        with _locked(self.folder):
            self._store.refresh()
            known = photo_rows.known(self._store)
            found, wanted, unread = set(), 0, []
            for photo in photos.find(places, exclude, unread.append):
                found.add(photo.id)
                wanted += _differs(photo, known)
            for reason in unread:
                skip(reason)
            skipped: list[str] = []

            def note(reason: str) -> None:
                skipped.append(reason)
                skip(reason)

            todo = (photo for photo in photos.find(places, exclude) if _differs(photo, known))
            new = changed = 0
            with tqdm(total=wanted, desc="indexing", unit="") as bar:
                for rows in self._embedded(todo, note, engine) if wanted else ():
                    old = sum(name in known for name in rows["id"].to_pylist())
                    (self._store.replace if old else self._store.add)(rows)
                    new, changed = new + len(rows) - old, changed + old
                    bar.update(len(rows))
            gone = photo_rows.gone(self._store, places, found, unread) if prune else []
            self._store.remove(gone)
            if wanted or gone:
                self._store.optimize()
        unchanged = len(found) - wanted
        return Added(new, changed, unchanged, skipped=len(skipped), removed=len(gone))

    def add_embeddings(self, vectors: AnyPath, paths: AnyPath) -> Added:
        """Adds photos that were embedded elsewhere by the model of this index.

        Such photos have no size, time or thumbnail in the index.

        Args:
          vectors: a .npy file, [photos, dim], without zero rows.
          paths: a text file with the path of each row's photo.

        Raises:
          ValueError: the shapes of the files and the index differ, or a row or path is not valid.
        """
        array, named = photo_rows.read_embeddings(
            pathlib.Path(vectors), pathlib.Path(paths), self._dim
        )
        found = [photos.Photo(path, path, 0, 0, bytes) for path in map(os.path.realpath, named)]
        with _locked(self.folder):
            self._store.refresh()
            known = photo_rows.known(self._store)
            old = sum(photo.id in known for photo in found)
            for start in tqdm(range(0, len(found), EMBEDDED_AT_ONCE), desc="indexing", unit=""):
                batch = found[start : start + EMBEDDED_AT_ONCE]
                part = np.asarray(array[start : start + EMBEDDED_AT_ONCE], np.float32)
                lengths = np.linalg.norm(part, axis=1, keepdims=True)
                if not (np.isfinite(lengths) & (lengths > 0)).all():
                    raise ValueError(f"{vectors} has a row that is zero or not finite")
                described = [photos.Described(0, 0, 0, b"")] * len(batch)
                rows = photo_rows.table(batch, described, part / lengths)
                (self._store.replace if old else self._store.add)(rows)
            self._store.optimize()
        return Added(len(found) - old, old, 0, 0, 0)

    def remove(self, paths: Iterable[AnyPath]) -> None:
        """Removes photos from the index, by their paths; the photos themselves stay."""
        ids = [photos.identifier(os.path.realpath(path)) for path in paths]
        with _locked(self.folder):
            self._store.refresh()
            self._store.remove(ids)

    def count(self, where: str = "") -> int:
        """The number of photos that match a filter (`xlir.search.filters`)."""
        return self._store.count(filters.parse(where))

    def search(
        self,
        *queries: str | AnyPhoto,
        without: Sequence[str | AnyPhoto] = (),
        count: int = 10,
        where: str = "",
        cutoff: float = 0.0,
        exact: bool = False,
    ) -> list[Hit]:
        """The photos that fit a query best, the best first.

        Args:
          queries: texts in any language, and PIL images or encoded bytes of photos. Several
            form one query: photos should fit all of them.
          without: what the photos should not show.
          count: the largest number of photos.
          where: a filter (`xlir.search.filters`).
          cutoff: photos with a lower percentile are left out; photos without one are kept.
          exact: compare with every photo; otherwise the search of a large index may miss a few.

        Raises:
          ValueError: there is no query, or the filter is not valid.
        """
        query = self.embed_query(queries, without)
        texts = all(isinstance(part, str) for part in [*queries, *without])
        [found] = self.find(query[None], count, where, calibrated=texts, exact=exact)
        return [hit for hit in found if hit.percentile is None or hit.percentile >= cutoff]

    def embed_query(
        self, queries: Sequence[str | AnyPhoto], without: Sequence[str | AnyPhoto] = ()
    ) -> Float[np.ndarray, " dim"]:
        """One unit-length vector for a query; see `search`."""
        if not queries:
            raise ValueError("a query needs a text or a photo to search for")
        return combined(self._embed(queries), self._embed(without) if without else None)

    def find(
        self,
        queries: Float[np.ndarray, "queries dim"],
        count: int = 10,
        where: str = "",
        *,
        calibrated: bool = True,
        exact: bool = False,
    ) -> list[list[Hit]]:
        """As `search`, for embedded queries, and without a cutoff.

        Args:
          queries: at least one, of unit length. Searching several at once is faster.
          count, where, exact: see `search`.
          calibrated: whether the hits get percentiles, which are meaningful only for texts.
        """
        found = self._store.search(queries, count, FIELDS, filters.parse(where), exact=exact)
        each = []
        for query, (rows, cosines) in zip(queries, found, strict=True):
            shares: list[float | None] = [None] * len(rows)
            if calibrated and self.calibration is not None:
                shares = self.calibration.percentiles(query, cosines).tolist()
            each.append(
                [
                    Hit(cosine=float(cosine), percentile=share, **row)
                    for row, cosine, share in zip(rows.to_pylist(), cosines, shares, strict=True)
                ]
            )
        return each

    def vector(self, identifier: str) -> Float[np.ndarray, " dim"] | None:
        """The stored embedding of a photo, of unit length; None if the index lacks the photo."""
        rows = self._store.read([identifier], ["vector"])["vector"].to_pylist()
        if not rows:
            return None
        stored = np.asarray(rows[0], np.float32)
        return stored / np.linalg.norm(stored)

    def photo(self, identifier: str) -> Hit | None:
        """What the index knows about a photo, with a cosine of 1; None if it is not there."""
        rows = self._store.read([identifier], FIELDS).to_pylist()
        return Hit(cosine=1.0, percentile=None, **rows[0]) if rows else None

    def thumbnails(self, ids: Sequence[str]) -> list[bytes]:
        """The thumbnails of photos, as JPEG."""
        return self._store.read(ids, ["thumbnail"])["thumbnail"].to_pylist()

    def refresh(self) -> None:
        """Makes photos visible that other processes have added."""
        self._store.refresh()

    def _embedded(
        self, todo: Iterable[photos.Photo], skip: Callable[[str], None], engine: str | None
    ) -> Iterator[pa.Table]:
        """The rows of photos, a few at a time."""
        if engine is None:
            return photo_rows.embedded(self.encoder, todo, skip)
        search.check_installed("ray", "ray")
        from xlir.search import fleet

        return fleet.embedded(self.folder / ENCODER, todo, skip)

    def _embed(self, parts: Sequence[str | AnyPhoto]) -> Float[np.ndarray, "parts dim"]:
        texts = [part for part in parts if isinstance(part, str)]
        pictures = [part for part in parts if not isinstance(part, str)]
        embedded = [self.encoder.encode_text(texts)] if texts else []
        embedded += [self.encoder.encode_image(pictures)] if pictures else []
        return np.concatenate(embedded)


def is_index(folder: pathlib.Path) -> bool:
    """Whether the folder holds an index: index.json is written last."""
    return (folder / INDEX_FILE).is_file()


def _differs(photo: photos.Photo, known: Mapping[str, tuple[int, int]]) -> bool:
    """Whether a photo is new or has changed since it was indexed."""
    return known.get(photo.id) != (photo.size, photo.modified)


def _locked(folder: pathlib.Path) -> contextlib.AbstractContextManager:
    """Keeps other processes from changing an index."""
    message = f"another process is changing {folder}: wait until it has ended"
    return files.locked(folder / LOCK_FILE, message)
