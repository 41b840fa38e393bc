"""Metrics of retrieval, from the ranks of each query's positives.

Each metric has a value for each query, and its result is their mean. The values are expectations
over all orders of tied candidates, as in `metrics`. They are, for a number k:

- `R@k`: 1 if a positive is among the first k, otherwise 0. This is what papers on image-text
  retrieval call recall (Karpathy and Li 2015, https://arxiv.org/abs/1412.2306).
- `recall@k`: the share of the query's positives that are among the first k.
- `precision@k`: the number of positives among the first k, divided by k.
- `MAP@k`: the sum of the precisions at the positives among the first k, divided by the number of
  the query's positives (as in trec_eval).
- `nDCG@k`: the sum of 1 / log2(rank + 1) over the positives among the first k, divided by its
  highest possible value (Järvelin and Kekäläinen 2002, https://doi.org/10.1145/582415.582418).
- `MRR@k`: 1 / rank of the first positive, 0 if it is not among the first k.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from xlir.metrics import AT, PositiveRanks
from xlir.significance import ByPhoto

Values = dict[str, Float[np.ndarray, " queries"]]


def values(ranks: PositiveRanks, at: Sequence[int] = AT) -> Values:
    """The value of each metric for each query: 0 to 1, except `mean_rank`, where 1 is best."""
    best = ranks.best()
    count = ranks.real.sum(axis=1)
    found = {f"R@{k}": best.expectation(lambda rank, k=k: rank <= k) for k in at}
    found |= {"mrr": best.expectation(lambda rank: 1 / rank), "mean_rank": best.expected_rank()}
    for k in at:
        hits = _sum(ranks, np.ones(k))
        discounts = 1 / np.log2(np.arange(2, k + 2))
        found |= {
            f"recall@{k}": hits / count,
            f"precision@{k}": hits / k,
            f"MAP@{k}": _precisions(ranks, k) / count,
            f"nDCG@{k}": _sum(ranks, discounts) / np.cumsum(discounts)[np.minimum(count, k) - 1],
            f"MRR@{k}": best.expectation(lambda rank, k=k: (rank <= k) / rank),
        }
    return found


@dataclasses.dataclass(frozen=True)
class Ranked:
    """The answers to some queries.

    Attributes:
      ranks: the ranks of their positives.
      photo: the row of each query's photo, whether the query is a caption or the photo itself.
    """

    ranks: PositiveRanks
    photo: Int[np.ndarray, " queries"]

    def by_photo(self, photos: int, at: Sequence[int] = AT) -> dict[str, ByPhoto]:
        """The values of each metric, added up by photo; `photos` is the number of all photos."""
        found = values(self.ranks, at)
        return {name: ByPhoto.of(value, self.photo, photos) for name, value in found.items()}


def _places(ranks: PositiveRanks, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The first place of each positive's tied group, from 0, and the one after its last; at most k.

    Both are [queries, positives].
    """
    return np.minimum(ranks.better, k), np.minimum(ranks.better + ranks.tied, k)


def _size(ranks: PositiveRanks) -> np.ndarray:
    """The size of each positive's tied group: [queries, positives]; 1 where a row is filled up."""
    return np.maximum(ranks.tied, 1)


def _sum(ranks: PositiveRanks, gains: Float[np.ndarray, " k"]) -> Float[np.ndarray, " queries"]:
    """The expected sum, over a query's positives, of the gain at each one's place.

    A positive is at each place of its tied group with the same probability.
    """
    start, end = _places(ranks, len(gains))
    total = np.concatenate([[0.0], np.cumsum(gains)])
    return np.sum((total[end] - total[start]) / _size(ranks), axis=1, where=ranks.real)


def _precisions(ranks: PositiveRanks, k: int) -> Float[np.ndarray, " queries"]:
    """The expected sum of the precisions at the positives among the first k.

    Consider a tied group of n candidates with r positives, after N candidates with R positives. If
    a positive is at position j of the group, R + 1 + (j - 1) (r - 1) / (n - 1) of the first N + j
    candidates are positives on average. The sum over j of (j - 1) / (N + j) is the number of places
    minus (N + 1) times the sum of 1 / (N + j).
    """
    start, end = _places(ranks, k)
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, k + 1))])
    inverse = harmonic[end] - harmonic[start]
    growth = (ranks.same - 1) / np.maximum(ranks.tied - 1, 1)
    sums = (ranks.before + 1) * inverse + growth * (end - start - (ranks.better + 1) * inverse)
    return np.sum(sums / _size(ranks), axis=1, where=ranks.real)
