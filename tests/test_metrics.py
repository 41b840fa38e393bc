"""Ranks and metrics against sorting, by hand, with ties, and for broken encoders."""

import fractions

import numpy as np
import pytest

from xlir import metrics


def brute_force(scores, positive, k):
    """Mean over all orders of tied candidates, one query at a time, exact fractions."""
    recall, reciprocal = fractions.Fraction(0), fractions.Fraction(0)
    for row, right in zip(scores, positive, strict=True):
        best = max(s for s, p in zip(row, right, strict=True) if p)
        wrong = [s for s, p in zip(row, right, strict=True) if not p]
        first = sum(s > best for s in wrong) + 1
        places = range(first, first + sum(s == best for s in wrong) + 1)
        recall += fractions.Fraction(sum(place <= k for place in places), len(places))
        reciprocal += sum(fractions.Fraction(1, place) for place in places) / len(places)
    return float(recall / len(scores)), float(reciprocal / len(scores))


@pytest.mark.parametrize("seed", range(5))
def test_matches_brute_force_with_ties_and_several_positives(seed, monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK", 7)  # several chunks, the last one short
    rng = np.random.default_rng(seed)
    # Signs in 4 dimensions: many exact ties.
    queries = rng.choice([-1.0, 1.0], size=(30, 4))
    candidates = rng.choice([-1.0, 1.0], size=(50, 4))
    query_ids, candidate_ids = rng.integers(0, 12, 30), np.arange(50) % 12
    ranks = metrics.retrieval_ranks(queries, candidates, query_ids, candidate_ids)
    positive = query_ids[:, None] == candidate_ids[None, :]
    scores = queries @ candidates.T
    summary = metrics.summarize(ranks)
    for k in (1, 5, 10):
        recall, reciprocal = brute_force(scores, positive, k)
        assert summary[f"R@{k}"] == pytest.approx(recall, abs=1e-9)
    assert summary["mrr"] == pytest.approx(reciprocal, abs=1e-9)


def test_matches_sorting_without_ties():
    rng = np.random.default_rng(0)
    queries, candidates = rng.normal(size=(200, 32)), rng.normal(size=(200, 32))
    ids = np.arange(200)
    ranks = metrics.retrieval_ranks(queries, candidates, ids, ids)
    cosine = queries @ (candidates / np.linalg.norm(candidates, axis=1, keepdims=True)).T
    place = np.argmax(np.argsort(-cosine, axis=1) == ids[:, None], axis=1)
    np.testing.assert_array_equal(ranks.better, place)
    assert ranks.median_rank() == np.median(place + 1)


def test_a_collapsed_encoder_scores_chance():
    """Not 1.0, as strict comparison would give, for any size and whatever the sums' order."""
    for count, dim in ((100, 7), (899, 512), (1000, 1280)):
        point = np.random.default_rng(dim).normal(size=(1, dim)).astype(np.float32)
        same = np.repeat(point, count, axis=0)
        ids = np.arange(count)
        summary = metrics.summarize(metrics.retrieval_ranks(same, same, ids, ids))
        for k in (1, 5, 10):
            assert summary[f"R@{k}"] == pytest.approx(k / count)
        assert summary["median_rank"] == (count + 1) / 2


def test_the_best_of_several_positives_counts():
    candidates = np.eye(4)
    query = np.array([[0.1, 0.9, 0.5, 0.0]])
    ranks = metrics.retrieval_ranks(query, candidates, np.array([1]), np.array([1, 0, 1, 0]))
    assert (ranks.better[0], ranks.tied[0]) == (1, 0)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "is not finite"), (np.inf, "is not finite"), (0, "all zeros")]
)
def test_broken_embeddings_raise(side, value, message):
    pair = [np.random.default_rng(i).normal(size=(10, 4)) for i in (0, 1)]
    pair[side][3] = value
    kind = ("query", "candidate")[side]
    with pytest.raises(ValueError, match=f"embedding of {kind} 3 .*{message}"):
        metrics.retrieval_ranks(*pair, np.arange(10), np.arange(10))


def test_a_query_without_a_positive_raises():
    with pytest.raises(ValueError, match=r"query 1 \(photo 7\) has no matching candidate"):
        metrics.retrieval_ranks(np.eye(2), np.eye(2), np.array([0, 7]), np.array([0, 1]))
