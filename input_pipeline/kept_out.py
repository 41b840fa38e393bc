"""Recognizes photos of test sets: by their file's name, by their bytes, and as near copies."""

import concurrent.futures
import dataclasses
import hashlib
import logging
import os
from collections.abc import Iterable, Sequence

import numpy as np

from input_pipeline import images, near_copies, photo_limits
from input_pipeline.test_sets import xtd10
from input_pipeline.test_sets.captioned_photos import photo_key

log = logging.getLogger(__name__)

# A photo is reduced to this many pixels, on its longer side, before it is hashed.
HASHED_SIZE = 256


@dataclasses.dataclass(frozen=True)
class KeptOut:
    """What identifies the photos that must not be trained on.

    XTD10's photos are always among them, but only by name.

    Attributes:
      names: the keys (`photo_key`) of their files' names.
      digests: the SHA-256 of their files.
      hashes: their perceptual hashes.
    """

    names: frozenset[str] = frozenset()
    digests: frozenset[bytes] = frozenset()
    hashes: near_copies.Hashes = dataclasses.field(
        default_factory=lambda: np.zeros((0, 4), np.uint64)
    )

    def has_name(self, name: str) -> bool:
        """Whether a file of this name is one of the photos."""
        return photo_key(name) in self.names or xtd10.origin(name) is not None

    def fingerprint(self) -> str:
        """Identifies the photos."""
        digest = hashlib.sha256("\n".join(sorted(self.names)).encode())
        for part in sorted(self.digests):
            digest.update(part)
        return digest.hexdigest()[:24]


def identify(names: Iterable[str], photos: Sequence[bytes | os.PathLike]) -> KeptOut:
    """Reads the photos of test sets.

    Args:
      names: further names of files that must not be trained on.
      photos: the photos, as encoded bytes or as paths, whose names count too. Near copies of
        those that can't be decoded are not recognized.

    Raises:
      ValueError, OSError: a photo can't be read.
    """
    paths = [photo for photo in photos if isinstance(photo, (str, os.PathLike))]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        read = list(pool.map(_identify, photos))
    return KeptOut(
        names=frozenset(map(photo_key, [*names, *map(os.fspath, paths)])),
        digests=frozenset(digest for digest, _ in read),
        hashes=np.array([found for _, found in read if found is not None], np.uint64).reshape(
            -1, 4
        ),
    )


def _identify(photo: bytes | os.PathLike) -> tuple[bytes, near_copies.Hash | None]:
    data = photo if isinstance(photo, bytes) else photo_limits.read(photo)
    digest = hashlib.sha256(data).digest()
    try:
        return digest, perceptual_hash(data)
    except images.ImageError as error:
        log.warning("near copies of a test photo are not recognized: %s", error)
        return digest, None


def perceptual_hash(data: bytes) -> near_copies.Hash:
    """The perceptual hash of a photo's file; raises `images.ImageError` if it can't be decoded."""
    return near_copies.perceptual_hash(images.preview(data, HASHED_SIZE))
