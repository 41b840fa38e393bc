"""A store on a server: a Milvus collection, for more photos than one machine can hold.

Milvus divides a collection into segments, each with an index over its vectors (IVF_FLAT). A search
looks into the nearest clusters of every segment; an exact search looks into all of them. Writers
on several machines may share a collection, because a row replaces an older one with the same id.
"""

import base64
import contextlib
import logging
import os
import re
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Float
from pymilvus import DataType, MilvusClient, MilvusException

from xlir.search.filters import Filter, Term
from xlir.search.stores import Hits, schema

# The scheme of a store's address -> the scheme of the server's URI.
SCHEMES = {"milvus": "http", "milvus+https": "https"}
# The environment variable with a server's TOKEN or USER:PASSWORD.
TOKEN = "MILVUS_TOKEN"
# The property of a collection that identifies the model of its embeddings.
MODEL = "xlir.model"
# The largest size of a text column in bytes. Thumbnails are stored as text (base64), which takes
# four bytes for three.
LONGEST = 65_535
# The number of clusters in a segment, and of those that a search looks into.
CLUSTERS, PROBES = 128, 32
# The number of rows in one request. By default, a server accepts 64 MB in a request.
WRITTEN_AT_ONCE, READ_AT_ONCE = 500, 1000
# The time limit for a server's answer, in seconds.
TIMEOUT = 60
# Milliseconds between keepalive pings. Servers close connections that send pings too often.
KEPT_ALIVE = {"grpc.keepalive_time_ms": 600_000}


class MilvusStore:
    """Implements `xlir.search.stores.Store`.

    Args:
      address: `milvus://HOST:PORT/COLLECTION`, or `milvus+https://...` with TLS.
      dim: the width of the embeddings.
      model: identifies the model of the embeddings.
      create: whether to create the collection if there is none.

    Raises:
      FileNotFoundError: there is no such collection, and `create` is false.
      ValueError: the server can't be reached, or the collection holds embeddings of another model.
    """

    def __init__(self, address: str, dim: int, model: str, *, create: bool = False):
        uri, self._collection = parsed(address)
        self._address, self._dim = address, dim
        # Milvus logs errors with their tracebacks; `_errors` reports them in one line.
        logging.getLogger("pymilvus").setLevel(logging.CRITICAL)
        with self._errors():
            token = os.environ.get(TOKEN, "")
            self._client = MilvusClient(uri, token=token, timeout=TIMEOUT, grpc_options=KEPT_ALIVE)
            exists = self._client.has_collection(self._collection)
            if not exists and create:
                self._create(model)
            found = self._client.describe_collection(self._collection) if exists or create else None
        if found is None:
            raise FileNotFoundError(f"{address} holds no index: there is no such collection")
        if found["properties"].get(MODEL) != model:
            raise ValueError(
                f"{address} was made with another model, so its embeddings can't be compared: "
                "choose another collection"
            )

    def _create(self, model: str) -> None:
        columns = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
        for field in schema(self._dim):
            if field.name == "vector":
                columns.add_field("vector", DataType.FLOAT_VECTOR, dim=self._dim)
            elif pa.types.is_integer(field.type):
                columns.add_field(field.name, DataType.INT64)
            else:
                key = field.name == "id"
                columns.add_field(field.name, DataType.VARCHAR, is_primary=key, max_length=LONGEST)
        indexes = self._client.prepare_index_params()
        indexes.add_index(
            "vector", index_type="IVF_FLAT", metric_type="COSINE", params={"nlist": CLUSTERS}
        )
        self._client.create_collection(
            self._collection,
            schema=columns,
            index_params=indexes,
            # Readers see every row that was acknowledged before they ask.
            consistency_level="Strong",
            properties={MODEL: model},
        )

    def add(self, rows: pa.Table) -> None:
        """See `Store.add`."""
        self.replace(rows)

    def replace(self, rows: pa.Table) -> None:
        """See `Store.replace`."""
        with self._errors():
            for start in range(0, len(rows), WRITTEN_AT_ONCE):
                part = rows.slice(start, WRITTEN_AT_ONCE)
                self._client.upsert(self._collection, [_sent(row) for row in part.to_pylist()])

    def remove(self, ids: Sequence[str]) -> None:
        """See `Store.remove`."""
        with self._errors():
            for start in range(0, len(ids), READ_AT_ONCE):
                self._client.delete(self._collection, ids=list(ids[start : start + READ_AT_ONCE]))

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
        with self._errors():
            found = self._client.search(
                self._collection,
                data=queries.astype(np.float32).tolist(),
                limit=count,
                filter=expression(where),
                output_fields=list(columns),
                search_params={"params": {"nprobe": CLUSTERS if exact else PROBES}},
            )
        return [
            Hits(
                pa.Table.from_batches([self._received([hit["entity"] for hit in part], columns)]),
                np.asarray([hit["distance"] for hit in part], np.float32),
            )
            for part in found
        ]

    def read(self, ids: Sequence[str], columns: Sequence[str]) -> pa.Table:
        """See `Store.read`."""
        names = ["id", *(name for name in columns if name != "id")]
        found: dict[str, dict] = {}
        with self._errors():
            for start in range(0, len(ids), READ_AT_ONCE):
                part = list(ids[start : start + READ_AT_ONCE])
                rows = self._client.get(self._collection, ids=part, output_fields=names)
                found |= {row["id"]: row for row in rows}
        rows = [found[identifier] for identifier in ids if identifier in found]
        return pa.Table.from_batches([self._received(rows, columns)])

    def scan(self, columns: Sequence[str], where: Filter = ()) -> Iterator[pa.RecordBatch]:
        """See `Store.scan`."""
        with self._errors():
            rows = self._client.query_iterator(
                self._collection,
                batch_size=READ_AT_ONCE,
                filter=expression(where),
                output_fields=list(columns),
            )
            while batch := rows.next():
                yield self._received(batch, columns)
            rows.close()

    def count(self, where: Filter = ()) -> int:
        """See `Store.count`."""
        with self._errors():
            rows = self._client.query(
                self._collection, filter=expression(where), output_fields=["count(*)"]
            )
            return rows[0]["count(*)"]

    def optimize(self) -> None:
        """Does nothing: a Milvus server builds its indexes itself."""

    def refresh(self) -> None:
        """Does nothing: every request sees all rows that were stored before it."""

    def _received(self, rows: Sequence[dict], columns: Sequence[str]) -> pa.RecordBatch:
        """Converts rows from Milvus to the columns of a store."""
        fields = [schema(self._dim).field(name) for name in columns]
        rows = [{name: row[name] for name in columns} for row in rows]
        for row in rows:
            if "thumbnail" in row:
                row["thumbnail"] = base64.b64decode(row["thumbnail"])
            if "vector" in row:
                row["vector"] = np.asarray(row["vector"], np.float16)
        return pa.RecordBatch.from_pylist(rows, schema=pa.schema(fields))

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Turns Milvus' errors into a ValueError of one line."""
        try:
            yield
        except MilvusException as error:
            reason = " ".join(error.message.split())[:300]
            raise ValueError(f"{self._address}: {reason}") from error


def parsed(address: str) -> tuple[str, str]:
    """The URI of a server and the name of a collection, from a store's address.

    Raises:
      ValueError: it is not an address of a store.
    """
    schemes = "|".join(map(re.escape, SCHEMES))
    found = re.fullmatch(rf"({schemes})://([\w.-]+|\[[\da-fA-F:]+\])(:\d+)/([A-Za-z_]\w*)", address)
    if found is None:
        raise ValueError(
            f"{address!r} is not the address of a store: milvus://HOST:PORT/COLLECTION"
        )
    scheme, host, port, collection = found.groups()
    return f"{SCHEMES[scheme]}://{host}{port}", collection


def expression(where: Filter) -> str:
    """A filter in Milvus' filter language."""
    return " and ".join(f"not ({_term(term)})" if term.negated else _term(term) for term in where)


def _term(term: Term) -> str:
    if term.pattern is not None:
        # The pattern is escaped twice: here for LIKE, and in `_quoted` as a text.
        like = re.sub(r"([%_\\])", r"\\\1", term.pattern).replace("*", "%")
        return f"{term.column} like {_quoted(like)}"
    bounds = [
        f"{term.column} {sign} {bound}"
        for sign, bound in ((">=", term.least), ("<=", term.most))
        if bound is not None
    ]
    return " and ".join(bounds) or 'id != ""'


def _quoted(text: str) -> str:
    """A text in quotes, in Milvus' filter language."""
    escaped = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return f'"{text.translate(str.maketrans(escaped))}"'


def _sent(row: dict) -> dict:
    """Converts a row to what Milvus stores."""
    thumbnail = base64.b64encode(row["thumbnail"]).decode()
    return row | {"thumbnail": thumbnail, "vector": np.asarray(row["vector"], np.float32)}
