"""Digests of arrays; they do not depend on how the arrays are sharded."""

import concurrent.futures
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Shaped, UInt32

PyTree = Any

# Number of elements that are digested at a time. They and their weights fit into a CPU's cache.
BLOCK = 1 << 17
# Odd multipliers that spread positions over 32 bits (from the golden ratio and MurmurHash3).
FIRST, SECOND = np.uint32(0x9E3779B1), np.uint32(0x85EBCA6B)


def digests(tree: PyTree) -> dict[str, str]:
    """The path of every array in a tree -> a digest of the array, 16 hexadecimal digits.

    A digest depends on the values only, not on the mesh: each process sums over its own shards, and
    the sums of all processes are added. With several processes, all must call this function.

    A digest is two sums modulo 2^32 over the elements' bit patterns, each multiplied by an odd
    weight that depends on the element's position. A change of one element changes both sums; other
    damage goes unnoticed with a probability of about 2^-64. Digests do not detect deliberate
    changes.

    Args:
      tree: a tree of `jax.Array`s.
    """
    leaves = jax.tree.leaves_with_path(tree)
    sums = np.zeros((len(leaves), 2), np.uint32)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for row, (_, array) in enumerate(leaves):
            for of_block in pool.map(lambda block: _sums(*block), _blocks(array)):
                sums[row] += of_block
    if jax.process_count() > 1:
        sums = multihost_utils.process_allgather(sums).sum(axis=0, dtype=np.uint32)
    return {
        jax.tree_util.keystr(path): f"{first:08x}{second:08x}"
        for (path, _), (first, second) in zip(leaves, sums.tolist(), strict=True)
    }


def _blocks(
    array: jax.Array,
) -> Iterator[tuple[Shaped[np.ndarray, "rows columns"], UInt32[np.ndarray, "rows columns"]]]:
    """Blocks of this process's shards, and each element's position in the flattened array."""
    for shard in array.addressable_shards:
        if shard.replica_id:
            continue
        values, rows, columns = np.asarray(shard.data), np.zeros(1, np.uint32), np.zeros(1)
        width = np.uint32(array.shape[-1] if array.ndim else 1)
        for axis, (part, size) in enumerate(zip(shard.index, array.shape, strict=True)):
            along = np.arange(*part.indices(size), dtype=np.uint32)
            if axis == array.ndim - 1:
                columns = along
            else:
                rows = (rows[:, None] * np.uint32(size) + along).reshape(-1)
        values, columns = values.reshape(len(rows), len(columns)), columns.astype(np.uint32)
        height = max(BLOCK // max(len(columns), 1), 1)
        for start in range(0, len(rows), height):
            places = rows[start : start + height, None] * width + columns
            yield values[start : start + height], places


def _sums(
    values: Shaped[np.ndarray, "rows columns"], places: UInt32[np.ndarray, "rows columns"]
) -> UInt32[np.ndarray, " 2"]:
    bits = np.ascontiguousarray(values).view(f"u{values.itemsize}")
    if values.itemsize == 8:
        bits = bits ^ (bits >> 32)
    bits = bits.astype(np.uint32, copy=False)
    first = np.sum(bits * (places * FIRST | np.uint32(1)), dtype=np.uint32)
    mixed = places ^ (places >> np.uint32(15))
    second = np.sum(bits * (mixed * SECOND | np.uint32(1)), dtype=np.uint32)
    return np.array([first, second], np.uint32)
