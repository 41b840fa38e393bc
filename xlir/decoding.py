"""Photos become pixels: one pool of threads decodes for the whole program."""

import collections
import concurrent.futures
import io
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from input_pipeline import images, photo_limits

Item = TypeVar("Item")
# What a photo may be given as. An array holds pixels that were decoded before.
Photo = str | os.PathLike | bytes | Image.Image | np.ndarray
Pixels = UInt8[np.ndarray, "size size 3"]

# Its threads start when they are first needed.
_POOL = concurrent.futures.ThreadPoolExecutor(os.cpu_count(), "decode")


def decode(photo: Photo, name: str, read: Callable[[bytes], Pixels]) -> Pixels:
    """The pixels of one photo.

    Args:
      photo: a path, encoded bytes or a PIL image; pixels are returned as they are.
      name: what an error calls a photo that has no path.
      read: encoded bytes -> pixels, such as `input_pipeline.images.decode`.

    Raises:
      ValueError: it can't be decoded, is not a regular file, or would take too much memory. The
        message names it.
      FileNotFoundError: there is no such file.
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
    function: Callable[[Item], Pixels], items: Iterable[Item], ahead: int
) -> Iterator[tuple[Item, Pixels | ValueError | OSError]]:
    """Decodes photos in the program's pool of threads and gives them back in their order.

    A photo that can't be read or decoded does not end the iteration: its error stands in the place
    of its pixels, for callers that skip such photos. `decode_all` is for those that need them all.

    Args:
      function: one item -> its pixels, such as `Embedder.decode`. It runs in a thread.
      items: what is decoded, such as paths. An item is taken when it is about to be decoded, so
        that they may be many.
      ahead: how many photos are decoded before they are asked for; they are held in memory.

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
      ValueError, OSError: what `function` raised for the first item that could not be decoded.
    """
    for _, result in decode_each(function, items, ahead):
        if isinstance(result, Exception):
            raise result
        yield result


def _result_or_error(
    function: Callable[[Item], Pixels], item: Item
) -> Pixels | ValueError | OSError:
    try:
        return function(item)
    except (ValueError, OSError) as error:
        return error


def _png(image: Image.Image) -> bytes:
    """An image as PNG, turned upright and without CMYK, which the format does not have."""
    image = ImageOps.exif_transpose(image)
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16"):
        image = image.convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
