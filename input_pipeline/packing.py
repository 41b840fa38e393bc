"""Packs the texts of training batches: short texts share rows, so that fewer tokens are padding.

As in Krell et al. 2021 (https://arxiv.org/abs/2107.02027), the longest texts are placed first, and
no text is cut. Captions have about 15 tokens, and a row of their own would have 64.

The texts of a batch are packed in groups, one for each device and microbatch. So texts stay on the
device of their photos, and a microbatch has whole texts.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int, Int32

from input_pipeline.loader import Batch, Sampler

# Tokens in a row, unless texts may be longer. A text of 15 tokens leaves little of such a row
# empty, and attention over 128 tokens fills the matrix units of a TPU.
ROW_LENGTH = 128
# Number of captions, and of texts drawn from them, that the number of rows is estimated from.
SAMPLED, DRAWN = 4096, 2**18
# Mean and standard deviation of the tokens in a caption of COCO, with XLM-R's tokenizer.
COCO_TOKENS = (15.5, 3.5)


class Packing:
    """Packs the texts of global batches; all groups of all batches have the same shape.

    They have as many rows as 999 of 1,000 random groups of captions need. If the texts of a batch
    do not fit, all of its groups have an eighth more rows, until the texts fit. The training step
    is then compiled for this shape too.

    Args:
      tokenize: texts -> their token ids, at most `longest`.
      captions: the texts that batches are drawn from.
      longest: number of tokens in the longest text.
      sampler: chooses the captions of each global batch.
      group: number of texts in a group.
      microbatches: number of groups of each device.

    Attributes:
      length: tokens in a row.
      rows: rows of a group, in most batches.
    """

    def __init__(
        self,
        tokenize: Callable[[Sequence[str]], list[Int32[np.ndarray, " _"]]],
        captions: Sequence[str],
        longest: int,
        sampler: Sampler,
        group: int,
        microbatches: int,
    ):
        self._tokenize, self._captions, self._sampler = tokenize, captions, sampler
        self._group, self._microbatches = group, microbatches
        self.length = row_length(longest)
        sample = captions[:: -(-len(captions) // SAMPLED)]
        self.rows = rows_needed(_lengths(tokenize(sample)), group, self.length)

    def __call__(self, step: int, places: Int[np.ndarray, " local"]) -> Batch:
        """The packed texts of one process, as `TextTransformer.encode_packed` takes them.

        Every process packs the whole batch, because the number of rows depends on all texts.

        Args:
          step: the number of the batch.
          places: the positions in the batch that this process reads (`partition.local_rows`).
        """
        _, captions = self._sampler(step)
        ids = self._tokenize([self._captions[row] for row in captions])
        starts = first_fit(self._grouped(_lengths(ids)), self.length)
        rows = self.rows
        while rows * self.length <= starts.max():
            rows += -(-rows // 8)
        groups = self._grouped(np.arange(len(ids)))
        local = np.isin(groups[:, 0], places)
        own = [ids[text] for text in groups[local].ravel()]
        return fill(own, starts[local], rows, self.length)

    def _grouped(self, x: np.ndarray) -> np.ndarray:
        """[batch] -> [groups, texts]. A device's share is split as `gradients` splits it."""
        x = x.reshape(-1, self._group, self._microbatches).swapaxes(1, 2)
        return x.reshape(-1, self._group)


def row_length(longest: int) -> int:
    """The number of tokens in a row, for texts of at most `longest` tokens."""
    return max(longest, ROW_LENGTH)


def rows_needed(lengths: Int[np.ndarray, " texts"], group: int, length: int) -> int:
    """The number of rows in which 999 of 1,000 random groups of texts fit.

    Args:
      lengths: tokens of each text in a sample.
      group: number of texts in a group.
      length: tokens in a row.
    """
    groups = max(DRAWN // group, 16)
    drawn = np.random.default_rng(0).choice(lengths, (groups, group))
    needed = first_fit(drawn, length).max(axis=1) // length + 1
    return int(np.quantile(needed, 0.999, method="higher"))


def typical_rows(group: int, length: int) -> int:
    """`rows_needed` for captions such as COCO's, to plan a run without its data."""
    drawn = np.random.default_rng(0).normal(*COCO_TOKENS, SAMPLED)
    return rows_needed(np.clip(np.rint(drawn), 1, length).astype(int), group, length)


def first_fit(
    lengths: Int[np.ndarray, "groups texts"], length: int
) -> Int[np.ndarray, "groups texts"]:
    """Where each text begins, counted in tokens through the rows of its group.

    From the longest to the shortest, each text goes into the first row that has room for it.

    Args:
      lengths: tokens of each text, at most `length`.
      length: tokens in a row.
    """
    free = np.full(lengths.shape, length)  # a row for each text is always enough
    starts, groups, used = np.empty_like(lengths), np.arange(len(lengths)), 1
    for text in np.argsort(-lengths, axis=1, kind="stable").T:
        size = lengths[groups, text]
        row = np.argmax(free[:, :used] >= size[:, None], axis=1)
        starts[groups, text] = (row + 1) * length - free[groups, row]
        free[groups, row] -= size
        used = min(max(used, row.max() + 2), free.shape[1])
    return starts


def fill(
    ids: Sequence[Int32[np.ndarray, " _"]],
    starts: Int[np.ndarray, "groups texts"],
    rows: int,
    length: int,
) -> Batch:
    """Writes the token ids of texts into the rows of their groups.

    Args:
      ids: the token ids of each text, group after group.
      starts: where each text begins, from `first_fit`.
      rows: rows of a group.
      length: tokens in a row.

    Returns:
      `text_ids` and `text_positions` of the shape [groups, rows, length], which are 0 at the
      padding, and `text_starts` of the shape [groups, texts]. All are int32.
    """
    lengths, shape = _lengths(ids), (len(starts), rows, length)
    text_ids, text_positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    positions = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    first = starts + np.arange(len(starts))[:, None] * rows * length
    places = np.repeat(first.ravel(), lengths) + positions
    text_ids.reshape(-1)[places] = np.concatenate(ids)
    text_positions.reshape(-1)[places] = positions
    return {
        "text_ids": text_ids,
        "text_positions": text_positions,
        "text_starts": starts.astype(np.int32),
    }


def _lengths(ids: Sequence[Int32[np.ndarray, " _"]]) -> Int[np.ndarray, " texts"]:
    return np.array([len(each) for each in ids], np.int64)
