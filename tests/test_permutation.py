"""Permutations that are computed place by place."""

import itertools

import numpy as np
import pytest

from input_pipeline.permutation import permuted


@pytest.mark.parametrize("count", [*range(1, 40), 99, 100, 101, 1023, 4096, 65_537])
def test_every_number_occurs_once(count):
    numbers = permuted(np.arange(count), count, (3, 1))
    np.testing.assert_array_equal(np.sort(numbers), np.arange(count))


def test_places_are_independent_of_each_other():
    whole = permuted(np.arange(1000), 1000, (0, 0))
    places = np.array([999, 5, 5, 0, 731])
    np.testing.assert_array_equal(permuted(places, 1000, (0, 0)), whole[places])


def test_small_permutations_are_about_equally_frequent():
    """The 24 permutations of 4 elements, over 4,800 keys: chi-squared, 23 degrees of freedom."""
    found = [tuple(permuted(np.arange(4), 4, (7, epoch)).tolist()) for epoch in range(4800)]
    counts = [found.count(order) for order in itertools.permutations(range(4))]
    chi_squared = sum((count - 200) ** 2 / 200 for count in counts)
    assert chi_squared < 52.6  # a true shuffle exceeds this once in 2,500 times


def test_a_large_permutation_looks_random():
    """Neighbouring places are unrelated, and each tenth of the numbers is spread evenly."""
    count = 10**9
    numbers = permuted(np.arange(50_000), count, (1, 2))
    assert len(np.unique(numbers)) == 50_000
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(np.arange(50_000), numbers)[0, 1]) < 0.02
    tenths = np.bincount(numbers * 10 // count, minlength=10)
    assert (abs(tenths - 5000) < 300).all()
    other = permuted(np.arange(50_000), count, (1, 3))
    assert (numbers == other).sum() < 3
