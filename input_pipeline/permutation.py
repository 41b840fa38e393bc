"""Pseudo-random permutations of any size, computed place by place: no list is held in memory.

A Feistel network on a grid of about sqrt(count) rows and columns: each round moves every row (or
column) by a pseudo-random number that depends only on the other coordinate, so it can be undone,
and the whole is a permutation of the grid. Places outside of the count walk on until they are
inside (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains",
https://doi.org/10.1007/3-540-45760-7_9).
"""

import math

import numpy as np
from jaxtyping import Int

ROUNDS = 8


def permuted(
    places: Int[np.ndarray, " places"], count: int, key: tuple[int, int]
) -> Int[np.ndarray, " places"]:
    """The numbers at some places of a permutation of 0 to count - 1.

    Args:
      places: from 0 to count - 1, in any order.
      count: the size of the permutation, at most 2**62.
      key: two numbers, each from 0 to 2**64 - 1; other keys are other permutations.
    """
    rows = math.isqrt(count - 1) + 1
    columns = -(-count // rows)
    keys = np.random.Philox(key=np.array(key, np.uint64)).random_raw(ROUNDS)
    result = places.astype(np.uint64)
    outside = np.ones(len(result), bool)
    while outside.any():
        result[outside] = _moved(result[outside], np.uint64(rows), np.uint64(columns), keys)
        outside = result >= count
    return result.astype(np.int64)


def _moved(places: np.ndarray, rows: np.uint64, columns: np.uint64, keys: np.ndarray) -> np.ndarray:
    """A permutation of the grid."""
    row, column = np.divmod(places, columns)
    for first, second in keys.reshape(-1, 2):
        row = (row + scrambled(column ^ first) % rows) % rows
        column = (column + scrambled(row ^ second) % columns) % columns
    return row * columns + column


def scrambled(numbers: np.ndarray) -> np.ndarray:
    """Pseudo-random numbers of 64 bits, one for each number: SplitMix64's output function.

    Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number Generators",
    https://doi.org/10.1145/2660193.2660195.
    """
    numbers = numbers + np.uint64(0x9E3779B97F4A7C15)
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
