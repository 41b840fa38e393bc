"""Compiles the model for the shapes of batches that a service will meet.

JAX compiles a program for each shape, which takes a good part of a second. Without this, the first
requests of each shape would wait for it.
"""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator

import numpy as np

from input_pipeline.tokenizers import padded_length
from xlir.embed import TEXT_TOKENS
from xlir.encoder import Encoder
from xlir.search.batching import LARGEST_BATCH

log = logging.getLogger(__name__)

# Most queries have at most this many tokens; these are compiled first.
USUAL_TOKENS = 32
# Uploaded photos that are embedded together.
PHOTOS = (1, 2, 4)


@contextlib.contextmanager
def warming(encoder: Encoder) -> Iterator[threading.Thread]:
    """Compiles in a thread, the usual shapes first; yields the thread. Ends within one shape."""
    ended = threading.Event()

    def work() -> None:
        for embed in shapes(encoder):
            if ended.is_set():
                return
            try:
                embed()
            except Exception as error:
                # The requests will tell what is wrong.
                log.warning("the model was not compiled in advance: %s", error)
                return

    thread = threading.Thread(target=work, name="warming", daemon=True)
    thread.start()
    try:
        yield thread
    finally:
        ended.set()
        thread.join()


def shapes(encoder: Encoder) -> Iterator[Callable[[], np.ndarray]]:
    """A function for each shape of a batch, the usual ones first."""
    longest = encoder.config.text.max_length
    # Whether tokens are words or letters, these have all numbers of tokens.
    texts = [("a " * longest)[:letters] for letters in range(1, 2 * longest + 1)]
    lengths: dict[int, str] = {}
    for text, ids in zip(texts, encoder.tokenizer(texts, max_length=longest), strict=True):
        lengths[min(padded_length(len(ids)), longest)] = text
    sizes = [1 << power for power in range(LARGEST_BATCH.bit_length())]

    def texts_of(usual: bool) -> Iterator[Callable[[], np.ndarray]]:
        for size in (1, *reversed(sizes[1:])):
            for length, text in lengths.items():
                # A batch with more tokens is split.
                fits = size * length <= TEXT_TOKENS * encoder.mesh.size
                if fits and (length <= USUAL_TOKENS) == usual:
                    yield lambda text=text, size=size: encoder.encode_text([text] * size)

    side = encoder.preprocessing.size
    pixels = np.zeros((side, side, 3), np.uint8)
    yield from texts_of(usual=True)
    for size in PHOTOS:
        yield lambda size=size: encoder.encode_image([pixels] * size)
    yield from texts_of(usual=False)
