"""Decodes photos to pixels, in one pool of threads for the whole program."""

import collections
import concurrent.futures
import io
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps

from input_pipeline import images, photo_limits
from input_pipeline.images import Pixels

Item, Result = TypeVar("Item"), TypeVar("Result")
# The forms in which a photo can be passed. An array holds pixels that are already decoded.
Photo = str | os.PathLike | bytes | Image.Image | np.ndarray

# The threads start on first use.
_POOL = concurrent.futures.ThreadPoolExecutor(os.cpu_count(), "decode")


def decode(photo: Photo, name: str, read: Callable[[bytes], Pixels]) -> Pixels:
    """The pixels of one photo.

    Args:
      photo: a path, encoded bytes or a PIL image; decoded pixels are returned unchanged.
      name: what error messages call a photo that has no path.
      read: encoded bytes -> pixels, such as `input_pipeline.images.decode`.

    Raises:
      ValueError: the photo can't be decoded, is not a regular file, or would take too much
        memory. The message names the photo.
      FileNotFoundError: the file does not exist.
    """
    if isinstance(photo, np.ndarray):
        return photo
    if isinstance(photo, (str, os.PathLike)):
        name, photo = os.fspath(photo), photo_limits.read(photo)
    try:
        return read(_png(photo) if isinstance(photo, Image.Image) else photo)
    except (images.ImageError, OSError) as error:
        raise ValueError(f"{name}: {error}") from error


def decode_each(
    function: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[tuple[Item, Result | ValueError | OSError]]:
    """Decodes photos in the program's pool of threads and yields them in order.

    If a photo can't be read or decoded, its error is yielded instead of its pixels, so that callers
    can skip the photo. `decode_all` is for callers that need every photo.

    Args:
      function: one item -> its pixels, such as `Embedder.decode`. It runs in a thread.
      items: the photos, for example paths. At most `ahead` items after the photo that is yielded
        have been taken, so `items` may be a long iterator. Items are taken in the caller's thread.
      ahead: number of photos that are decoded in advance and held in memory.

    Yields:
      Each item with its pixels, or with the ValueError or OSError that `function` raised.
    """
    waiting: collections.deque = collections.deque()
    try:
        for item in items:
            waiting.append((item, _POOL.submit(_result_or_error, function, item)))
            if len(waiting) > ahead:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        for _, future in waiting:
            future.cancel()


def decode_all(
    function: Callable[[Item], Pixels], items: Iterable[Item], ahead: int
) -> Iterator[Pixels]:
    """As `decode_each`, for callers that need every photo.

    Yields:
      The pixels of each item.

    Raises:
      ValueError, OSError: the error of the first item that can't be decoded.
    """
    for _, result in decode_each(function, items, ahead):
        if isinstance(result, Exception):
            raise result
        yield result


def _result_or_error(
    function: Callable[[Item], Result], item: Item
) -> Result | ValueError | OSError:
    try:
        return function(item)
    except (ValueError, OSError) as error:
        return error


def _png(image: Image.Image) -> bytes:
    """An image as PNG, turned upright; modes that PNG lacks, such as CMYK, become RGB."""
    image = ImageOps.exif_transpose(image)
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16"):
        image = image.convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
