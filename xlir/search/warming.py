"""Compiles the model for the usual shapes of batches that a service will meet.

JAX compiles a program for each shape, which takes a good part of a second. Without this module,
the first requests of each shape would wait for the compiler.
"""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from input_pipeline.tokenizers import padded_length
from xlir.encoder import Encoder
from xlir.search.batching import LARGEST_BATCH, SIZES

log = logging.getLogger(__name__)

# Most queries have at most this many tokens.
USUAL_TOKENS = 32


@contextlib.contextmanager
def warming(encoder: Encoder) -> Iterator[threading.Thread]:
    """Compiles in a thread, and yields it. On exit, the thread stops after its current shape."""
    ended = threading.Event()

    def work() -> None:
        for embed in shapes(encoder):
            if ended.is_set():
                return
            try:
                embed()
            except Exception as error:
                # Requests will report what is wrong.
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
    """Functions that embed a batch of each usual shape: first the largest, then single texts."""
    longest = min(encoder.config.text.max_length, USUAL_TOKENS)
    # These texts have every number of tokens, whether the tokenizer splits words or letters.
    texts = [("a " * longest)[:letters] for letters in range(1, 2 * longest + 1)]
    lengths: dict[int, str] = {}
    for text, ids in zip(texts, encoder.tokenizer(texts, max_length=longest), strict=True):
        lengths.setdefault(min(padded_length(len(ids)), longest), text)
    for size in sorted(SIZES, key=lambda size: (1 < size < LARGEST_BATCH, -size)):
        if size <= LARGEST_BATCH:
            for text in reversed(lengths.values()):
                yield lambda text=text, size=size: encoder.encode_text([text] * size)
    yield lambda: encoder.encode_image([Image.new("RGB", (64, 64))])
