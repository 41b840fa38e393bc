"""Calibrated percentiles, which tell whether anything in an index fits a query.

A cosine says little by itself: a query such as "Sagittarius" has about the same cosine with all
photos, while "a dog on a beach" is near some photos and far from others. So a photo's score for a
query is its cosine, minus the mean and plus the standard deviation of the query's cosines with
training photos. Within one query, this does not change the order of the photos.

The percentile of a photo is the share of held-out captions whose best held-out photo has a lower
score. With a cutoff of 0.1, one in ten such captions would find nothing. (docs/results.md measures
how well percentiles and cosines tell queries that fit from queries that do not.)
"""

import dataclasses
import io
import logging
import pathlib

import numpy as np
from jaxtyping import Float

from input_pipeline import files
from xlir import data, reference_photos
from xlir.encoder import Encoder

log = logging.getLogger(__name__)

FILE = "calibration.npz"
# The largest number of held-out captions that scores are compared with.
CAPTIONS = 2048


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Percentiles of photos for text queries.

    Attributes:
      training: embeddings of training photos, of unit length.
      best: for each held-out caption, the score of its best held-out photo; sorted, ascending.
    """

    training: Float[np.ndarray, "training dim"]
    best: Float[np.ndarray, " captions"]

    @classmethod
    def of_run(cls, encoder: Encoder, workdir: pathlib.Path) -> "Calibration":
        """Computes the calibration of a run from its own data set.

        Raises:
          ValueError, FileNotFoundError: the data set of the run is missing.
        """
        photos = reference_photos.reference(encoder, workdir)
        held_out = data.split_photos(encoder.config, encoder.config.data.validation)
        captions = [captions[0] for captions in held_out.captions]
        step = -(-len(captions) // CAPTIONS)
        uncalibrated = cls(photos.training, np.zeros(1, np.float32))
        queries = encoder.encode_text(captions[::step])
        cosines = (queries @ photos.held_out.T).max(axis=1)
        scores = uncalibrated.offsets(queries) + cosines
        return cls(photos.training, np.sort(scores.astype(np.float32)))

    def offsets(self, queries: Float[np.ndarray, "queries dim"]) -> Float[np.ndarray, " queries"]:
        """The numbers to add to the cosines of unit-length queries to get scores."""
        cosines = queries @ self.training.T
        return cosines.std(axis=1) - cosines.mean(axis=1)

    def percentiles(
        self, query: Float[np.ndarray, " dim"], cosines: Float[np.ndarray, " photos"]
    ) -> Float[np.ndarray, " photos"]:
        """The percentiles, 0 to 1, of photos with these cosines for a query of unit length."""
        return self.of_scores(cosines + self.offsets(query[None]))

    def of_scores(self, scores: Float[np.ndarray, " scores"]) -> Float[np.ndarray, " scores"]:
        """The percentiles, 0 to 1, of scores."""
        return np.searchsorted(self.best, scores) / len(self.best)

    def write(self, folder: pathlib.Path) -> None:
        """Writes the calibration into the folder of an index."""
        buffer = io.BytesIO()
        np.savez(buffer, **dataclasses.asdict(self))
        files.write_whole(folder / FILE, buffer.getvalue())

    @classmethod
    def read(cls, folder: pathlib.Path, dim: int) -> "Calibration | None":
        """Reads what `write` wrote; None if there is none.

        Raises:
          ValueError: the file is damaged.
        """
        file = folder / FILE
        if not file.is_file():
            return None
        try:
            with np.load(file) as arrays:
                found = cls(arrays["training"], arrays["best"])
            if found.training.shape[1:] != (dim,) or not len(found.best):
                raise ValueError("its shape differs")
            return found
        # Damaged bytes raise many types of errors in the readers of zip archives and arrays.
        except Exception as error:
            raise ValueError(
                f"{file} is damaged: restore it from a copy, or delete it to search without "
                "calibrated percentiles"
            ) from error


def of_run(encoder: Encoder, workdir: pathlib.Path) -> Calibration | None:
    """As `Calibration.of_run`; if the data set is missing, logs this and returns None."""
    try:
        return Calibration.of_run(encoder, workdir)
    except (ValueError, FileNotFoundError) as error:
        reason, *_ = str(error).splitlines()
        log.warning(
            "the index has no calibrated percentiles, so searches can't tell when nothing fits: %s",
            reason,
        )
        return None
