"""Tagging metrics against loops over all orders of tied scores, by hand, and for broken taggers."""

import fractions
import itertools

import numpy as np
import pytest

from xlir import metrics

F = fractions.Fraction


def orders(scores):
    """All orders by falling score; tied ones in each of their orders."""
    groups = [
        [place for place, one in enumerate(scores) if one == score]
        for score in sorted(set(scores), reverse=True)
    ]
    for parts in itertools.product(*(itertools.permutations(group) for group in groups)):
        yield list(itertools.chain(*parts))


def mean(values):
    values = list(values)
    return sum(values, F(0)) / len(values)


def reference_average_precision(scores, positive):
    def one(order):
        hits = list(itertools.accumulate(int(positive[place]) for place in order))
        return mean(
            F(hit, rank)
            for rank, (place, hit) in enumerate(zip(order, hits, strict=True), 1)
            if positive[place]
        )

    return float(mean(one(order) for order in orders(scores)))


def reference_tagging(scores, positive, k):
    """Counts of true positives and of predictions a tag, in expectation, by enumeration."""
    photos, tags = scores.shape
    right, told = [F(0)] * tags, [F(0)] * tags
    hit = []
    for row in range(photos):
        all_orders = list(orders(scores[row].tolist()))
        for tag in range(tags):
            chosen = mean(F(int(tag in order[:k])) for order in all_orders)
            told[tag] += chosen
            right[tag] += chosen * int(positive[row, tag])
        if positive[row].any():
            hit.append(mean(F(int(positive[row, order[0]])) for order in all_orders))
    count = positive.sum(axis=0).tolist()
    used = [tag for tag in range(tags) if count[tag]]
    return {
        "mAP": np.mean([reference_average_precision(scores[:, t], positive[:, t]) for t in used]),
        f"precision@{k}": float(sum(right) / (photos * k)),
        f"micro_F1@{k}": float(2 * sum(right) / (photos * k + sum(count))),
        f"macro_F1@{k}": float(mean(2 * right[t] / (told[t] + count[t]) for t in used)),
    }


@pytest.mark.parametrize("seed", range(6))
def test_matches_all_orders_of_tied_scores(seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 4, size=(6, 5)).astype(float)
    positive = rng.random((6, 5)) < 0.35
    positive[0, 0] = True
    found = metrics.tagging(scores, positive, k=2)
    for name, value in reference_tagging(scores, positive, k=2).items():
        assert found[name] == pytest.approx(value, abs=1e-12), name


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
    # The last two tied: the second positive is third or fourth.
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
    # The first tag: 1 right of 1 told, 2 there; the second: 1 of 2, 1 there; the third is nowhere.
    assert found["macro_F1@2"] == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert (found["hit@1"], found["hit@2"]) == (0.5, 1.0)
    # The second tag: both photos tied, one of them right.
    assert found["mAP"] == pytest.approx((1 + (1 + 1 / 2) / 2) / 2)


@pytest.mark.parametrize("noise", [0, 1e-8])
def test_a_tagger_whose_scores_are_all_equal_scores_chance(noise):
    """Whatever rounding does to them, and whatever the order of tags and photos."""
    rng = np.random.default_rng(0)
    positive = rng.random((300, 40)) < 0.1
    scores = 0.5 + noise * rng.normal(size=positive.shape)
    found = metrics.tagging(scores, positive, k=5)
    assert found["precision@5"] == pytest.approx(positive.mean())
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
