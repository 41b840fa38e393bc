"""Retrieval metrics as pure functions: ranks, Recall@K, median rank, mean reciprocal rank.

Scores that are equal count against the model. A tied group is taken to stand in random order, and
every metric is its expectation over those orders: an encoder that maps everything to one point
scores chance (K / candidates), where counting only strictly better candidates would give it 1.0.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

# Cosines closer than this are equal: float32 dot products differ by about 1e-7 with the order
# of their sums.
TIE = 1e-6
# Queries scored at once: bounds the score matrix to CHUNK x candidates.
CHUNK = 1024


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Where each query's best positive stands.

    Attributes:
      better: number of negatives that score higher than the best positive, one entry a query.
      tied: number of negatives that score the same.
    """

    better: Int[np.ndarray, " queries"]
    tied: Int[np.ndarray, " queries"]

    def recall_at(self, k: int) -> float:
        """The expected share of queries whose positive is among the first k."""
        return float(np.mean(np.clip((k - self.better) / (self.tied + 1), 0, 1)))

    def median_rank(self) -> float:
        """The median of the expected rank; 1 is best."""
        return float(np.median(1 + self.better + self.tied / 2))

    def mean_reciprocal_rank(self) -> float:
        """The mean of the expected 1 / rank."""
        harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, self._last() + 1))])
        span = harmonic[self.better + self.tied + 1] - harmonic[self.better]
        return float(np.mean(span / (self.tied + 1)))

    def _last(self) -> int:
        return int(np.max(self.better + self.tied)) + 1


def retrieval_ranks(
    queries: Float[np.ndarray, "queries dim"],
    candidates: Float[np.ndarray, "candidates dim"],
    query_ids: Int[np.ndarray, " queries"],
    candidate_ids: Int[np.ndarray, " candidates"],
) -> Ranks:
    """Ranks candidates by cosine similarity, without sorting.

    Args:
      queries: embeddings, of any length above zero.
      candidates: embeddings, of any length above zero.
      query_ids: the photo of each query.
      candidate_ids: the photo of each candidate; all that match the query's are positives, and
        the best of them counts.

    Raises:
      ValueError: an embedding is not finite or has length zero, or a query has no positive.
    """
    queries, candidates = _unit(queries, "query"), _unit(candidates, "candidate")
    better, tied = [], []
    for start in range(0, len(queries), CHUNK):
        scores = queries[start : start + CHUNK] @ candidates.T
        positive = query_ids[start : start + CHUNK, None] == candidate_ids[None, :]
        if not positive.any(axis=1).all():
            row = start + int(np.argmin(positive.any(axis=1)))
            raise ValueError(f"query {row} (photo {query_ids[row]}) has no matching candidate")
        best = np.max(scores, axis=1, where=positive, initial=-np.inf, keepdims=True)
        negative_gap = np.where(positive, -np.inf, scores - best)
        higher = np.sum(negative_gap > TIE, axis=1)
        better.append(higher)
        tied.append(np.sum(negative_gap >= -TIE, axis=1) - higher)
    return Ranks(np.concatenate(better), np.concatenate(tied))


def summarize(ranks: Ranks, at: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Recall at each K (0 to 1), median rank and mean reciprocal rank."""
    recalls = {f"R@{k}": ranks.recall_at(k) for k in at}
    return recalls | {"median_rank": ranks.median_rank(), "mrr": ranks.mean_reciprocal_rank()}


def _unit(embeddings: np.ndarray, kind: str) -> np.ndarray:
    """Rows scaled to length one, in float32."""
    embeddings = np.asarray(embeddings, np.float32)
    if not np.isfinite(embeddings).all():
        bad = int(np.argmin(np.isfinite(embeddings).all(axis=1)))
        raise ValueError(f"the embedding of {kind} {bad} is not finite")
    norm = np.linalg.norm(embeddings, axis=1, keepdims=True)
    if not norm.all():
        raise ValueError(f"the embedding of {kind} {int(np.argmin(norm))} is all zeros")
    return embeddings / norm
