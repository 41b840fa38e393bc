"""Queries of several parts."""

import numpy as np
from jaxtyping import Float

# Unwanted parts are subtracted with this weight.
WITHOUT_WEIGHT = 0.5


def combined(
    wanted: Float[np.ndarray, "parts dim"],
    unwanted: Float[np.ndarray, "others dim"] | None = None,
    weight: float = WITHOUT_WEIGHT,
) -> Float[np.ndarray, " dim"]:
    """One unit-length vector for a query of several parts.

    Args:
      wanted: the embeddings of what photos should show.
      unwanted: the embeddings of what they should not show.
      weight: the weight of each unwanted part; each wanted part has weight 1.

    Raises:
      ValueError: the parts cancel out.
    """
    total = wanted.sum(axis=0)
    if unwanted is not None:
        total = total - weight * unwanted.sum(axis=0)
    length = np.linalg.norm(total)
    if length < 1e-3:
        raise ValueError("the parts of the query cancel out, so nothing is left to search for")
    return total / length
