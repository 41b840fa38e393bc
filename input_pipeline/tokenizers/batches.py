"""Token ids of texts to padded batches of few distinct shapes."""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Int, Int32


def pad(
    ids: Sequence[Int32[np.ndarray, " _"]], length: int
) -> tuple[Int32[np.ndarray, "b {length}"], Bool[np.ndarray, "b {length}"]]:
    """Stacks texts: ids, zero where a row is padding, and a mask that is False there.

    Raises:
      ValueError: a text is longer than `length`.
    """
    lengths = np.array([len(row) for row in ids], np.int64)
    if lengths.max(initial=0) > length:
        raise ValueError(f"a text of {lengths.max()} tokens does not fit into {length}")
    text_mask = np.arange(length) < lengths[:, None]
    text_ids = np.zeros(text_mask.shape, np.int32)
    if len(ids):
        text_ids[text_mask] = np.concatenate(ids)
    return text_ids, text_mask


def length_batches(
    lengths: Sequence[int],
    batch_size: int,
    *,
    max_tokens: int,
    multiple: int = 4,
    longest: int | None = None,
) -> Iterator[tuple[Int[np.ndarray, " _"], int]]:
    """Groups texts of similar lengths into batches of few distinct padded shapes.

    Texts go in order from the longest to the shortest, so a batch is as long as its first text
    needs, memory is at its peak at the start, and only the last batch has an odd number of rows.

    Args:
      lengths: tokens of each text, special tokens included.
      batch_size: texts in a batch of short texts.
      max_tokens: tokens in a batch, padding included. Batches of longer texts hold fewer texts, and
        at least one.
      multiple: padded lengths are multiples of it: with 4 they are 4, 8, 12, 16, 24, 32, 48, ...
      longest: no text is padded to more than this, which no text may exceed. None: no limit.

    Yields:
      The texts' indices, and the length to pad them to.
    """
    lengths = np.asarray(lengths, np.int64)
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        length = padded_length(int(lengths[order[start]]), multiple)
        length = length if longest is None else min(length, longest)
        # Powers of two, like a last batch that is rounded up: the same shape serves both.
        fitting = 1 << max(max_tokens // length, 1).bit_length() - 1
        rows = order[start : start + min(batch_size, fitting)]
        yield rows, length
        start += len(rows)


def padded_length(length: int, multiple: int = 4) -> int:
    """Rounds a length up to one of `multiple`, 2 * `multiple`, ... (two lengths an octave)."""
    step = max(multiple, (1 << max(length - 1, 0).bit_length()) // 4)
    return max(-(-length // step), 1) * step
