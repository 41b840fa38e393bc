"""Metrics as pure functions: Recall@K, median rank, MRR for retrieval; mAP and F1@k for tagging.

`retrieval_metrics` has further metrics of retrieval, from the ranks of all positives.

Tied candidates count as if they were in random order: every metric is the expectation over all
orders of the ties. An encoder that maps everything to one point therefore scores at chance level:
its Recall@K is K / candidates if each query has one positive. If only strictly better candidates
counted, its Recall@K would be 1.

Functions that take scores treat only exactly equal scores as tied, so scores may have any scale.
Cosines of equal inputs differ by rounding errors, which `rounded` removes. `positive_ranks` calls
`rounded` itself; callers of the other functions must apply it to cosines first.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

# Decimal places of a cosine that count. The float32 embedding of an input depends on the batch that
# the input is in, which changes cosines by up to 3e-7 (mUSE). Without rounding, the cosines of a
# collapsed encoder would differ.
DECIMALS = 6
# Queries scored at once: bounds the score matrix to CHUNK x candidates.
CHUNK = 512
# The numbers K of Recall@K that every result has.
AT = (1, 5, 10)


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The rank of each query's best positive; all orders of tied candidates are equally likely.

    Attributes:
      better: for each query, the number of negatives that score higher than the best positive.
      tied: number of negatives with the same score as the best positive.
      positives: number of positives with that score, including the best positive. The first of
        them in the ranking counts.
    """

    better: Int[np.ndarray, " queries"]
    tied: Int[np.ndarray, " queries"]
    positives: Int[np.ndarray, " queries"]

    def recall_at(self, k: int) -> float:
        """The expected share of queries that have a positive among the first k."""
        return float(np.mean(self.expectation(lambda rank: rank <= k)))

    def expected_rank(self) -> Float[np.ndarray, " queries"]:
        """The expected rank of each query's first positive; 1 is best.

        The smallest of r positions drawn from n without replacement is (n + 1) / (r + 1) on
        average.
        """
        return self.better + (self.tied + self.positives + 1) / (self.positives + 1)

    def median_rank(self) -> float:
        """The median of the expected rank; 1 is best."""
        return float(np.median(self.expected_rank()))

    def mean_reciprocal_rank(self) -> float:
        """The mean of the expected 1 / rank."""
        return float(np.mean(self.expectation(lambda rank: 1 / rank)))

    def expectation(
        self, value: Callable[[Int[np.ndarray, " ranks"]], np.ndarray]
    ) -> Float[np.ndarray, " queries"]:
        """The expectation, for each query, of a function of the rank of its first positive."""
        expected = value(self.better + 1).astype(np.float64)
        rows = np.flatnonzero(self.tied)
        # With many ties, many queries have the same three numbers: each case is computed once.
        table = np.stack([self.better, self.tied, self.positives], axis=1)[rows]
        cases, case = np.unique(table, axis=0, return_inverse=True)
        means = [
            _first_positive(tied, positives) @ value(better + np.arange(1, tied + 2))
            for better, tied, positives in cases.tolist()
        ]
        expected[rows] = np.array(means)[case.reshape(-1)] if means else 0
        return expected


def _first_positive(tied: int, positives: int) -> Float[np.ndarray, " places"]:
    """The probability that a tied group's first positive is at position 1, 2, ..., tied + 1.

    If no earlier position holds a positive, a position holds one of the r positives with
    probability r / (n + r), where n is the number of negatives left.
    """
    left = np.arange(tied, -1, -1)
    here = positives / (left + positives)
    none_before = np.concatenate([[1.0], np.cumprod(1 - here[:-1])])
    return none_before * here


@dataclasses.dataclass(frozen=True)
class PositiveRanks:
    """Where all positives of each query are ranked; tied candidates are in random order.

    Queries may have different numbers of positives: rows are filled up on the right.

    Attributes:
      better: for each positive, the number of candidates that score higher.
      tied: number of candidates with the positive's score, including itself.
      before: number of the query's positives that score higher.
      same: number of the query's positives with the positive's score, including itself.
      real: False for the places that fill up a row; the other fields have no meaning there.
    """

    better: Int[np.ndarray, "queries positives"]
    tied: Int[np.ndarray, "queries positives"]
    before: Int[np.ndarray, "queries positives"]
    same: Int[np.ndarray, "queries positives"]
    real: Bool[np.ndarray, "queries positives"]

    def best(self) -> Ranks:
        """The rank of each query's best positive."""
        place = np.argmin(np.where(self.real, self.before, np.iinfo(np.int64).max), axis=1)
        rows = np.arange(len(place))
        better, tied, same = (x[rows, place] for x in (self.better, self.tied, self.same))
        return Ranks(better, tied - same, same)


def positive_ranks(
    queries: Float[np.ndarray, "queries dim"],
    candidates: Float[np.ndarray, "candidates dim"],
    query_ids: Int[np.ndarray, " queries"],
    candidate_ids: Int[np.ndarray, " candidates"],
) -> PositiveRanks:
    """Ranks candidates by cosine similarity, without sorting.

    Args:
      queries: embeddings of any nonzero length.
      candidates: embeddings of any nonzero length.
      query_ids: the photo of each query.
      candidate_ids: the photo of each candidate. All candidates with the query's photo are
        positives.

    Raises:
      ValueError: an embedding is not finite or has length zero, or a query has no positive.
    """
    queries, candidates = _unit(queries, "query"), _unit(candidates, "candidate")
    places = _positives(query_ids, candidate_ids)
    chunks = []
    for start in range(0, len(queries), CHUNK):
        rows = slice(start, start + CHUNK)
        scores = rounded(queries[rows] @ candidates.T, axis=1)
        chunks.append(_counts(scores, places[rows]))
    fields = (np.concatenate(parts) for parts in zip(*chunks, strict=True))
    return PositiveRanks(*fields, real=places >= 0)


def retrieval_ranks(
    queries: Float[np.ndarray, "queries dim"],
    candidates: Float[np.ndarray, "candidates dim"],
    query_ids: Int[np.ndarray, " queries"],
    candidate_ids: Int[np.ndarray, " candidates"],
) -> Ranks:
    """The rank of each query's best positive; arguments and errors as for `positive_ranks`."""
    return positive_ranks(queries, candidates, query_ids, candidate_ids).best()


def summarize(ranks: Ranks) -> dict[str, float]:
    """Recall at 1, 5 and 10 (0 to 1), median rank and mean reciprocal rank."""
    recalls = {f"R@{k}": ranks.recall_at(k) for k in AT}
    return recalls | {"median_rank": ranks.median_rank(), "mrr": ranks.mean_reciprocal_rank()}


def _positives(
    query_ids: Int[np.ndarray, " queries"], candidate_ids: Int[np.ndarray, " candidates"]
) -> Int[np.ndarray, "queries positives"]:
    """The rows of each query's positives among the candidates, filled up with -1."""
    order = np.argsort(candidate_ids, kind="stable")
    ids = candidate_ids[order]
    first, end = (np.searchsorted(ids, query_ids, side=side) for side in ("left", "right"))
    if not (end > first).all():
        row = int(np.argmin(end > first))
        raise ValueError(f"query {row} (photo {query_ids[row]}) has no matching candidate")
    place = first[:, None] + np.arange(np.max(end - first))
    return np.where(place < end[:, None], order[np.minimum(place, len(order) - 1)], -1)


def _counts(
    scores: Float[np.ndarray, "queries candidates"],
    places: Int[np.ndarray, "queries positives"],
) -> tuple[Int[np.ndarray, "queries positives"], ...]:
    """The fields `better`, `tied`, `before` and `same` of `PositiveRanks`."""
    own = np.take_along_axis(scores, np.maximum(places, 0), axis=1)
    # Minus infinity is neither higher than a score, nor equal to one.
    own = np.where(places >= 0, own, -np.inf)
    counts = []
    for column in own.T:
        column = column[:, None]
        compared = (scores > column, scores == column, own > column, own == column)
        counts.append([np.count_nonzero(array, axis=1) for array in compared])
    return tuple(np.stack(parts, axis=1) for parts in zip(*counts, strict=True))


def rounded(
    cosines: Float[np.ndarray, "rows columns"], axis: int | None = None
) -> Float[np.ndarray, "rows columns"]:
    """Each cosine minus the highest one, rounded to `DECIMALS` places for exact comparison.

    The highest becomes zero, as do cosines that are lower only by a rounding error. So all scores
    of an encoder that maps everything to one point are equal.

    Args:
      cosines: cosines, or sums of several cosines.
      axis: 1 if only rows are ranked, each by itself; None if columns are ranked too.
    """
    below = cosines - np.max(cosines, axis=axis, keepdims=True)
    return np.round(below, DECIMALS, out=below)


def best_ranks(
    scores: Float[np.ndarray, "queries candidates"],
    positive: Bool[np.ndarray, "queries candidates"],
) -> Ranks:
    """The rank of each query's best positive; every query must have a positive."""
    best = np.max(scores, axis=1, where=positive, initial=-np.inf, keepdims=True)
    same = scores == best
    positives = np.sum(same & positive, axis=1)
    return Ranks(np.sum(scores > best, axis=1), np.sum(same, axis=1) - positives, positives)


def average_precision(
    scores: Float[np.ndarray, " photos"], positive: Bool[np.ndarray, " photos"]
) -> float:
    """The mean, over the positives, of the precision at each one's rank (not interpolated).

    Photos are ranked by score. The result is the expectation over all orders of tied photos.
    Consider a tied group of n photos with r positives, ranked after N photos with R positives.
    Position j of the group holds a positive with probability r / n. If it does,
    R + 1 + (j - 1) (r - 1) / (n - 1) of the first N + j photos are positives on average.

    Raises:
      ValueError: a score is not finite, or no photo is positive.
    """
    if not np.isfinite(scores).all():
        raise ValueError(f"score {int(np.argmin(np.isfinite(scores)))} is not finite")
    if not positive.any():
        raise ValueError("average precision needs a positive")
    order = np.argsort(-scores, kind="stable")
    ranked, right = scores[order], positive[order]
    starts = np.concatenate([[0], 1 + np.flatnonzero(ranked[1:] != ranked[:-1])])
    sizes = np.diff(np.concatenate([starts, [len(ranked)]]))
    hits = np.add.reduceat(right.astype(np.float64), starts)
    # Each photo's group, and the photo's position in the group, from 0.
    group = np.repeat(np.arange(len(starts)), sizes)
    place = np.arange(len(ranked)) - starts[group]
    size, hit, before = sizes[group], hits[group], (np.cumsum(hits) - hits)[group]
    so_far = before + 1 + place * (hit - 1) / np.maximum(size - 1, 1)
    return float(np.sum(hit / size * so_far / np.arange(1, len(ranked) + 1)) / positive.sum())


def chosen_at(scores: Float[np.ndarray, "photos tags"], k: int) -> Float[np.ndarray, "photos tags"]:
    """The probability, 0 to 1, that a tag is among a photo's top k; ties are in random order."""
    last = np.partition(scores, -k, axis=1)[:, -k, None]
    better, tied = scores > last, scores == last
    free = k - np.sum(better, axis=1, keepdims=True)
    return better + tied * (free / np.sum(tied, axis=1, keepdims=True))


def tagging(
    scores: Float[np.ndarray, "photos tags"],
    positive: Bool[np.ndarray, "photos tags"],
    k: int = 5,
    hits: Sequence[int] = (1, 10),
) -> dict[str, float]:
    """Metrics of multi-label tagging, 0 to 1.

    `mAP` is the mean over tags of the average precision over all photos; `macro_F1@k` is the mean
    over tags of the F1 score if each photo gets its k best tags. Both leave out tags that no photo
    has. `micro_F1@k` and `precision@k` count all pairs of photo and tag together. `hit@K` is the
    share of photos with a true tag among the first K, out of the photos that have a true tag.
    Metrics are expectations over the orders of ties (F1 is computed from expected counts), so equal
    scores give chance level.

    Raises:
      ValueError: a score is not finite, or no photo has a tag.
    """
    if not np.isfinite(scores).all():
        raise ValueError("a score is not finite")
    if not positive.any():
        raise ValueError("no photo has any of the tags")
    k = min(k, scores.shape[1])
    used, tagged = np.flatnonzero(positive.any(axis=0)), positive.any(axis=1)
    chosen = chosen_at(scores, k)
    right, told = np.sum(chosen * positive, axis=0), np.sum(chosen, axis=0)
    count = np.sum(positive, axis=0)
    precisions = [average_precision(scores[:, tag], positive[:, tag]) for tag in used]
    ranks = best_ranks(scores[tagged], positive[tagged])
    return {
        "mAP": float(np.mean(precisions)),
        f"precision@{k}": float(right.sum() / told.sum()),
        f"micro_F1@{k}": float(2 * right.sum() / (told.sum() + count.sum())),
        f"macro_F1@{k}": float(np.mean(2 * right[used] / (told[used] + count[used]))),
    } | {f"hit@{at}": ranks.recall_at(at) for at in hits}


def _unit(embeddings: np.ndarray, kind: str) -> np.ndarray:
    """Rows scaled to unit length, in float64: summation order changes a cosine by only 1e-15."""
    embeddings = np.asarray(embeddings, np.float64)
    if not np.isfinite(embeddings).all():
        bad = int(np.argmin(np.isfinite(embeddings).all(axis=1)))
        raise ValueError(f"the embedding of {kind} {bad} is not finite")
    norm = np.linalg.norm(embeddings, axis=1, keepdims=True)
    if not norm.all():
        raise ValueError(f"the embedding of {kind} {int(np.argmin(norm))} is all zeros")
    return embeddings / norm
