"""Compares intervals and the paired test with SciPy."""

import numpy as np
import pytest
from scipy import stats

from xlir import significance
from xlir.significance import ByPhoto


def values(seed, photos, queries=3):
    """The values of two runs, and the photo of each value; photos have one or more queries."""
    rng = np.random.default_rng(seed)
    photo = np.repeat(np.arange(photos), rng.integers(1, queries + 1, photos))
    easy = rng.random(photos)[photo]
    return [np.clip(easy + 0.3 * rng.normal(size=len(photo)), 0, 1) for _ in range(2)], photo


def test_intervals_are_scipys():
    (first, _), photo = values(0, 60)
    metric = ByPhoto.of(first, photo, 60)
    expected = stats.bootstrap(
        (metric.sums, metric.counts),
        lambda sums, counts, axis: sums.sum(axis=axis) / counts.sum(axis=axis),
        paired=True,
        n_resamples=significance.RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(significance.SEED),
    ).confidence_interval
    assert metric.mean() == pytest.approx(first.mean(), abs=1e-12)
    found = significance.intervals({"a": metric})["a"]
    assert found == pytest.approx([expected.low, expected.high], abs=1e-12)


def test_blocks_of_resamples_change_nothing(monkeypatch):
    (first, second), photo = values(1, 30)
    metrics = {"a": ByPhoto.of(first, photo, 30), "b": ByPhoto.of(second, photo, 30)}
    whole = significance.intervals(metrics)
    monkeypatch.setattr(significance, "BLOCK", 7 * 30)
    assert significance.intervals(metrics) == whole


def test_an_interval_covers_the_true_mean_in_95_of_100_cases():
    rng, inside = np.random.default_rng(2), 0
    for _ in range(200):
        hits = (rng.random(100) < 0.3).astype(float)
        low, high = significance.intervals({"a": ByPhoto.of(hits, np.arange(100), 100)})["a"]
        inside += low <= 0.3 <= high
    assert 0.90 <= inside / 200 <= 0.99


@pytest.mark.parametrize("seed", range(4))
def test_the_paired_test_is_scipys(seed):
    """SciPy tries all 1,024 exchanges of ten photos."""
    runs, photo = values(seed, 10)
    first, second = (ByPhoto.of(run, photo, 10) for run in runs)
    expected = stats.permutation_test(
        (first.sums, second.sums),
        lambda a, b, axis: (a - b).sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf,
    ).pvalue
    found = significance.paired({"a": first}, {"a": second})["a"]
    # Five standard errors of 10,000 random exchanges.
    assert found.p == pytest.approx(expected, abs=0.025)
    assert found.mean == pytest.approx(runs[0].mean() - runs[1].mean(), abs=1e-12)
    assert found.interval[0] < found.mean < found.interval[1]


def test_a_run_does_not_differ_from_itself():
    (first, _), photo = values(0, 20)
    metric = ByPhoto.of(first, photo, 20)
    found = significance.paired({"a": metric}, {"a": metric})
    assert found == {"a": significance.Difference(0.0, [0.0, 0.0], 1.0)}


def test_other_queries_can_not_be_compared():
    (first, second), photo = values(0, 20)
    with pytest.raises(ValueError, match="different queries"):
        significance.paired(
            {"a": ByPhoto.of(first, photo, 20)}, {"a": ByPhoto.of(second[1:], photo[1:], 20)}
        )


def test_photos_without_a_query_take_part_in_resampling():
    """A language with one caption has an interval, though most resamples leave its photo out."""
    metric = ByPhoto.of(np.array([0.5]), np.array([3]), 50)
    assert significance.intervals({"a": metric})["a"] == [0.5, 0.5]
