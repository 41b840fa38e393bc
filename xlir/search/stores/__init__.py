"""Where the rows of an index are stored: on this machine (LanceDB) or on a server (Milvus).

A store holds one row for each photo, in the columns of `schema`. Both stores behave alike:
tests/search/test_stores.py runs the same tests on each.
"""

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from xlir import search
from xlir.search.filters import Filter


class Hits(NamedTuple):
    """The photos nearest to a query, the nearest first.

    Attributes:
      rows: the columns that were asked for.
      cosines: the cosine similarities with the query.
    """

    rows: pa.Table
    cosines: Float[np.ndarray, " hits"]


@runtime_checkable
class Store(Protocol):
    """The rows of an index. A method that fails raises OSError or ValueError, with one line."""

    def add(self, rows: pa.Table) -> None:
        """Adds rows whose ids are not in the store. Once it returns, they survive a crash."""

    def replace(self, rows: pa.Table) -> None:
        """As `add`, but replaces rows that have the same ids."""

    def remove(self, ids: Sequence[str]) -> None:
        """Removes rows; ids that are not in the store are ignored."""

    def search(
        self,
        queries: Float[np.ndarray, "queries dim"],
        count: int,
        columns: Sequence[str],
        where: Filter = (),
        *,
        exact: bool = False,
    ) -> list[Hits]:
        """For each query, the rows with the highest cosine similarities.

        Args:
          queries: at least one, of unit length. Searching several at once is faster.
          count: the largest number of rows for a query.
          columns: the columns to return.
          where: which rows to consider.
          exact: compare with every row; otherwise a search of a large store may miss a few.
        """

    def read(self, ids: Sequence[str], columns: Sequence[str]) -> pa.Table:
        """Columns of the rows with these ids, in the order of `ids`. No id may occur twice. Ids
        that are not in the store are left out."""

    def scan(self, columns: Sequence[str], where: Filter = ()) -> Iterator[pa.RecordBatch]:
        """The columns of all rows that match, in any order."""

    def count(self, where: Filter = ()) -> int:
        """The number of rows that match."""

    def optimize(self) -> None:
        """Builds or extends the indexes of a large store, and removes what is no longer used."""

    def refresh(self) -> None:
        """Makes rows visible that other processes have added."""


def opened(folder: pathlib.Path, content: Mapping, *, create: bool = False) -> Store:
    """The store of an index.

    Args:
      folder: the folder of a store on this machine.
      content: that of index.json: `store` (a server's address, or None), `dim` and `model`.
      create: whether to create the store if there is none.

    Raises:
      FileNotFoundError, ValueError: as the stores' constructors.
    """
    if content.get("store"):
        search.check_installed("pymilvus", "milvus")
        from xlir.search.stores.milvus import MilvusStore

        return MilvusStore(content["store"], content["dim"], content["model"], create=create)
    from xlir.search.stores.lance import LanceStore

    return LanceStore(folder, content["dim"], create=create)


def schema(dim: int) -> pa.Schema:
    """The columns of a store for embeddings of width `dim`.

    `id`, `path`, `size` (bytes), `modified` (nanoseconds), `taken` (seconds), `width`, `height` and
    `thumbnail` are explained in `xlir.search.photos`; `folder` and `name` are case-folded for
    filters. `vector` is the embedding, of unit length before it is rounded to 16 bits.
    """
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("path", pa.string(), nullable=False),
            pa.field("folder", pa.string(), nullable=False),
            pa.field("name", pa.string(), nullable=False),
            pa.field("size", pa.int64(), nullable=False),
            pa.field("modified", pa.int64(), nullable=False),
            pa.field("taken", pa.int64(), nullable=False),
            pa.field("width", pa.int32(), nullable=False),
            pa.field("height", pa.int32(), nullable=False),
            pa.field("thumbnail", pa.binary(), nullable=False),
            pa.field("vector", pa.list_(pa.float16(), dim), nullable=False),
        ]
    )
