"""The data order: a function of (seed, step), the same on any number of processes."""

import threading

import numpy as np
import pytest

from input_pipeline import loader

COUNTS = np.array([5, 1, 3, 2, 5, 4, 5])


def read(images, captions, step, places):
    return {
        "image_id": images.astype(np.int32),
        "caption": captions.astype(np.int32),
        "key": 1000 * step + places,
    }


def test_every_epoch_is_a_permutation_in_another_order():
    size = len(COUNTS)
    sampler = loader.Sampler(0, COUNTS, batch_size=3)
    stream = np.concatenate([sampler(step)[0] for step in range(size * 4)])
    epochs = stream[: size * 12].reshape(-1, size)
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 8


def test_the_captions_of_a_photo_take_turns():
    sampler = loader.Sampler(1, COUNTS, batch_size=len(COUNTS))
    first = np.cumsum(COUNTS) - COUNTS
    seen = [[] for _ in COUNTS]
    for step in range(60):  # 60 epochs: a multiple of every count
        for image, caption in zip(*sampler(step), strict=True):
            assert first[image] <= caption < first[image] + COUNTS[image]
            seen[image].append(caption - first[image])
    for count, turns in zip(COUNTS, seen, strict=True):
        assert set(np.bincount(turns, minlength=count)) == {60 // count}


def test_another_seed_is_another_order():
    a, b = (loader.Sampler(seed, COUNTS, batch_size=70)(0) for seed in (0, 1))
    assert (a[0] != b[0]).any()
    assert (a[1] != b[1]).any()


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_global_batch(processes):
    sampler = loader.Sampler(0, COUNTS, batch_size=12)
    whole = loader.Batches(sampler, read, 20, np.arange(12))
    parts = [
        loader.Batches(sampler, read, 20, places) for places in np.arange(12).reshape(processes, -1)
    ]
    for step in (0, 7, 19):
        for key, rows in whole[step].items():
            together = np.concatenate([part[step][key] for part in parts])
            np.testing.assert_array_equal(together, rows)


def test_reading_starts_at_any_step_and_keeps_the_order():
    batches = loader.Batches(loader.Sampler(3, COUNTS, batch_size=4), read, 40, np.arange(4))
    straight = list(loader.iterate(batches, first_step=0, prefetch=4))
    resumed = list(loader.iterate(batches, first_step=17, prefetch=3))
    assert (len(straight), len(resumed)) == (40, 23)
    for a, b in zip(straight[17:], resumed, strict=True):
        np.testing.assert_array_equal(a["caption"], b["caption"])


def test_an_empty_split_is_refused():
    with pytest.raises(ValueError, match="no photos"):
        loader.Sampler(0, np.array([], int), 4)


def test_a_mixture_of_one_source_uses_each_photo_once_an_epoch():
    mixture = loader.Mixture(0, [4, 3], (), batch_size=5)
    rows, turns = map(np.concatenate, zip(*map(mixture, range(7 * 20)), strict=True))
    epochs = rows.reshape(-1, 7)
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 90
    # Of three captions, each has its turn once in three epochs.
    for row in range(7):
        np.testing.assert_array_equal(np.diff(turns[rows == row]), 1)
    assert len({turns[rows == row][0] % 97 for row in range(7)}) > 3


@pytest.mark.parametrize(
    "weights", [(0.2, 0.8), (1, 1), (3, 1, 2), (0.1, 0.7, 0.05, 0.15), (1 / 3, 2 / 3), (1e-4, 1)]
)
def test_the_shares_of_a_mixture_are_exact(weights):
    sizes = [5, 70, 9, 30][: len(weights)]
    mixture = loader.Mixture(1, sizes, weights, batch_size=16)
    rows = np.concatenate([mixture(step)[0] for step in range(400)])
    source = np.searchsorted(np.cumsum(sizes), rows, side="right")
    shares = np.array(weights) / sum(weights)
    so_far = np.cumsum(source[:, None] == np.arange(len(sizes)), axis=0)
    expected = np.arange(1, len(rows) + 1)[:, None] * shares
    assert abs(so_far - expected).max() < max(1, len(sizes) - 1)
    # Each source has its own epochs, whatever its share.
    for number, (first, size) in enumerate(zip(np.cumsum(sizes) - sizes, sizes, strict=True)):
        own = rows[source == number] - first
        for epoch in own[: len(own) // size * size].reshape(-1, size):
            assert sorted(epoch) == list(range(size))


def test_the_second_epoch_of_a_seed_is_not_the_first_of_the_next():
    orders = [loader.Mixture(seed, [50], (), batch_size=100)(0)[0] for seed in range(3)]
    assert (orders[0][50:] != orders[1][:50]).any()
    assert (orders[1][50:] != orders[2][:50]).any()


@pytest.mark.parametrize("processes", [2, 4])
def test_a_mixture_is_the_same_on_any_number_of_processes_and_when_resumed(processes):
    def mixture():
        return loader.Mixture(5, [40, 300], (1, 2), batch_size=12)

    whole = loader.Batches(mixture(), read, 30, np.arange(12))
    straight = list(loader.iterate(whole, first_step=0, prefetch=2))
    parts = [
        loader.Batches(mixture(), read, 30, places)
        for places in np.arange(12).reshape(processes, -1)
    ]
    for first in (0, 1, 13, 29):
        resumed = [loader.iterate(part, first_step=first, prefetch=2) for part in parts]
        for expected, *shares in zip(straight[first:], *resumed, strict=True):
            for key, rows in expected.items():
                np.testing.assert_array_equal(np.concatenate([s[key] for s in shares]), rows)


def test_a_read_that_does_not_return_ends_in_one_line(monkeypatch):
    monkeypatch.setattr(loader, "PATIENCE", 0.2)
    answered = threading.Event()

    def stuck(*arguments):
        if arguments[2] == 3:
            answered.wait()
        return read(*arguments)

    batches = loader.Batches(loader.Sampler(3, COUNTS, 4), stuck, 9, np.arange(4))
    stream = loader.iterate(batches, first_step=1, prefetch=1)
    assert [next(stream)["key"][0] for _ in range(2)] == [1000, 2000]
    with pytest.raises(TimeoutError, match="the next batch can't be read"):
        next(stream)
    answered.set()
