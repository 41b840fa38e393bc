"""Training batches as a function of (seed, step).

The loader has no other state: a checkpoint stores the step, and any number of processes continues
with the same global batches. Photos are shuffled in every epoch. A photo's captions are used in
turn, one per epoch, beginning with a random one, so that each is used equally often. A batch that
spans two epochs may hold a photo twice; the losses mask such pairs by `image_id`.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np
from jaxtyping import Int

Batch = dict[str, np.ndarray]
# (image rows, caption rows, step, positions in the global batch) -> the arrays of a batch.
Read = Callable[[np.ndarray, np.ndarray, int, np.ndarray], Batch]


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


class Batches(grain.sources.RandomAccessDataSource):
    """One process's share of the global batches, by step.

    Args:
      sampler: chooses the pairs of each global batch.
      read: reads the arrays of given rows.
      steps: number of batches.
      places: the positions in a batch that this process reads (`partition.local_rows`).
    """

    def __init__(self, sampler: Sampler, read: Read, steps: int, places: Int[np.ndarray, " rows"]):
        self._sampler, self._read, self._steps, self._places = sampler, read, steps, places

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> Batch:
        images, captions = self._sampler(step)
        return self._read(images[self._places], captions[self._places], step, self._places)


def iterate(batches: Batches, *, first_step: int, prefetch: int) -> Iterator[Batch]:
    """Batches from `first_step` on, in order, read ahead by Grain's threads."""
    options = grain.ReadOptions(num_threads=min(prefetch, 16), prefetch_buffer_size=prefetch)
    return iter(grain.MapDataset.source(batches)[first_step:].to_iter_dataset(options))
