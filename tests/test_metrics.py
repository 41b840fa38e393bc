"""Compares ranks and metrics with scikit-learn, SciPy, CLIP_benchmark; collapsed encoders."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import rankdata
from sklearn.metrics import (
    coverage_error,
    label_ranking_average_precision_score,
    top_k_accuracy_score,
)

from xlir import metrics


def first_ranks(scores, positive, order):
    """The rank of each query's first positive; tied candidates are ranked in the given order.

    Args:
      scores: [queries, candidates].
      positive: whether a candidate is a positive; of the same shape.
      order: a permutation of the candidates for each query; of the same shape.
    """
    scores, positive = (np.take_along_axis(array, order, axis=1) for array in (scores, positive))
    ranks = rankdata(-scores, method="ordinal", axis=1)
    return np.min(ranks, axis=1, where=positive, initial=scores.shape[1])


def random_relevance(rng, shape):
    """About a third of all pairs are positive, and at least one per query."""
    positive = rng.random(shape) < 1 / 3
    positive[np.arange(shape[0]), rng.integers(0, shape[1], shape[0])] = True
    return positive


@pytest.mark.parametrize("seed", range(5))
def test_ties_count_as_the_mean_over_all_orders(seed):
    """Several positives, some tied with each other, in all 720 orders of six candidates."""
    rng = np.random.default_rng(seed)
    orders = np.array(list(itertools.permutations(range(6))))
    scores, positive = rng.integers(0, 3, (8, 6)).astype(float), random_relevance(rng, (8, 6))
    ranks = metrics.best_ranks(scores, positive)
    first = np.stack(
        [
            first_ranks(*(np.tile(one, (len(orders), 1)) for one in pair), orders)
            for pair in zip(scores, positive, strict=True)
        ]
    )
    for k in range(1, 7):
        assert ranks.recall_at(k) == pytest.approx((first <= k).mean(), abs=1e-12)
    assert ranks.mean_reciprocal_rank() == pytest.approx((1 / first).mean(), abs=1e-12)
    assert ranks.median_rank() == pytest.approx(np.median(first.mean(axis=1)), abs=1e-12)
    for row, (score, right) in enumerate(zip(scores, positive, strict=True)):
        # The depth in the reversed list at which scikit-learn has covered all positives.
        depth = coverage_error(right[orders], rankdata(-score[orders], "ordinal", axis=1))
        assert ranks.expected_rank()[row] == pytest.approx(7 - depth, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_ties_count_as_the_mean_over_random_orders(seed, monkeypatch):
    """With large tied groups, metrics are within four standard errors of 400 shuffles' mean."""
    monkeypatch.setattr(metrics, "CHUNK", 7)  # several chunks; the last one is shorter
    rng = np.random.default_rng(seed)
    # Signs in 6 dimensions: seven different cosines.
    queries, candidates = (rng.choice([-1.0, 1.0], size=(count, 6)) for count in (30, 150))
    query_ids, candidate_ids = rng.integers(0, 50, 30), np.arange(150) % 50
    ranks = metrics.retrieval_ranks(queries, candidates, query_ids, candidate_ids)
    positive = query_ids[:, None] == candidate_ids[None, :]
    found = {k: ranks.recall_at(k) for k in (1, 5, 10)} | {"mrr": ranks.mean_reciprocal_rank()}
    trials = {name: [] for name in found}
    for _ in range(400):
        order = rng.permuted(np.tile(np.arange(150), (30, 1)), axis=1)
        first = first_ranks(queries @ candidates.T, positive, order)
        for k in (1, 5, 10):
            trials[k].append((first <= k).mean())
        trials["mrr"].append((1 / first).mean())
    for name, values in trials.items():
        error = np.std(values) / math.sqrt(len(values))
        assert error > 0
        assert found[name] == pytest.approx(np.mean(values), abs=4 * error), name


def captioned_photos(rng, photos=200, captions=5, dim=32):
    """Embeddings of photos and of captions that resemble them, and the photo of each caption."""
    images, image_of = rng.normal(size=(photos, dim)), np.repeat(np.arange(photos), captions)
    return images, images[image_of] + 3 * rng.normal(size=(len(image_of), dim)), image_of


def cosines(queries, candidates):
    unit = (array / np.linalg.norm(array, axis=1, keepdims=True) for array in (queries, candidates))
    return next(unit) @ next(unit).T


def test_recall_is_clip_benchmarks_without_ties():
    """Five captions per photo, in both directions."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install 'xlir[export]'")
    reference = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
    images, texts, image_of = captioned_photos(np.random.default_rng(0))
    ids = np.arange(len(images))
    positive = torch.from_numpy(image_of[:, None] == ids)
    scores = torch.from_numpy(cosines(texts, images))
    forward = metrics.retrieval_ranks(texts, images, image_of, ids)
    backward = metrics.retrieval_ranks(images, texts, ids, image_of)
    for ranks, score, right in ((forward, scores, positive), (backward, scores.T, positive.T)):
        for k in (1, 5, 10):
            hits = reference.recall_at_k(score, right, k) > 0
            assert 0.1 < ranks.recall_at(k) < 0.9
            assert ranks.recall_at(k) == pytest.approx(hits.double().mean().item(), abs=1e-12)


def test_metrics_are_scikit_learns_without_ties():
    images, texts, image_of = captioned_photos(np.random.default_rng(1))
    ids = np.arange(len(images))
    scores, positive = cosines(texts, images), image_of[:, None] == ids
    forward = metrics.retrieval_ranks(texts, images, image_of, ids)
    for k in (1, 5, 10):
        expected = top_k_accuracy_score(image_of, scores, k=k, labels=ids)
        assert forward.recall_at(k) == pytest.approx(expected, abs=1e-12)
    # With one positive per query, this is the reciprocal rank.
    expected = label_ranking_average_precision_score(positive, scores)
    assert forward.mean_reciprocal_rank() == pytest.approx(expected, abs=1e-12)
    backward = metrics.retrieval_ranks(images, texts, ids, image_of)
    depth = coverage_error(positive.T, -scores.T)
    assert 1 + backward.better.mean() == pytest.approx(len(texts) + 1 - depth, abs=1e-9)


@pytest.mark.parametrize("noise", [0, 1e-7])
@pytest.mark.parametrize(("photos", "dim"), [(200, 7), (899, 512), (1000, 1280)])
def test_a_collapsed_encoder_scores_chance(photos, dim, noise):
    """It would score 1.0 if ties counted as hits. The order of summation must not matter either.

    Chance with five captions per photo: 1 minus the probability that all k drawn captions belong to
    other photos.
    """
    rng = np.random.default_rng(dim)
    points, image_of = rng.normal(size=(2, dim)), np.repeat(np.arange(photos), 5)
    images, texts = (
        (point * (1 + noise * rng.normal(size=(count, dim)))).astype(np.float32)
        for point, count in zip(points, (photos, 5 * photos), strict=True)
    )
    ids = np.arange(photos)
    forward = metrics.summarize(metrics.retrieval_ranks(texts, images, image_of, ids))
    backward = metrics.summarize(metrics.retrieval_ranks(images, texts, ids, image_of))
    for k in (1, 5, 10):
        assert forward[f"R@{k}"] == pytest.approx(k / photos, abs=1e-12)
        missed = math.comb(5 * photos - 5, k) / math.comb(5 * photos, k)
        assert backward[f"R@{k}"] == pytest.approx(1 - missed, abs=1e-12)
    assert forward["median_rank"] == (photos + 1) / 2
    assert backward["median_rank"] == pytest.approx((5 * photos + 1) / 6)


def test_ties_stop_at_rounding_errors():
    """Two photos whose cosines differ by 1e-7 are tied; a third, which differs by 2e-6, is not."""
    angle = np.arccos([0.5, 0.5 + 1e-7, 0.5 + 2e-6])
    images, text = np.stack([np.cos(angle), np.sin(angle)], axis=1), np.array([[1.0, 0.0]])
    for right, rank in ((0, 2.5), (1, 2.5), (2, 1)):
        ranks = metrics.retrieval_ranks(text, images, np.array([right]), np.arange(3))
        assert ranks.expected_rank() == [rank]


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_length_of_embeddings_changes_nothing(scale):
    images, texts, image_of = captioned_photos(np.random.default_rng(2))
    results = [
        metrics.summarize(metrics.retrieval_ranks(*pair, image_of, np.arange(len(images))))
        for pair in ((texts, images), (scale * texts, images), (texts, scale * images))
    ]
    assert results[0] == results[1] == results[2]


def test_the_best_of_several_positives_counts():
    candidates = np.eye(4)
    query = np.array([[0.1, 0.9, 0.5, 0.0]])
    ranks = metrics.retrieval_ranks(query, candidates, np.array([1]), np.array([1, 0, 1, 0]))
    assert (ranks.better[0], ranks.tied[0], ranks.positives[0]) == (1, 0, 1)


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
