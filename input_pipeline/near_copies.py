"""Finds near copies of photos: the same picture re-encoded, resized, cropped a little or greyed.

Each photo has a perceptual hash of 256 bits: the signs of the lowest frequencies of its grey
picture (pHash, Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash Functions",
https://phash.org/docs/pubs/thesis_zauner.pdf). Two photos are near copies if few bits differ.
benchmarks/near_copies.py measures the threshold.
"""

import functools

import numpy as np
from jaxtyping import Float, UInt8, UInt64
from PIL import Image

# Pixels a side of the grey picture, and frequencies along each axis.
SIDE, FREQUENCIES = 64, 16
# Two photos are near copies if at most this many of the 256 bits differ: see docs/results.md.
THRESHOLD = 64

Hash = UInt64[np.ndarray, "4"]
Hashes = UInt64[np.ndarray, "photos 4"]


def perceptual_hash(pixels: UInt8[np.ndarray, "height width 3"]) -> Hash:
    """The perceptual hash of a decoded photo of any size.

    Args:
      pixels: red, green and blue, 0 to 255.
    """
    grey = Image.fromarray(pixels).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    waves = _cosines()
    spectrum = waves @ np.asarray(grey, np.float32) @ waves.T
    # The constant part says how bright the photo is, and not what it shows.
    bits = (spectrum > np.median(spectrum.reshape(-1)[1:])).reshape(-1)
    return np.packbits(bits).view(np.uint64)


@functools.cache
def _cosines() -> Float[np.ndarray, "16 64"]:
    """The lowest rows of the cosine transform (DCT-II) of a line of pixels."""
    place = (np.arange(SIDE) + 0.5) * np.pi / SIDE
    return np.cos(np.arange(FREQUENCIES)[:, None] * place).astype(np.float32)


def is_near_copy(one: Hash, others: Hashes) -> bool:
    """Whether a photo is a near copy of one of others, by their hashes."""
    return bool((np.bitwise_count(others ^ one).sum(axis=1) <= THRESHOLD).any())
