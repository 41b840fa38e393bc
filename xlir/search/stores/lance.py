"""A store on this machine: a LanceDB table in a folder.

Every change makes a new version of the table, which is on disk when the call returns. If the
process is killed before that, the previous version stays.

A small table is searched exactly. A large one has an index over the vectors, IVF_SQ: a search
looks into the clusters that are nearest to the query, where each component of a vector takes one
byte. The best candidates are compared again by their whole vectors. With a filter, each cluster
has fewer rows that match, so a search looks into more clusters, and into all if the filter leaves
100,000 rows or fewer. If the filter leaves fewer than 2,000 rows, they are compared exactly.
"""

import contextlib
import datetime
import math
import pathlib
import re
import threading
from collections.abc import Iterator, Sequence

import lancedb
import numpy as np
import pyarrow as pa
from jaxtyping import Float
from lancedb.index import BTree, IvfSq

from xlir.search.filters import Filter, Term
from xlir.search.stores import Hits, schema

TABLE = "photos"
# From this many rows on, a table has an index over its vectors. Searching a smaller table takes up
# to 0.1 s.
LARGE = 50_000
# If a filter leaves fewer rows than this, all of them are read and compared exactly.
FEW = 2000
# If a filter leaves more, a search looks into clusters that hold about this many of its rows.
COMPARED = 100_000
# A cluster of the index has CLUSTER_ROWS rows on average. Without a filter, a search looks into
# PROBES * sqrt(clusters) clusters. Building compares rows with all clusters, which is slow because
# LanceDB has no fast path for 16-bit vectors. So there are few clusters, and each is computed from
# only SAMPLED rows.
CLUSTER_ROWS, PROBES, SAMPLED = 4000, 1.6, 64
# The number of candidates for each row of the answer. Their whole vectors are compared.
REFINE = 2
# Columns with an index for filters.
INDEXED = ("id", "taken", "width", "height")
# The names of indexes over the vectors begin with this; the number of clusters follows.
CLUSTERS = "vectors_"
# The number of searches and reads at a time. Forty at a time are slower, and need more memory.
AT_ONCE = 4
# For at most this many filters, the store remembers how many rows each one leaves.
REMEMBERED = 1000
# For this long, old versions of the table are kept for readers.
KEPT = datetime.timedelta(minutes=10)


class LanceStore:
    """Implements `xlir.search.stores.Store`.

    Args:
      folder: the folder of the table; created if it does not exist.
      dim: the width of the embeddings.
      create: whether to create the table if there is none.

    Raises:
      FileNotFoundError: there is no table, and `create` is false.
      ValueError: the table is damaged.
    """

    def __init__(self, folder: pathlib.Path, dim: int, *, create: bool = False):
        self._folder = folder
        exists = (folder / f"{TABLE}.lance").is_dir()
        if not (exists or create):
            raise FileNotFoundError(f"{folder} holds no index")
        with self._errors():
            database = lancedb.connect(folder)
            if exists:
                self._table = database.open_table(TABLE)
            else:
                self._table = database.create_table(TABLE, schema=schema(dim))
            self._clusters = max(self._vector_indexes().values(), default=0)
        self._turns = threading.BoundedSemaphore(AT_ONCE)
        # A version of the table, and for each filter the number of rows that it leaves.
        self._counted: tuple[int, dict[Filter, int]] = (0, {})

    def add(self, rows: pa.Table) -> None:
        """See `Store.add`."""
        with self._errors():
            self._table.add(rows)

    def replace(self, rows: pa.Table) -> None:
        """See `Store.replace`."""
        with self._errors():
            merge = self._table.merge_insert("id")
            merge.when_matched_update_all().when_not_matched_insert_all().execute(rows)

    def remove(self, ids: Sequence[str]) -> None:
        """See `Store.remove`."""
        with self._errors():
            for start in range(0, len(ids), 1000):
                self._table.delete(f"id IN ({_strings(ids[start : start + 1000])})")

    def search(
        self,
        queries: Float[np.ndarray, "queries dim"],
        count: int,
        columns: Sequence[str],
        where: Filter = (),
        *,
        exact: bool = False,
    ) -> list[Hits]:
        """See `Store.search`."""
        names = list(dict.fromkeys([*columns, "vector"]))
        with self._errors(), self._turns:
            left = self._left(where) if where and self._clusters else 0
            if where and self._clusters and left < FEW:
                found = self._table.search().where(sql(where)).select(names).to_arrow()
                parts = [found] * len(queries)
            else:
                search = self._table.search(queries.astype(np.float32)).distance_type("cosine")
                # LanceDB rounds queries to 16 bits too, so rows with nearly equal cosines may be
                # in the wrong order. `_nearest` sorts them again.
                search = search.select([*names, "_distance"]).limit(2 * count + 10)
                if where:
                    search = search.where(sql(where), prefilter=True)
                if exact or not self._clusters:
                    search = search.bypass_vector_index()
                else:
                    search = search.nprobes(probes(self._clusters, left)).refine_factor(REFINE)
                found = search.to_arrow()
                parts = _of_queries(found, len(queries))
        return [
            _nearest(part, query, count, columns)
            for part, query in zip(parts, queries, strict=True)
        ]

    def read(self, ids: Sequence[str], columns: Sequence[str]) -> pa.Table:
        """See `Store.read`."""
        names = list(dict.fromkeys(["id", *columns]))
        with self._errors(), self._turns:
            # An empty list is not valid SQL.
            chosen = f"id IN ({_strings(ids or [''])})"
            found = self._table.search().where(chosen).select(names)
            rows = found.limit(len(ids) + 1).to_arrow()
        places = {identifier: row for row, identifier in enumerate(rows["id"].to_pylist())}
        order = [places[identifier] for identifier in ids if identifier in places]
        return rows.take(pa.array(order, pa.int64())).select(list(columns))

    def scan(self, columns: Sequence[str], where: Filter = ()) -> Iterator[pa.RecordBatch]:
        """See `Store.scan`."""
        with self._errors():
            search = self._table.search().select(list(columns))
            yield from (search.where(sql(where)) if where else search).to_batches()

    def count(self, where: Filter = ()) -> int:
        """See `Store.count`."""
        with self._errors():
            return self._table.count_rows(sql(where) if where else None)

    def optimize(self) -> None:
        """See `Store.optimize`."""
        with self._errors():
            self._table.optimize(cleanup_older_than=KEPT)
            rows = self._table.count_rows()
            if rows < LARGE:
                return
            indexed = {index.columns[0] for index in self._table.list_indices()}
            for column in INDEXED:
                if column not in indexed:
                    self._table.create_index(column, config=BTree())
            clusters = rows // CLUSTER_ROWS
            old = self._vector_indexes()
            # New rows join the nearest clusters. Once rows have doubled, new clusters are made.
            if not old or max(old.values()) * 2 <= clusters:
                config = IvfSq(distance_type="cosine", num_partitions=clusters, sample_rate=SAMPLED)
                self._table.create_index("vector", config=config, name=f"{CLUSTERS}{clusters}")
                for name in old:
                    self._table.drop_index(name)
            self._clusters = max(self._vector_indexes().values())

    def refresh(self) -> None:
        """See `Store.refresh`."""
        with self._errors():
            self._table.checkout_latest()
            self._clusters = max(self._vector_indexes().values(), default=0)

    def _left(self, where: Filter) -> int:
        """The number of rows that a filter leaves; counted once for each version of the table."""
        version = self._table.version
        known, counts = self._counted
        if version != known or len(counts) >= REMEMBERED:
            counts = {}
            self._counted = (version, counts)
        if where not in counts:
            counts[where] = self.count(where)
        return counts[where]

    def _vector_indexes(self) -> dict[str, int]:
        """Name of an index over the vectors -> its clusters; two while one replaces the other."""
        names = [one.name for one in self._table.list_indices() if one.columns == ["vector"]]
        return {name: int(name.removeprefix(CLUSTERS)) for name in names}

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Turns LanceDB's errors into a ValueError of one line."""
        try:
            yield
        except (RuntimeError, OSError, ValueError) as error:
            reason = re.sub(r", ?/?[\w/.-]+\.rs:\d+:\d+", "", " ".join(str(error).split()))[:300]
            raise ValueError(f"{self._folder}: {reason}") from error


def _of_queries(found: pa.Table, queries: int) -> list[pa.Table]:
    """Splits LanceDB's table of the rows found for all queries into one table per query."""
    if queries == 1:
        return [found]
    owners = found["query_index"].to_numpy()
    return [found.take(np.flatnonzero(owners == query)) for query in range(queries)]


def _nearest(
    found: pa.Table, query: Float[np.ndarray, " dim"], count: int, columns: Sequence[str]
) -> Hits:
    """The nearest of the rows that LanceDB found for a query."""
    flat = found["vector"].combine_chunks().flatten().to_numpy().astype(np.float32)
    vectors = flat.reshape(len(found), len(query))
    cosines = vectors @ query / np.linalg.norm(vectors, axis=1)
    best = np.argsort(-cosines, kind="stable")[:count]
    return Hits(found.select(list(columns)).take(best), cosines[best])


def probes(clusters: int, left: int = 0) -> int:
    """The number of clusters to look into.

    Args:
      clusters: the number of all clusters.
      left: the number of rows that a filter leaves; 0 without a filter.
    """
    least = math.ceil(PROBES * clusters**0.5)
    return min(clusters, max(least, math.ceil(clusters * COMPARED / left))) if left else least


def sql(where: Filter) -> str:
    """A filter in LanceDB's SQL."""
    return " AND ".join(f"NOT ({_sql(term)})" if term.negated else _sql(term) for term in where)


def _sql(term: Term) -> str:
    if term.pattern is not None:
        if re.fullmatch(r"\*[^*]+\*", term.pattern):
            # `contains` is faster than LIKE.
            return f"contains({term.column}, {_strings([term.pattern[1:-1]])})"
        like = re.sub(r"([%_\\])", r"\\\1", term.pattern).replace("*", "%").replace("'", "''")
        return f"{term.column} LIKE '{like}' ESCAPE '\\'"
    bounds = [
        f"{term.column} {sign} {bound}"
        for sign, bound in ((">=", term.least), ("<=", term.most))
        if bound is not None
    ]
    return " AND ".join(bounds) or "TRUE"


def _strings(values: Sequence[str]) -> str:
    return ", ".join("'" + value.replace("'", "''") + "'" for value in values)
