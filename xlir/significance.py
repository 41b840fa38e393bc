"""How sure a result is: bootstrap intervals, and a paired test between two runs.

Photos are the units, not queries: the captions of a photo, in all languages, are about the same
content, so that they are easy or difficult together. A resampled or exchanged photo takes all its
queries with it.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

# Resamples of an interval, random exchanges of a test, and the seed of both.
RESAMPLES, EXCHANGES, SEED = 1000, 10_000, 0
# The share of resamples that an interval covers.
COVERAGE = 0.95
# Photos x resamples that are in memory at once.
BLOCK = 2**22


@dataclasses.dataclass(frozen=True)
class ByPhoto:
    """A metric's values, added up by photo.

    Attributes:
      sums: the sum of the values of each photo's queries.
      counts: the number of each photo's queries; 0 for a photo without one.
    """

    sums: Float[np.ndarray, " photos"]
    counts: Int[np.ndarray, " photos"]

    @classmethod
    def of(
        cls, values: Float[np.ndarray, " queries"], photo: Int[np.ndarray, " queries"], photos: int
    ) -> "ByPhoto":
        """Adds up the values of queries.

        Args:
          values: one for each query.
          photo: the row of each query's photo.
          photos: the number of photos.
        """
        return cls(np.bincount(photo, values, photos), np.bincount(photo, minlength=photos))

    def mean(self) -> float:
        """The mean over all queries."""
        return float(self.sums.sum() / self.counts.sum())


def macro(metrics: Sequence[ByPhoto]) -> ByPhoto:
    """The mean of several means, such as those of the languages, with one value for each photo."""
    photos = len(metrics[0].sums)
    shares = [metric.sums * (photos / metric.counts.sum()) for metric in metrics]
    return ByPhoto(np.mean(shares, axis=0), np.ones(photos, int))


def resampled_means(
    metrics: Sequence[ByPhoto], resamples: int = RESAMPLES
) -> Float[np.ndarray, "resamples metrics"]:
    """The mean over queries of several metrics, on the same resamples of the photos.

    A resample draws as many photos as there are, with replacement.
    """
    sums = np.stack([metric.sums for metric in metrics], axis=1)
    counts = np.stack([metric.counts for metric in metrics], axis=1).astype(float)
    means = []
    for often in _draws(len(sums), resamples):
        totals = often @ counts
        # A resample without any query of a metric has no mean.
        means.append(
            np.divide(often @ sums, totals, np.full(totals.shape, np.nan), where=totals > 0)
        )
    return np.concatenate(means)


def _draws(photos: int, resamples: int) -> Iterator[Float[np.ndarray, "block photos"]]:
    """How often each photo is drawn in each resample, in blocks of resamples."""
    rng, block = np.random.default_rng(SEED), max(1, BLOCK // photos)
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = rng.integers(0, photos, (rows, photos)) + photos * np.arange(rows)[:, None]
        yield (
            np.bincount(drawn.ravel(), minlength=rows * photos).reshape(rows, photos).astype(float)
        )


def interval(means: Float[np.ndarray, " resamples"]) -> list[float]:
    """The lower and upper end of the 95% bootstrap interval, by the percentile method.

    Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.
    """
    outside = (1 - COVERAGE) / 2
    return [float(end) for end in np.nanquantile(means, [outside, 1 - outside])]


def intervals(metrics: Mapping[Any, ByPhoto]) -> dict[Any, list[float]]:
    """The 95% interval of each metric."""
    means = resampled_means(list(metrics.values()))
    return {name: interval(column) for name, column in zip(metrics, means.T, strict=True)}


@dataclasses.dataclass(frozen=True)
class Difference:
    """The difference between two runs in a metric.

    Attributes:
      mean: mean of the first run minus mean of the second.
      interval: the ends of the 95% bootstrap interval of the difference.
      p: the probability of a difference at least as large, in either direction, if for each photo
        it were random which of the two results belongs to which run (a permutation test).
    """

    mean: float
    interval: list[float]
    p: float


def paired(
    first: Mapping[Any, ByPhoto], second: Mapping[Any, ByPhoto], exchanges: int = EXCHANGES
) -> dict[Any, Difference]:
    """Compares the metrics of two runs on the same queries.

    Args:
      first, second: the same metrics of both runs, on the same photos.
      exchanges: number of random exchanges for the test.

    Raises:
      ValueError: the runs were evaluated on different queries.
    """
    if any(not np.array_equal(first[name].counts, second[name].counts) for name in first):
        raise ValueError("the runs were evaluated on different queries, so they can't be compared")
    differences = [
        ByPhoto(metric.sums - second[name].sums, metric.counts) for name, metric in first.items()
    ]
    means = resampled_means(differences)
    shares = [metric.sums / metric.counts.sum() for metric in differences]
    chances = _exchanged(np.stack(shares, axis=1), exchanges)
    return {
        name: Difference(differences[i].mean(), interval(means[:, i]), float(chances[i]))
        for i, name in enumerate(first)
    }


def _exchanged(
    shares: Float[np.ndarray, "photos metrics"], exchanges: int
) -> Float[np.ndarray, " metrics"]:
    """The two-sided p-value of each metric's sum over photos, if the photos' signs are random."""
    rng, block = np.random.default_rng(SEED), max(1, BLOCK // len(shares))
    observed = shares.sum(axis=0)
    # A sum in another order may differ by a rounding error.
    slack = 1e-12 * np.abs(shares).sum(axis=0)
    smaller, larger = np.zeros_like(observed), np.zeros_like(observed)
    for start in range(0, exchanges, block):
        rows = min(block, exchanges - start)
        sums = (2.0 * rng.integers(0, 2, (rows, len(shares))) - 1) @ shares
        smaller += np.count_nonzero(sums <= observed + slack, axis=0)
        larger += np.count_nonzero(sums >= observed - slack, axis=0)
    # The observed result is one of the possible exchanges.
    return np.minimum(1, 2 * (1 + np.minimum(smaller, larger)) / (1 + exchanges))
