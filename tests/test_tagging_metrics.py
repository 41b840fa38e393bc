"""Compares tagging metrics with scikit-learn over all orders of ties; collapsed taggers."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score, f1_score, precision_score

from xlir import metrics


def orders(scores):
    """All orders by descending score, with ties in every possible order."""
    groups = [
        [place for place, one in enumerate(scores) if one == score]
        for score in sorted(set(scores), reverse=True)
    ]
    for parts in itertools.product(*(itertools.permutations(group) for group in groups)):
        yield list(itertools.chain(*parts))


def mean_average_precision_score(scores, positive):
    """The mean of scikit-learn's score over all orders of tied photos."""
    falling = -np.arange(len(scores))
    return np.mean(
        [average_precision_score(positive[order], falling) for order in orders(scores.tolist())]
    )


def reference_tagging(scores, positive, k):
    """Each metric computed from mean counts over all orders of tied tags."""
    told, right, hits = np.zeros(scores.shape[1]), np.zeros(scores.shape[1]), []
    for score, true in zip(scores, positive, strict=True):
        chosen = np.zeros((0, len(score)), bool)
        for order in orders(score.tolist()):
            chosen = np.vstack([chosen, np.isin(np.arange(len(score)), order[:k])])
        told += chosen.mean(axis=0)
        right += chosen.mean(axis=0) * true
        if true.any():
            hits.append((chosen & true).any(axis=1).mean())
    count, used = positive.sum(axis=0), positive.any(axis=0)
    return {
        "mAP": np.mean(
            [
                mean_average_precision_score(scores[:, t], positive[:, t])
                for t in np.flatnonzero(used)
            ]
        ),
        f"precision@{k}": right.sum() / told.sum(),
        f"micro_F1@{k}": 2 * right.sum() / (told.sum() + count.sum()),
        f"macro_F1@{k}": np.mean((2 * right / np.maximum(told + count, 1e-9))[used]),
        f"hit@{k}": np.mean(hits),
    }


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("seed", range(6))
def test_matches_all_orders_of_tied_scores(seed, k):
    """Photos have several tags, and some tags are tied."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 3, size=(6, 5)).astype(float)
    positive = rng.random((6, 5)) < 0.5
    positive[0, 0] = True
    found = metrics.tagging(scores, positive, k=k, hits=(k,))
    for name, value in reference_tagging(scores, positive, k=k).items():
        assert found[name] == pytest.approx(value, abs=1e-12), name


def test_metrics_are_scikit_learns_without_ties():
    rng = np.random.default_rng(0)
    positive = rng.random((300, 40)) < 0.1
    scores = rng.normal(size=positive.shape) + positive
    ranks = rankdata(-scores, axis=1)
    chosen, tagged = ranks <= 5, positive.any(axis=1)
    expected = {
        "mAP": average_precision_score(positive, scores, average="macro"),
        "precision@5": precision_score(positive, chosen, average="micro"),
        "micro_F1@5": f1_score(positive, chosen, average="micro"),
        "macro_F1@5": f1_score(positive, chosen, average="macro"),
    } | {f"hit@{k}": ((ranks <= k) & positive)[tagged].any(axis=1).mean() for k in (1, 10)}
    assert metrics.tagging(scores, positive, k=5) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("photos", "scale", "shift"),
    [(120_000, *one) for one in ((1, 0), (1e-6, 0), (1e6, 0), (1, 5))]
    + [(1_000_000, *one) for one in ((1, 0), (1e-6, 0.5))],
)
def test_average_precision_of_many_photos_is_scikit_learns(photos, scale, shift):
    """Scores with standard deviation 0.003 differ by about 1e-7 to 1e-8; none are equal."""
    rng = np.random.default_rng(photos)
    positive = rng.random(photos) < 0.1
    scores = 0.003 * (rng.normal(size=photos) + 0.1 * positive)
    found = metrics.average_precision(scale * scores + shift, positive)
    expected = average_precision_score(positive, scores)
    assert expected > positive.mean() + 0.005
    assert found == pytest.approx(expected, abs=1e-6)


def test_cosines_of_many_photos_keep_their_average_precision_when_rounded():
    """Each rounded cosine is shared by dozens of photos."""
    rng = np.random.default_rng(3)
    positive = rng.random((120_000, 1)) < 0.1
    cosines = 0.3 + 0.003 * (rng.normal(size=positive.shape) + positive)
    found = metrics.tagging(metrics.rounded(cosines), positive, k=1)
    assert found["mAP"] == pytest.approx(average_precision_score(positive, cosines), abs=1e-5)


def test_average_precision_with_large_ties_is_the_mean_over_random_orders():
    """2,000 photos have few distinct scores; four standard errors of 300 shuffles are allowed."""
    rng = np.random.default_rng(4)
    positive = rng.random(2000) < 0.1
    scores = np.round(rng.random(2000) + 0.2 * positive, 1)
    trials = []
    for _ in range(300):
        order = rng.permutation(2000)
        ranks = rankdata(-scores[order], method="ordinal")
        trials.append(average_precision_score(positive[order], -ranks))
    error = np.std(trials) / math.sqrt(len(trials))
    found = metrics.average_precision(scores, positive)
    assert found == pytest.approx(np.mean(trials), abs=4 * error)


@pytest.mark.parametrize("seed", range(3))
def test_hit_at_1_with_one_tag_a_photo_is_precision_at_1(seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 3, size=(20, 6)).astype(float)
    positive = np.eye(6, dtype=bool)[rng.integers(0, 6, 20)]
    found = metrics.tagging(scores, positive, k=1)
    assert found["hit@1"] == pytest.approx(found["precision@1"])


def test_average_precision_by_hand():
    positive = np.array([True, False, True, False])
    found = metrics.average_precision(np.array([0.9, 0.8, 0.7, 0.1]), positive)
    assert found == pytest.approx((1 + 2 / 3) / 2)
    # The last two are tied: the second positive is third or fourth.
    found = metrics.average_precision(np.array([0.9, 0.8, 0.1, 0.1]), positive)
    assert found == pytest.approx((1 + (2 / 3 + 2 / 4) / 2) / 2)
    assert metrics.average_precision(np.array([0.1, 0.2, 0.3, 0.4]), positive[::-1]) == (
        pytest.approx((1 / 1 + 2 / 3) / 2)
    )


def test_metrics_by_hand():
    scores = np.array([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    positive = np.array([[True, False, False], [True, True, False]])
    found = metrics.tagging(scores, positive, k=2, hits=(1, 2))
    assert found["precision@2"] == pytest.approx(2 / 4)
    assert found["micro_F1@2"] == pytest.approx(2 * 2 / (4 + 3))
    # Tag 1: 1 of 1 predictions right, 2 true; tag 2: 1 of 2 right, 1 true; tag 3 is never true.
    assert found["macro_F1@2"] == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert (found["hit@1"], found["hit@2"]) == (0.5, 1.0)
    # Tag 2: both photos are tied, and one of them is right.
    assert found["mAP"] == pytest.approx((1 + (1 + 1 / 2) / 2) / 2)


@pytest.mark.parametrize("noise", [0, 1e-8])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_tagger_whose_scores_are_all_equal_scores_chance(noise, dtype):
    """This holds for any rounding of cosines, and for any order of tags and photos."""
    rng = np.random.default_rng(0)
    positive = rng.random((300, 40)) < 0.1
    scores = metrics.rounded((0.5 + noise * rng.normal(size=positive.shape)).astype(dtype))
    found = metrics.tagging(scores, positive, k=5)
    assert found["precision@5"] == pytest.approx(positive.mean())
    # The probability that the first k random tags include none of the photo's tags.
    counts = [int(count) for count in positive.sum(axis=1) if count]
    for k in (1, 10):
        missed = [math.comb(40 - count, k) / math.comb(40, k) for count in counts]
        assert found[f"hit@{k}"] == pytest.approx(1 - np.mean(missed))
    told, count = 300 * 5, positive.sum()
    assert found["micro_F1@5"] == pytest.approx(2 * 5 / 40 * count / (told + count))
    random = np.mean(
        [metrics.tagging(rng.normal(size=positive.shape), positive)["mAP"] for _ in range(20)]
    )
    assert found["mAP"] == pytest.approx(random, abs=0.003)
    assert found["mAP"] == pytest.approx(positive.mean(), abs=0.02)


def test_one_name_of_many_and_equal_scores_hit_at_chance():
    positive = np.eye(40, 1914, dtype=bool)
    found = metrics.tagging(np.zeros((40, 1914)), positive)
    assert found["hit@10"] == pytest.approx(10 / 1914)


@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_metrics_depend_on_order_alone(shift):
    rng = np.random.default_rng(1)
    scores, positive = rng.normal(size=(50, 12)), rng.random((50, 12)) < 0.2
    assert metrics.tagging(scores, positive) == metrics.tagging(3 * scores + shift, positive)


def test_a_perfect_tagger_and_the_worst():
    positive = np.eye(8, dtype=bool)
    best, worst = (metrics.tagging(sign * np.eye(8), positive, k=1) for sign in (1.0, -1.0))
    assert {best[name] for name in ("mAP", "precision@1", "micro_F1@1", "macro_F1@1", "hit@1")} == {
        1.0
    }
    assert worst["mAP"] == pytest.approx(1 / 8)
    assert {worst[name] for name in ("precision@1", "micro_F1@1", "macro_F1@1", "hit@1")} == {0.0}


def test_k_larger_than_the_vocabulary_is_the_vocabulary():
    assert "precision@3" in metrics.tagging(np.eye(3), np.eye(3, dtype=bool), k=5)


def test_what_can_not_be_measured_raises():
    scores = np.zeros((2, 3))
    with pytest.raises(ValueError, match="no photo has any"):
        metrics.tagging(scores, np.zeros((2, 3), bool))
    scores[1, 1] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        metrics.tagging(scores, np.ones((2, 3), bool))
    with pytest.raises(ValueError, match="not finite"):
        metrics.average_precision(scores[:, 1], np.array([True, False]))
    with pytest.raises(ValueError, match="needs a positive"):
        metrics.average_precision(np.zeros(2), np.zeros(2, bool))
