"""Embeddings of a run's own photos. Tags are scored relative to them.

They are stored in the run's folder, so that the run can tag images without its data set:
tagging/reference-STEP.npz holds both arrays and their digest.
"""

import dataclasses
import hashlib
import io
import logging
import pathlib
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float

from input_pipeline import files
from xlir import data, partition
from xlir.encoder import Encoder

log = logging.getLogger(__name__)

# Number of photos of each split to embed. More photos change little, and take minutes.
REFERENCE_PHOTOS = 2048


@dataclasses.dataclass(frozen=True)
class Reference:
    """Embeddings of photos of a run, of unit length.

    Attributes:
      training: embeddings of training photos, for the tags' neighbourhoods.
      held_out: embeddings of validation photos, which are not trained on, for percentiles.
    """

    training: Float[np.ndarray, "training dim"]
    held_out: Float[np.ndarray, "held_out dim"]


def reference(encoder: Encoder, workdir: pathlib.Path) -> Reference:
    """A run's reference photos. They are embedded once for each step, and stored in its folder.

    If the file is damaged, the log says so, and the photos are embedded again. If the folder can't
    be written, the embeddings are not stored.

    Raises:
      ValueError, FileNotFoundError: nothing is stored, and the run's data set is missing.
    """
    file = workdir / "tagging" / f"reference-{encoder.step}.npz"
    kept = _read(file, encoder.config.embedding_dim)
    # All processes embed, or none does. They may have read different disks.
    if partition.agree_minimum(int(kept is not None)):
        return kept
    photos = data.training_photos(encoder.config)
    held_out = data.split_photos(encoder.config, encoder.config.data.validation)
    parts = {"training": _spread(photos.images), "held_out": _spread(held_out.images)}
    sizes = " and ".join(f"{len(part):,} {name}" for name, part in parts.items())
    log.info("embedding %s photos once; scores are relative to them", sizes.replace("_", "-"))
    found = Reference(**{name: encoder.encode_image(part) for name, part in parts.items()})
    if not jax.process_index():
        try:
            _write(found, file)
        except OSError as error:
            log.warning("%s can't be written, so the embeddings are not saved: %s", file, error)
    return found


def _spread(photos: Sequence) -> list:
    """At most `REFERENCE_PHOTOS` of the photos, evenly spaced."""
    count = min(len(photos), REFERENCE_PHOTOS)
    return [photos[row * len(photos) // count] for row in range(count)]


def _write(found: Reference, file: pathlib.Path) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **dataclasses.asdict(found), sha256=np.array(_digest(found)))
    file.parent.mkdir(exist_ok=True)
    files.write_whole(file, buffer.getvalue())


def _read(file: pathlib.Path, dim: int) -> Reference | None:
    """The content of a file that `_write` wrote; None if it is missing or damaged."""
    if not file.is_file():
        return None
    try:
        with np.load(file) as arrays:
            found = Reference(arrays["training"], arrays["held_out"])
            # Files of earlier versions have only the CRC of a zip archive, which NumPy checks.
            digest = arrays["sha256"].item() if "sha256" in arrays else _digest(found)
        if digest != _digest(found):
            raise ValueError("its digest does not match")
        for array in (found.training, found.held_out):
            if array.dtype != np.float32 or array.ndim != 2 or array.shape[1] != dim:
                raise ValueError(f"it holds {array.dtype} {array.shape}, not vectors of {dim}")
            # NaN fails this comparison, too.
            if not len(array) or not (abs(np.linalg.norm(array, axis=1) - 1) < 1e-2).all():
                raise ValueError("it holds vectors that are not of unit length")
        return found
    # Damaged bytes raise many types of errors in the readers of zip archives and arrays.
    except Exception as error:
        fault = str(error).splitlines() or [type(error).__name__]
        log.warning("%s is damaged (%s): it is computed again", file, fault[0])
        return None


def _digest(found: Reference) -> str:
    digest = hashlib.sha256()
    for array in (found.training, found.held_out):
        digest.update(repr((array.dtype.str, array.shape)).encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()
