"""Training batches as a function of (seed, step).

The loader has no other state: a checkpoint stores the step, and any number of processes continues
with the same global batches. Photos are shuffled in every epoch. A photo's captions are used in
turn, one per epoch, beginning with a random one, so that each is used equally often. A batch that
spans two epochs may hold a photo twice; the losses mask such pairs by `image_id`.

`Sampler` holds the order of an epoch in memory. `Mixture` computes it place by place, for any
number of photos, and mixes several sources in given shares.
"""

import concurrent.futures
import fractions
import functools
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np
from jaxtyping import Int

from input_pipeline.permutation import permuted, scrambled

Batch = dict[str, np.ndarray]
# (image rows, caption rows or turns, step, positions in the global batch) -> a batch's arrays.
Read = Callable[[np.ndarray, np.ndarray, int, np.ndarray], Batch]
# Of the share of a source in a mixture.
LARGEST_DENOMINATOR = 10**9
# Seconds to wait for a batch.
PATIENCE = 1800


class Sampler:
    """Chooses the (photo, caption) pairs of each global batch.

    Args:
      seed: the run's seed.
      captions_per_image: number of captions of each photo. Caption rows are numbered consecutively,
        photo by photo.
      batch_size: pairs in a global batch.
    """

    def __init__(
        self,
        seed: int,
        captions_per_image: Sequence[int] | Int[np.ndarray, " images"],
        batch_size: int,
    ):
        if not len(captions_per_image):
            raise ValueError("the training split has no photos")
        captions_per_image = np.asarray(captions_per_image, np.int64)
        self._seed = seed
        self._counts = captions_per_image
        self._first = np.cumsum(captions_per_image) - captions_per_image
        self._batch_size = batch_size
        start = np.random.Generator(np.random.Philox(key=[seed, 0]))
        self._start = start.integers(0, captions_per_image)
        self._epoch_order = functools.lru_cache(maxsize=4)(self._shuffle)

    def __call__(self, step: int) -> tuple[Int[np.ndarray, " batch"], Int[np.ndarray, " batch"]]:
        """The image rows and the caption rows of global batch `step`."""
        position = step * self._batch_size + np.arange(self._batch_size)
        epoch, place = np.divmod(position, len(self._counts))
        image = np.empty(self._batch_size, np.int64)
        for e in np.unique(epoch):
            image[epoch == e] = self._epoch_order(int(e))[place[epoch == e]]
        turn = (self._start[image] + epoch) % self._counts[image]
        return image, self._first[image] + turn

    def _shuffle(self, epoch: int) -> Int[np.ndarray, " images"]:
        # Key [seed, 0] is used for the first captions.
        generator = np.random.Generator(np.random.Philox(key=[self._seed, epoch + 1]))
        return generator.permutation(len(self._counts))


class Mixture:
    """Chooses the photos of each global batch, and the turns of their captions.

    The shares of the sources are exact: among the first n pairs of a run, the number of pairs from
    a source differs from its share of n by less than one if there are two sources, and by less
    than the number of sources in any case.

    Args:
      seed: the run's seed.
      sizes: number of photos of each source. Rows are numbered source by source.
      weights: the share of each source, in any unit; empty: each photo is used once an epoch,
        whichever source it is from.
      batch_size: pairs in a global batch.
    """

    def __init__(
        self, seed: int, sizes: Sequence[int], weights: Sequence[float | int], batch_size: int
    ):
        self._seed, self._batch_size = seed, batch_size
        self._sizes = list(sizes) if weights else [sum(sizes)]
        self._first = np.cumsum(self._sizes) - self._sizes
        # Weights are taken as they are written: 0.1 is a tenth, and not the nearest binary number.
        exact = [fractions.Fraction(str(weight)) for weight in weights or (1,)]
        # The share of each source among the pairs that are not of an earlier source.
        self._shares = [
            (exact[k] / sum(exact[k:])).limit_denominator(LARGEST_DENOMINATOR)
            for k in range(len(exact))
        ]

    def __call__(self, step: int) -> tuple[Int[np.ndarray, " batch"], Int[np.ndarray, " batch"]]:
        """The image rows of global batch `step`, and the turn of each.

        Of the n captions of a photo, turn t uses the one numbered t modulo n.
        """
        left = np.arange(self._batch_size)
        position = step * self._batch_size + left
        rows = np.empty(self._batch_size, np.int64)
        turns = np.empty(self._batch_size, np.int64)
        for source, share in enumerate(self._shares):
            before = _floor(position, share)
            own = _floor(position + 1, share) > before
            chosen = left[own]
            rows[chosen], turns[chosen] = self._of_source(source, before[own])
            left, position = left[~own], (position - before)[~own]
        return rows, turns

    def _of_source(self, source: int, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows and the turns at some positions of a source's endless sequence."""
        size = self._sizes[source]
        epoch, place = np.divmod(position, size)
        row = np.empty(len(place), np.int64)
        for e in np.unique(epoch):
            # The seed and the epoch are separate parts of the key: grain's shuffle adds them, so
            # that the next seed would begin with the second epoch of this one.
            key = (self._seed, int(e) * len(self._sizes) + source)
            row[epoch == e] = permuted(place[epoch == e], size, key)
        row += self._first[source]
        start = scrambled(row.astype(np.uint64) ^ scrambled(np.uint64([self._seed])))
        return row, (start >> np.uint64(32)).astype(np.int64) + epoch


def _floor(position: np.ndarray, share: fractions.Fraction) -> np.ndarray:
    """The whole part of position * share, without overflow."""
    whole, rest = np.divmod(position, share.denominator)
    return whole * share.numerator + rest * share.numerator // share.denominator


class Batches(grain.sources.RandomAccessDataSource):
    """One process's share of the global batches, by step.

    Args:
      sampler: chooses the pairs of each global batch.
      read: reads the arrays of given rows.
      steps: number of batches.
      places: the positions in a batch that this process reads (`partition.local_rows`).
    """

    def __init__(
        self, sampler: Sampler | Mixture, read: Read, steps: int, places: Int[np.ndarray, " rows"]
    ):
        self._sampler, self._read, self._steps, self._places = sampler, read, steps, places

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> Batch:
        images, captions = self._sampler(step)
        return self._read(images[self._places], captions[self._places], step, self._places)


def iterate(batches: Batches, *, first_step: int, prefetch: int) -> Iterator[Batch]:
    """Batches from `first_step` on, in order, read ahead by Grain's threads.

    Raises:
      TimeoutError: a batch takes longer than `PATIENCE`, because a read does not return.
    """
    options = grain.ReadOptions(num_threads=min(prefetch, 16), prefetch_buffer_size=prefetch)
    stream = iter(grain.MapDataset.source(batches)[first_step:].to_iter_dataset(options))
    # Nothing can interrupt a read from a mounted store that does not answer, only leave it behind.
    pool = concurrent.futures.ThreadPoolExecutor(1, "next batch")
    try:
        while True:
            future = pool.submit(next, stream, None)
            if future not in concurrent.futures.wait([future], PATIENCE).done:
                raise TimeoutError(
                    f"the next batch can't be read for {PATIENCE / 60:.0f} minutes: the disk or "
                    "the network of the data does not answer. When it works again, run the same "
                    "command to resume"
                )
            if (batch := future.result()) is None:
                return
            yield batch
    finally:
        pool.shutdown(wait=False)
