"""Padded batches of token ids, with few distinct shapes, because each shape is compiled."""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Int, Int32


def pad(
    ids: Sequence[Int32[np.ndarray, " _"]], length: int
) -> tuple[Int32[np.ndarray, "b {length}"], Bool[np.ndarray, "b {length}"]]:
    """Stacks the token ids of texts, padded with 0, and a mask that is False at the padding.

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

    Texts are sorted from the longest to the shortest. So the first text of a batch determines its
    length, the first batch needs the most memory, and only the last batch can be incomplete.

    Args:
      lengths: number of tokens of each text, with special tokens.
      batch_size: texts in a batch of short texts.
      max_tokens: tokens in a batch, with padding. Batches of longer texts hold fewer texts, but at
        least one.
      multiple: padded lengths are multiples of this: with 4 they are 4, 8, 12, 16, 24, 32, 48, ...
      longest: largest padded length; no text may be longer. None: no limit.

    Yields:
      The indices of a batch's texts, and the length to pad them to.
    """
    lengths = np.asarray(lengths, np.int64)
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        length = padded_length(int(lengths[order[start]]), multiple)
        length = length if longest is None else min(length, longest)
        # A power of two, because callers pad the last batch to a power of two: its shape is then
        # often known already.
        fitting = 1 << max(max_tokens // length, 1).bit_length() - 1
        rows = order[start : start + min(batch_size, fitting)]
        yield rows, length
        start += len(rows)


def padded_length(length: int, multiple: int = 4) -> int:
    """Rounds up to `multiple` times 1, 2, 3, 4, 6, 8, 12, ... (two lengths per doubling)."""
    step = max(multiple, (1 << max(length - 1, 0).bit_length()) // 4)
    return max(-(-length // step), 1) * step
