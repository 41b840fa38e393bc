"""Padding and length batches."""

import itertools

import numpy as np
import pytest

from input_pipeline.tokenizers import length_batches, pad, padded_length


def test_pad():
    ids = [np.array([1, 7, 2], np.int32), np.array([1, 2], np.int32)]
    text_ids, text_mask = pad(ids, 4)
    np.testing.assert_array_equal(text_ids, [[1, 7, 2, 0], [1, 2, 0, 0]])
    np.testing.assert_array_equal(text_mask, [[1, 1, 1, 0], [1, 1, 0, 0]])
    assert text_ids.dtype == np.int32
    assert text_mask.dtype == np.bool_


def test_pad_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="3 tokens does not fit into 2"):
        pad([np.zeros(3, np.int32)], 2)


def test_pad_without_texts():
    text_ids, text_mask = pad([], 8)
    assert text_ids.shape == text_mask.shape == (0, 8)


def test_padded_lengths_are_few():
    assert sorted({padded_length(n, 8) for n in range(1, 300)}) == [
        *(8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384)
    ]
    assert sorted({padded_length(n, 4) for n in range(1, 65)}) == [*(4, 8, 12, 16, 24, 32, 48, 64)]


@pytest.mark.parametrize("count", [0, 1, 127, 1000])
def test_length_batches_hold_each_text_once_and_whole(count):
    lengths = np.random.default_rng(0).integers(3, 400, count)
    batches = list(length_batches(lengths.tolist(), 64, max_tokens=2048))
    rows = np.concatenate([rows for rows, _ in batches]) if batches else np.zeros(0, int)
    assert sorted(rows.tolist()) == list(range(count))
    for rows, length in batches:
        assert lengths[rows].max() <= length
        assert len(rows) <= 64
        assert len(rows) == 1 or len(rows) * length <= 2048


def test_length_batches_have_few_shapes_and_little_padding():
    # Lengths of English captions: a mean of 15 tokens, a few of them long.
    lengths = np.random.default_rng(0).poisson(12, 10_000) + 3
    batches = list(length_batches(lengths.tolist(), 128, max_tokens=2048))
    shapes = {(len(rows), length) for rows, length in batches}
    assert len(shapes) <= 9
    assert sum(len(rows) * length for rows, length in batches) < 1.25 * lengths.sum()
    # Longest first, so that a batch that does not fit into memory fails at once.
    assert all(a >= b for (_, a), (_, b) in itertools.pairwise(batches))


def test_a_text_longer_than_the_budget_is_a_batch_by_itself():
    batches = [
        (rows.tolist(), length)
        for rows, length in length_batches([3, 10_000, 5], 128, max_tokens=2048)
    ]
    assert batches == [([1], 12_288), ([2, 0], 8)]
