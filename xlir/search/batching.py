"""Answers the queries of many requests together.

One thread embeds queries, and another one searches. While a thread works, further requests wait,
and all that wait share its next call. So no request waits for others to arrive, and if there are
many, they share calls, which takes less time per request.
"""

import asyncio
import concurrent.futures
import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float

from xlir.search.index import Hit, Index

# The largest numbers of requests in one call, and of requests that wait.
LARGEST_BATCH, MOST_WAITING = 64, 256
# Batches of texts are padded to these sizes. JAX would compile another program for any other size,
# which takes a good part of a second and several megabytes.
SIZES = (1, 4, 16, 64)

# A text, or a photo's pixels.
Part = str | np.ndarray
Asked, Answer = TypeVar("Asked"), TypeVar("Answer")


class Full(Exception):
    """Too many requests are waiting."""


class Batcher(Generic[Asked, Answer]):
    """Calls a function in one thread; all requests that wait share a call.

    Args:
      answer: takes what several requests ask, and returns one answer for each.
      observe: called with the number of requests of each call.
      waiting: the number of requests that may wait.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Asked]], Sequence[Answer]],
        observe: Callable[[int], None] = lambda size: None,
        waiting: int = MOST_WAITING,
    ):
        self._answer, self._observe = answer, observe
        self._queue: queue.Queue[tuple[Asked, concurrent.futures.Future] | None]
        self._queue = queue.Queue(waiting)
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)
        self._thread.start()

    async def __call__(self, asked: Asked) -> Answer:
        """Waits for the answer. If the caller is cancelled meanwhile, its request is dropped.

        Raises:
          Full: too many requests are waiting.
          Exception: the error that the function raised.
        """
        future: concurrent.futures.Future = concurrent.futures.Future()
        try:
            self._queue.put_nowait((asked, future))
        except queue.Full as error:
            raise Full("too many searches are waiting") from error
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Ends the thread after it has answered all requests that wait."""
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        last = False
        while not last:
            batch = [self._queue.get()]
            with contextlib.suppress(queue.Empty):
                while len(batch) < LARGEST_BATCH:
                    batch.append(self._queue.get_nowait())
            last = None in batch
            # A request whose client has gone is left out.
            ready = [one for one in batch if one and one[1].set_running_or_notify_cancel()]
            if ready:
                self._observe(len(ready))
                self._finish(ready)

    def _finish(self, batch: Sequence[tuple[Asked, concurrent.futures.Future]]) -> None:
        try:
            answers = self._answer([asked for asked, _ in batch])
        except Exception as error:
            # A request that can't be answered must not fail the others.
            for one in batch if len(batch) > 1 else ():
                self._finish([one])
            if len(batch) == 1:
                batch[0][1].set_exception(error)
            return
        for (_, future), answer in zip(batch, answers, strict=True):
            future.set_result(answer)


def embed_together(
    texts: Callable[[Sequence[str]], np.ndarray],
    photos: Callable[[Sequence[np.ndarray]], np.ndarray],
    queries: Sequence[Sequence[Part]],
) -> list[Float[np.ndarray, "parts dim"]]:
    """The embeddings of the parts of several queries.

    Args:
      texts: embeds texts, such as `Encoder.encode_text`.
      photos: embeds the pixels of photos, such as `Encoder.encode_image`.
      queries: the parts of each query.
    """
    parts = [part for query in queries for part in query]
    vectors: list[np.ndarray | None] = [None] * len(parts)
    for kind, embed in ((str, texts), (np.ndarray, photos)):
        rows = [row for row, part in enumerate(parts) if isinstance(part, kind)]
        if rows:
            size = min((size for size in SIZES if size >= len(rows)), default=len(rows))
            filled = rows + rows[-1:] * (size - len(rows)) if kind is str else rows
            embedded = embed([parts[row] for row in filled])[: len(rows)]
            for row, vector in zip(rows, embedded, strict=True):
                vectors[row] = vector
    ends = np.cumsum([len(query) for query in queries])
    return np.split(np.stack(vectors), ends[:-1])


class Search(NamedTuple):
    """The arguments of `Index.find`, with a single query."""

    query: Float[np.ndarray, " dim"]
    count: int
    where: str
    calibrated: bool


def find_together(index: Index, searches: Sequence[Search]) -> list[list[Hit]]:
    """The hits of several searches. Those that differ only in their query share a call."""
    alike: dict[tuple, list[int]] = {}
    for row, (_, *others) in enumerate(searches):
        alike.setdefault(tuple(others), []).append(row)
    found: list[list[Hit]] = [[]] * len(searches)
    for (count, where, calibrated), rows in alike.items():
        queries = np.stack([searches[row].query for row in rows])
        each = index.find(queries, count, where, calibrated=calibrated)
        for row, hits in zip(rows, each, strict=True):
            found[row] = hits
    return found
