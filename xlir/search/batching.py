"""Embeds the queries of many requests together.

One thread does all embedding. While it works, further requests wait, and all that wait are embedded
in its next call. So a single request never waits for others to arrive, and many requests share
calls.
"""

import asyncio
import concurrent.futures
import contextlib
import queue
import threading
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

# Most requests in one call, and most that may wait.
LARGEST_BATCH, MOST_WAITING = 64, 256
# Texts are filled up to these numbers, because each other number would need a program of its own,
# which takes a good part of a second to compile, and several megabytes.
SIZES = (1, 4, 16, 64)

# A text, or a photo's pixels.
Part = str | np.ndarray
Waiting = tuple[list[Part], concurrent.futures.Future]


class Full(Exception):
    """Too many requests are waiting."""


class Batcher:
    """Embeds texts and photos in one thread; all that wait share a call.

    Args:
      texts: embeds texts, such as `Encoder.encode_text`.
      photos: embeds the pixels of photos, such as `Encoder.encode_image`.
      observe: called with the number of requests of each call.
      waiting: the number of requests that may wait.
    """

    def __init__(
        self,
        texts: Callable[[Sequence[str]], np.ndarray],
        photos: Callable[[Sequence[np.ndarray]], np.ndarray],
        observe: Callable[[int], None] = lambda size: None,
        waiting: int = MOST_WAITING,
    ):
        self._texts, self._photos, self._observe = texts, photos, observe
        self._queue: queue.Queue[Waiting | None] = queue.Queue(waiting)
        self._thread = threading.Thread(target=self._work, name="embedding", daemon=True)
        self._thread.start()

    async def embed(self, parts: Sequence[Part]) -> Float[np.ndarray, "parts dim"]:
        """The embeddings of the parts of one query, in their order.

        If the caller is cancelled while it waits, its parts are not embedded.

        Raises:
          Full: too many requests are waiting.
          ValueError: as `Encoder.encode_text`.
        """
        future: concurrent.futures.Future = concurrent.futures.Future()
        try:
            self._queue.put_nowait((list(parts), future))
        except queue.Full as error:
            raise Full("too many searches are waiting") from error
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Ends the thread when everything that waits is embedded."""
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
                self._answer(ready)

    def _answer(self, batch: Sequence[Waiting]) -> None:
        try:
            vectors = self._embed([part for parts, _ in batch for part in parts])
        except Exception as error:
            # A query that can't be embedded must not fail the others.
            for one in batch if len(batch) > 1 else ():
                self._answer([one])
            if len(batch) == 1:
                batch[0][1].set_exception(error)
            return
        start = 0
        for parts, future in batch:
            future.set_result(vectors[start : start + len(parts)])
            start += len(parts)

    def _embed(self, parts: Sequence[Part]) -> np.ndarray:
        """The embeddings of parts of both kinds, in their order."""
        vectors: list[np.ndarray | None] = [None] * len(parts)
        for kind, embed in ((str, self._texts), (np.ndarray, self._photos)):
            rows = [row for row, part in enumerate(parts) if isinstance(part, kind)]
            if rows:
                size = min((size for size in SIZES if size >= len(rows)), default=len(rows))
                filled = rows + rows[-1:] * (size - len(rows)) if kind is str else rows
                embedded = embed([parts[row] for row in filled])[: len(rows)]
                for row, vector in zip(rows, embedded, strict=True):
                    vectors[row] = vector
        return np.stack(vectors)
